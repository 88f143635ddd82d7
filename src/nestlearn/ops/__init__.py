"""HOW FAST: a self-referential memory along a sequence, as an oracle and in chunk-parallel form (section 8)."""

from nestlearn.ops.chunk import kernel_for, self_modify
from nestlearn.ops.rule import GATES, MEMORY, PROJECTIONS, Start, WriteRule
from nestlearn.ops.state import CoreState

__all__ = [
    "GATES",
    "MEMORY",
    "PROJECTIONS",
    "CoreState",
    "Start",
    "WriteRule",
    "kernel_for",
    "self_modify",
]
