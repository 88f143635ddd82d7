"""Cross entropy whose gradient takes the place of the logits, for a text that is learned as it is read.

The logits of a window are the largest tensor of a step: 512 tokens of 49,152 words are 100 MB. PyTorch's own cross
entropy makes two more of that size, their logarithms of probability and the gradient, and on a CPU it takes up to six
times as long. Here a piece that fits the processor's cache becomes its gradient at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NOTHING = -100
"""The target where no token is predicted."""
PIECE = 2**19  # logits that are worked on at a time, in the cache of one core


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        values, wanted = logits.detach(), ctx.needs_input_grad[0]
        rows = max(1, PIECE // logits.shape[-1])
        losses = torch.empty(len(targets), dtype=logits.dtype, device=logits.device)
        for start in range(0, len(targets), rows):
            part, answers = values[start : start + rows], targets[start : start + rows, None].clamp(min=0)
            part = part if wanted else part.clone()
            largest = part.amax(-1, keepdim=True)
            answer = part.gather(-1, answers) - largest
            total = part.sub_(largest).exp_().sum(-1, keepdim=True)
            losses[start : start + rows] = (total.log() - answer)[:, 0]
            if wanted:
                part.mul_(total.reciprocal()).scatter_add_(-1, answers, torch.full_like(answer, -1))
        nothing = targets == NOTHING
        losses[nothing] = 0
        if wanted:
            values[nothing] = 0
            ctx.save_for_backward(values)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient if bool((above == 1).all()) else gradient * above[:, None]), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every token in nats, (N,), zero where the target is `NOTHING`.

    Args:
        logits: (N, V), in fp32 or fp64. Where a gradient is taken for them they are OVERWRITTEN by it: give logits
            that nothing else reads.
        targets: (N,) int64, from 0 to V - 1 or `NOTHING`.

    Raises:
        RuntimeError: in the backward pass, if something before had saved the logits for its own gradient; and where
            a gradient of the gradient is asked for.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, NOTHING]))
    tensor([1.3863, 0.0000])
    """
    return _CrossEntropy.apply(logits, targets)
