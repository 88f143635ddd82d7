"""What is the linear memories' own in a run of the kernels: which they are, how a state is packed, sizes of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestlearn.ops.linear import LinearKernel, Packed
from nestlearn.ops.rule import REACH
from nestlearn.ops.triton.linear_backward import backward_room, linear_backward
from nestlearn.ops.triton.linear_forward import forward_room, linear_forward
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

    def scratch(self, programs: int, like: Tensor, forward: bool) -> Tensor:
        """Where a kernel keeps what it does not return: the tiles of every program."""
        sizes = tile(self.kernel.rule.chunk_size), tile(self.kernel.width)
        return like.new_empty(programs, (forward_room if forward else backward_room)(*sizes))

    def tiles(self, dtype: torch.dtype) -> dict[str, Any]:
        """What both kernels are compiled for; ``dtype`` is the precision of the inputs."""
        return tile_sizes(self.kernel.rule.chunk_size, self.kernel.width, dtype)


def tile_sizes(chunk: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """From tokens of a chunk, channels of a head, and the precision of the inputs.

    A product takes its operands by blocks: of float32 inputs they are held in registers, of bfloat16 in shared memory,
    and a wider one spilled more.
    """
    c, d = tile(chunk), tile(width)
    return {"D": d, "BLOCK": 16 if dtype == torch.float32 else 32, "num_warps": 4 if max(c, d) <= 32 else 8}
