"""WHEN: any model as a nested system of memories, each updated at its own frequency (sections 2 and 3)."""

from nestlearn.levels.describe import Description, describe
from nestlearn.levels.frequency import FROZEN, NON_PARAMETRIC, UpdateFrequency
from nestlearn.levels.system import Box, Level, NestedSystem, Transfer
from nestlearn.levels.transfer import adapt, descend, direct, generate_weights, initialisation

__all__ = [
    "FROZEN",
    "NON_PARAMETRIC",
    "Box",
    "Description",
    "Level",
    "NestedSystem",
    "Transfer",
    "UpdateFrequency",
    "adapt",
    "descend",
    "describe",
    "direct",
    "generate_weights",
    "initialisation",
]
