"""What is the MLP memories' own in a run of the kernels: which they are, how a state is packed, sizes of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestlearn.ops.mlp import MLPKernel, Packed
from nestlearn.ops.rule import MEMORY
from nestlearn.ops.triton.mlp_backward import mlp_backward
from nestlearn.ops.triton.mlp_forward import mlp_forward
from nestlearn.ops.triton.mlp_tiles import SLOTS
from nestlearn.ops.triton.support import tile


@dataclass(frozen=True)
class MLPLaunch:
    """Five MLP memories. A state is one row a head, (..., S): all W2, then the W1 of the gates, then the others."""

    forward: ClassVar[Any] = mlp_forward
    backward: ClassVar[Any] = mlp_backward
    kernel: MLPKernel

    def flat(self, packed: Packed) -> Tensor:
        """Packed weights as one tensor."""
        w2, wide, gates = packed
        return torch.cat([w2.flatten(-2), gates.flatten(-3), wide.flatten(-3)], -1)

    def packed(self, flat: Tensor) -> Packed:
        """The other way."""
        d, hidden = self.sizes()
        w2, gates, wide = flat.split([5 * hidden * d, 2 * hidden, 3 * d * hidden], -1)
        return w2.unflatten(-1, (-1, d)), wide.unflatten(-1, (3, d, hidden)), gates.unflatten(-1, (2, 1, hidden))

    def of_heads(self) -> tuple[Tensor, ...]:
        """What the kernels read of every head besides: nothing."""
        return ()

    def sizes(self) -> tuple[int, ...]:
        """Channels of a head, and hidden ones."""
        hidden, d = self.kernel.start.weights[MEMORY][1].shape[-2:]
        return d, hidden

    def numbers(self) -> tuple[float, ...]:
        """What the kernels take last: nothing."""
        return ()

    def scratch(self, programs: int, like: Tensor, forward: bool) -> Tensor:
        """Where a kernel keeps what it does not return: room for tiles of tokens, of every program."""
        tokens, widest = tile(self.kernel.rule.chunk_size), max(map(tile, (self.kernel.rule.chunk_size, *self.sizes())))
        return like.new_empty(programs, SLOTS.value, tokens * widest)

    def tiles(self, dtype: torch.dtype) -> dict[str, Any]:
        """What both kernels are compiled for; ``dtype`` is the precision of the inputs."""
        width, hidden = map(tile, self.sizes())
        return {"D": width, "E": hidden, "num_warps": 4 if max(width, hidden) <= 32 else 8}
