"""Optimizers as pure steps: from a weight, its gradient and what is remembered of earlier ones to the next of each.

The classes of this package write in place, as PyTorch's do. A level that learns while the outer gradient goes through
its learning (Eq. 71-73) needs the same updates as functions: differentiable in everything, and on any batch of
matrices (..., d_out, d_in), each for itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestlearn.errors import UserError, nearest
from nestlearn.optim.matrices import adjustment
from nestlearn.optim.orthogonal import newton_schulz

Slots = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, Slots, Tensor], tuple[Tensor, Slots]]
"""``(weight, gradient, slots, lr) -> (weight, slots)``; the slots of a fresh weight are ``()``."""

MOMENTUM = 0.9
MAX_ERASE = 0.5
M3_BETAS = (0.9, 0.99, 0.9)
M3_ALPHA, M3_CHUNK = 0.1, 10
TINY = 1e-30


def _norm(g: Tensor) -> Tensor:
    """Frobenius norms (..., 1, 1), with a zero gradient at zero."""
    return (g.square().sum((-2, -1), keepdim=True) + TINY).sqrt()


def sgd(w: Tensor, g: Tensor, slots: Slots, lr: Tensor) -> tuple[Tensor, Slots]:
    """Gradient descent (Eq. 1): ``W - lr g``."""
    return w - lr * g, slots


def delta_momentum(w: Tensor, g: Tensor, slots: Slots, lr: Tensor) -> tuple[Tensor, Slots]:
    """`DeltaMomentum` with its defaults (Eq. 49): ``m <- m (0.9 I - e g^T g) - g``, ``W + lr m``."""
    if not slots:
        slots = (torch.zeros_like(w),)
    (m,) = slots
    e = torch.minimum(lr, MAX_ERASE / (_norm(g) ** 2))
    m = MOMENTUM * m - e * ((m @ g.mT) @ g if w.shape[-2] <= w.shape[-1] else m @ (g.mT @ g)) - g
    return w + lr * m, (m,)


def m3(w: Tensor, g: Tensor, slots: Slots, lr: Tensor) -> tuple[Tensor, Slots]:
    """`M3` with its defaults (Eq. 75, Algorithm 1, with decay and the relative damped denominator).

    Slots: fast momentum, second moment, slow momentum, what the slow one will take in, the orthogonalised slow one,
    and the steps of the chunk that is running, (..., 1, 1).
    """
    beta1, beta2, beta3 = M3_BETAS
    if not slots:
        zero = torch.zeros_like(w)
        slots = (zero, zero, zero, zero, zero, zero[..., :1, :1])
    fast, second, slow, gathered, slow_o, count = slots
    turns = (count > 0) & (count % M3_CHUNK == 0)
    kept = beta3 * slow + (1 - beta3) / M3_CHUNK * gathered
    slow = torch.where(turns, kept, slow)
    # Newton-Schulz of the slow momentum only where a chunk of steps has ended; a mask on a device would wait for it.
    if w.device.type != "cpu" or bool(turns.any()):
        slow_o = torch.where(turns, newton_schulz(slow), slow_o)
    gathered = torch.where(turns, torch.zeros_like(gathered), gathered) + g
    fast = torch.lerp(fast, g, 1 - beta1)
    second = beta2 * second + (1 - beta2) * g.square()
    update = newton_schulz(fast) + M3_ALPHA * slow_o
    root = (second + TINY).sqrt()
    divided = update / (root / (second.mean((-2, -1), keepdim=True) + TINY).sqrt() + 1.0)
    update = divided * (_norm(update) / _norm(divided))
    slots = (fast, second, slow, gathered, slow_o, count % M3_CHUNK + 1)
    return w - lr * adjustment(w.shape[-2:], "original") * update, slots


STEPS: dict[str, Step] = {"sgd": sgd, "dgd": sgd, "delta-momentum": delta_momentum, "m3": m3}
"""By the name of the rule. Delta gradient descent (Eq. 57) is the SGD step on the error to which the weight's own
output has been added: ``W (I - lr k k^T) - lr e k^T = W - lr (e + W k) k^T``; who makes the errors adds it."""
SLOTS = {"sgd": 0, "dgd": 0, "delta-momentum": 1, "m3": 6}
"""How many slots a weight has after its first step."""


def get(name: str) -> Step:
    """The step called ``name``.

    Raises:
        UserError: no rule has that name.

    >>> get("sgd")(torch.ones(1, 1), torch.ones(1, 1), (), torch.tensor(0.5))
    (tensor([[0.5000]]), ())
    """
    if name not in STEPS:
        raise UserError(f"unknown rule {name!r} of a level: {nearest(str(name), STEPS)}")
    return STEPS[name]
