"""What a continuum memory carries along a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestlearn.memory.structures import Weights
from nestlearn.nn.continuum.update import Slots


@dataclass(frozen=True)
class LevelState:
    """One level's weights and what it has gathered since its last update; everything is per row.

    Args:
        weights: (B, o, i) each; (o, i) as long as no row has been updated.
        error: the error summed since the last update, (B, o, i), or () before the first token.
        slots: what the rule remembers of earlier updates, for each weight.
        start, start_error, start_slots: of the nested variant, the state to which this level is re-initialised, which
            is a parameter of the next slower level, and that level's error and slots for it; else empty.
        last: what the level read of the last token, (B, D); None before the first (local objective).
    """

    weights: Weights
    error: Weights = ()
    slots: Slots = ()
    start: Weights = ()
    start_error: Weights = ()
    start_slots: Slots = ()
    last: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LevelState:
        """Apply ``function`` to every tensor that has rows."""
        rows = lambda w: function(w) if w.ndim == 3 else w  # noqa: E731
        every = lambda ws: tuple(rows(w) for w in ws)  # noqa: E731
        return LevelState(
            every(self.weights),
            every(self.error),
            tuple(every(s) for s in self.slots),
            every(self.start),
            every(self.start_error),
            tuple(every(s) for s in self.start_slots),
            None if self.last is None else function(self.last),
        )


@dataclass(frozen=True)
class ContinuumState:
    """The levels, fast to slow, and the tokens that each row has seen, ``clock`` (B,) int64 on the CPU.

    ``erasure``: of levels that learn by DGD from the next-token loss, ``W sum_t k_t k_t^T`` of the last call, for each
    weight; () for the other levels.
    """

    levels: tuple[LevelState, ...]
    clock: Tensor
    erasure: tuple[Weights, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> ContinuumState:
        """Apply ``function`` to every tensor that has rows, the clock included."""
        erasure = tuple(tuple(function(w) for w in ws) for ws in self.erasure)
        return ContinuumState(tuple(level.map(function) for level in self.levels), function(self.clock), erasure)

    def index_select(self, rows: Tensor) -> ContinuumState:
        """The state of the sequences ``rows`` (int64), in that order; a row may repeat."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def detach(self) -> ContinuumState:
        """The state cut from the graph that made it, weights that rows still share included."""
        cut = self.map(lambda t: t.detach())
        shared = [tuple(w.detach() for w in level.weights) for level in cut.levels]
        starts = [tuple(w.detach() for w in level.start) for level in cut.levels]
        levels = tuple(
            replace(level, weights=ws, start=st) for level, ws, st in zip(cut.levels, shared, starts, strict=True)
        )
        return replace(cut, levels=levels)


def choose(due: bool | Tensor, new: Any, old: Any) -> Any:
    """``new`` in the rows where ``due``, else ``old``; over nested tuples of tensors (B, ...) or shared (o, i)."""
    if due is True:
        return new
    if due is False:
        return old
    if isinstance(new, tuple):
        olds = old or tuple(() if isinstance(n, tuple) else torch.zeros_like(n) for n in new)
        return tuple(choose(due, n, o) for n, o in zip(new, olds, strict=True))
    return torch.where(due.to(new.device).view(-1, *[1] * (new.ndim - 1)), new, old)
