"""One step of training, as all core tasks take it."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.optim import Optimizer

CLIP = 1.0  # norm of the whole gradient


def descend(network: nn.Module, optimizer: Optimizer, loss: Tensor, lr: float) -> bool:
    """Take a step on ``loss`` at the rate ``lr``, the gradient clipped to `CLIP`; false, and no step, if the gradient
    is not finite.

    >>> import torch; network = nn.Linear(1, 1, bias=False); optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    >>> before = network.weight.item(); descend(network, optimizer, network(torch.full((1, 1), 5.0)).sum(), lr=0.5)
    True
    >>> round(before - network.weight.item(), 4)
    0.5
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), CLIP)
    if not math.isfinite(norm.item()):
        return False
    optimizer.step()
    optimizer.zero_grad()
    return True
