"""Optimizers are associative memories of gradients (sections 4 and 7.2, appendix B)."""

from nestlearn.optim.base import MemoryOptimizer, NotFiniteGradient
from nestlearn.optim.deep import DeepMomentum
from nestlearn.optim.delta import DeltaMomentum
from nestlearn.optim.derivations import as_memory
from nestlearn.optim.descent import DGD, GGD
from nestlearn.optim.generalized import GeneralizedMomentum
from nestlearn.optim.levelwise import LevelwiseOptimizer, periods_of
from nestlearn.optim.m3 import M3
from nestlearn.optim.matrices import matrix_groups
from nestlearn.optim.momentum import FeatureMomentum, Momentum, PreconditionedMomentum
from nestlearn.optim.muon import Muon
from nestlearn.optim.orthogonal import descend_to_orthogonal, newton_schulz

__all__ = [
    "DGD",
    "GGD",
    "M3",
    "DeepMomentum",
    "DeltaMomentum",
    "FeatureMomentum",
    "GeneralizedMomentum",
    "LevelwiseOptimizer",
    "MemoryOptimizer",
    "Momentum",
    "Muon",
    "NotFiniteGradient",
    "PreconditionedMomentum",
    "as_memory",
    "descend_to_orthogonal",
    "matrix_groups",
    "newton_schulz",
    "periods_of",
]
