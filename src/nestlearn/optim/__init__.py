"""Optimizers are associative memories of gradients (sections 4 and 7.2, appendix B)."""

from nestlearn.optim.base import MemoryOptimizer, NotFiniteGradient
from nestlearn.optim.deep import DeepMomentum
from nestlearn.optim.delta import DeltaMomentum
from nestlearn.optim.m3 import M3
from nestlearn.optim.matrices import matrix_groups
from nestlearn.optim.momentum import FeatureMomentum, Momentum, PreconditionedMomentum
from nestlearn.optim.muon import Muon
from nestlearn.optim.orthogonal import descend_to_orthogonal, newton_schulz

__all__ = [
    "M3",
    "DeepMomentum",
    "DeltaMomentum",
    "FeatureMomentum",
    "MemoryOptimizer",
    "Momentum",
    "Muon",
    "NotFiniteGradient",
    "PreconditionedMomentum",
    "descend_to_orthogonal",
    "matrix_groups",
    "newton_schulz",
]
