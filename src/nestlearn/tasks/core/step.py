"""One step of training, as all core tasks take it."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.optim import Optimizer

CLIP = 1.0  # norm of the whole gradient
RISE = 10.0  # of that norm over its running mean
REMEMBERED = 0.98  # of the mean, with each step


class UsualNorm:
    """The running mean of the gradient's norm, and `RISE` times that as a bound besides `CLIP`.

    For long runs at a loss of almost nothing: there a single batch can have a gradient 10,000 times the usual, which
    Adam, whose mean square is as small as the usual one, makes a full step of every weight.

    >>> usual = UsualNorm(); usual.bound
    1.0
    >>> usual.saw(0.01); usual.bound
    0.1
    """

    def __init__(self) -> None:
        self.bound = CLIP
        self._mean: float | None = None

    def saw(self, norm: float) -> None:
        """A step's norm; what was cut off of it does not count."""
        norm = min(norm, self.bound)
        self._mean = norm if self._mean is None else REMEMBERED * self._mean + (1 - REMEMBERED) * norm
        self.bound = min(CLIP, RISE * self._mean)


def descend(network: nn.Module, optimizer: Optimizer, loss: Tensor, lr: float, usual: UsualNorm | None = None) -> bool:
    """Take a step on ``loss`` at the rate ``lr``, the gradient clipped to `CLIP` or to the bound of ``usual``; false,
    and no step, if the gradient is not finite.

    >>> import torch; network = nn.Linear(1, 1, bias=False); optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    >>> before = network.weight.item(); descend(network, optimizer, network(torch.full((1, 1), 5.0)).sum(), lr=0.5)
    True
    >>> round(before - network.weight.item(), 4)
    0.5
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), CLIP if usual is None else usual.bound).item()
    if not math.isfinite(norm):
        return False
    if usual is not None:
        usual.saw(norm)
    optimizer.step()
    optimizer.zero_grad()
    return True
