"""How often the outer optimizer updates each level of a model's continuum memories (Eq. 71)."""

from __future__ import annotations

from torch import nn

from nestlearn.errors import UserError
from nestlearn.nn.continuum.level import ContinuumLevel


def continuum_periods(model: nn.Module, tokens_per_step: int) -> dict[nn.Parameter, int]:
    """For `nestlearn.optim.LevelwiseOptimizer`: steps between two updates of the parameters of each level.

    Args:
        model: any module that contains `ContinuumMemory` layers.
        tokens_per_step: tokens that an optimizer step has seen, all rows and accumulated passes together. A level whose
            chunk is shorter is updated at every step; others at the nearest whole number of steps.

    Raises:
        UserError: the model has no levels, or ``tokens_per_step`` is not positive.

    >>> from nestlearn.nn import ContinuumMemory
    >>> sorted(set(continuum_periods(ContinuumMemory(4, [64, 512, 4096]), tokens_per_step=128).values()))
    [1, 4, 32]
    """
    if tokens_per_step < 1:
        raise UserError(f"tokens_per_step={tokens_per_step}: it must be 1 or more")
    levels = [module for module in model.modules() if isinstance(module, ContinuumLevel)]
    if not levels:
        raise UserError("the model has no ContinuumMemory: name the levels with nestlearn.optim.periods_of")
    return {p: max(1, round(level.chunk_size / tokens_per_step)) for level in levels for p in level.parameters()}
