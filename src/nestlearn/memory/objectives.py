"""What a memory is asked to achieve: internal objectives of a read-out ``y`` against a value ``v``.

An objective is a scalar per token and its *error*, the derivative with respect to ``y``. The error is the
memory's local surprise signal (Eq. 31); everything that writes to a memory needs only that.

Shapes: ``y`` and ``v`` are (..., d); values are (...), errors (..., d).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nestlearn.errors import UserError, nearest


@dataclass(frozen=True)
class Objective:
    """An internal objective: ``value(y, v)`` and its closed-form derivative ``error(y, v)``."""

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]


dot_product = Objective(
    "dot",
    value=lambda y, v: -(y * v).sum(-1),
    error=lambda y, v: (-v).expand_as(y),
)
"""Dot-product similarity, the objective of Hebbian memories (Eq. 14, 64, 92): ``-<y, v>``."""

l2 = Objective(
    "l2",
    value=lambda y, v: 0.5 * (y - v).square().sum(-1),
    error=lambda y, v: y - v,
)
"""Regression (Eq. 65, 88, 93) as ``1/2 ||y - v||^2``: the paper's factor 2 is absorbed in the step size."""


def lp(p: float) -> Objective:
    """The Lp objective of Miras (section 5), ``1/p ||y - v||_p^p`` for ``p >= 1``.

    Raises:
        UserError: ``p`` is below 1, where the objective is not convex.

    >>> import torch
    >>> lp(3.0).error(torch.tensor([2.0]), torch.tensor([0.0]))
    tensor([4.])
    """
    if p < 1:
        raise UserError(f"the Lp objective needs p >= 1, got p={p}: choose 1 (robust) or more")
    return Objective(
        f"l{p:g}",
        value=lambda y, v: (y - v).abs().pow(p).sum(-1) / p,
        error=lambda y, v: (y - v).sign() * (y - v).abs().pow(p - 1),
    )


BY_NAME = {"dot": dot_product, "l2": l2}


def get(name: str) -> Objective:
    """The objective called ``name`` (``"dot"`` or ``"l2"``).

    Raises:
        UserError: no objective has that name.
    """
    if name not in BY_NAME:
        raise UserError(f"unknown objective {name!r}: {nearest(name, BY_NAME)}")
    return BY_NAME[name]
