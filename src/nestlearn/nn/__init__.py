"""Layers that map (B, T, D) to (B, T, D), state in, state out."""

from nestlearn.nn.attention import AttentionState, CausalAttention
from nestlearn.nn.continuum import ContinuumLevel, ContinuumMemory, ContinuumState, LevelUpdate, continuum_periods
from nestlearn.nn.convolution import CausalConv
from nestlearn.nn.titans import SelfReferentialTitans, TitansState

__all__ = [
    "AttentionState",
    "CausalAttention",
    "CausalConv",
    "ContinuumLevel",
    "ContinuumMemory",
    "ContinuumState",
    "LevelUpdate",
    "SelfReferentialTitans",
    "TitansState",
    "continuum_periods",
]
