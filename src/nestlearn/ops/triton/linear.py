"""What is the linear memories' own in a run of the kernels: which they are, how a state is packed, sizes of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestlearn.ops.linear import LinearKernel, Packed
from nestlearn.ops.rule import REACH
from nestlearn.ops.triton.linear_backward import linear_backward
from nestlearn.ops.triton.linear_forward import linear_forward
from nestlearn.ops.triton.support import tile


@dataclass(frozen=True)
class LinearLaunch:
    """Five linear memories, their states (..., R, d) as :class:`LinearKernel` has them."""

    forward: ClassVar[Any] = linear_forward
    backward: ClassVar[Any] = linear_backward
    kernel: LinearKernel

    def flat(self, packed: Packed) -> Tensor:
        """Packed weights as one tensor."""
        return packed[0]

    def packed(self, flat: Tensor) -> Packed:
        """The other way."""
        return (flat,)

    def of_heads(self) -> tuple[Tensor, ...]:
        """What the kernels read of every head besides: which of them accumulate."""
        start = self.kernel.start
        heads = start.bias["eta"].shape[0]
        return (torch.zeros(heads, dtype=torch.bool) if start.accumulates is None else start.accumulates,)

    def sizes(self) -> tuple[int, ...]:
        """Channels of a head."""
        return (self.kernel.width,)

    def numbers(self) -> tuple[float, ...]:
        """What the kernels take last."""
        return (REACH,)

    def scratch(self, programs: int, like: Tensor) -> tuple[Tensor, ...]:
        """Where the kernels keep what they do not return: nowhere."""
        return ()

    def tiles(self) -> dict[str, int]:
        """Tile sizes of the weights, and warps."""
        width = tile(self.kernel.width)
        return {"D": width, "num_warps": 4 if width <= 32 else 8}
