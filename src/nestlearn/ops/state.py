"""What a core carries from one piece of a sequence to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CoreState:
    """The weights of every memory, per sequence, packed as ``ops.linear`` or ``ops.mlp`` keep them.

    Args:
        current: weights after the last token, leading dimensions (B, H).
        anchor: weights at the end of the previous chunk, which generate and are differentiated.
        momentum: what the inner update carries: its momentum, or the last pairs of the Omega rule, keys and values;
            an empty tuple without either.
        clock: tokens seen by each row, (B,) int64 on the CPU: where its chunks end.
    """

    current: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    clock: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> CoreState:
        """Apply ``function`` to every tensor."""
        groups = (tuple(function(t) for t in g) for g in (self.current, self.anchor, self.momentum))
        return CoreState(*groups, clock=function(self.clock))

    def index_select(self, rows: Tensor) -> CoreState:
        """The state of the sequences ``rows`` (int64), in that order; a row may repeat."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def detach(self) -> CoreState:
        """The state cut from the graph that made it."""
        return self.map(lambda t: t.detach())
