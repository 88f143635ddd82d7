"""Layers that map (B, T, D) to (B, T, D), state in, state out."""

from nestlearn.nn.attention import AttentionState, CausalAttention
from nestlearn.nn.continuum import ContinuumLevel, ContinuumMemory, ContinuumState, LevelUpdate, continuum_periods
from nestlearn.nn.convolution import CausalConv
from nestlearn.nn.mixer import MemoryMixer, MemoryState, step_sizes
from nestlearn.nn.titans import SelfReferentialTitans
from nestlearn.nn.zoo import DESIGNS, Design, MemoryLayer

__all__ = [
    "DESIGNS",
    "AttentionState",
    "CausalAttention",
    "CausalConv",
    "ContinuumLevel",
    "ContinuumMemory",
    "ContinuumState",
    "Design",
    "LevelUpdate",
    "MemoryLayer",
    "MemoryMixer",
    "MemoryState",
    "SelfReferentialTitans",
    "continuum_periods",
    "step_sizes",
]
