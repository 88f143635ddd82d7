"""What a memory is asked to achieve: internal objectives of a read-out ``y`` against a value ``v``.

An objective is a scalar per token and its *error*, the derivative with respect to ``y``. The error is the
memory's local surprise signal (Eq. 31); everything that writes to a memory needs only that.

Shapes: ``y`` and ``v`` are (..., d); values are (...), errors (..., d).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nestlearn.errors import UserError, nearest


@dataclass(frozen=True)
class Objective:
    """An internal objective: ``value(y, v)`` and its closed-form derivative ``error(y, v)``."""

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]


# Functions with names, and not lambdas, so that what holds an objective can be pickled.


def _dot_value(y: Tensor, v: Tensor) -> Tensor:
    return -(y * v).sum(-1)


def _dot_error(y: Tensor, v: Tensor) -> Tensor:
    return (-v).expand_as(y)


def _l2_value(y: Tensor, v: Tensor) -> Tensor:
    return 0.5 * (y - v).square().sum(-1)


def _l2_error(y: Tensor, v: Tensor) -> Tensor:
    return y - v


def _lp_value(y: Tensor, v: Tensor, p: float) -> Tensor:
    return (y - v).abs().pow(p).sum(-1) / p


def _lp_error(y: Tensor, v: Tensor, p: float) -> Tensor:
    size = (y - v).abs()
    # At zero, pow has no derivative for p < 2: the outer gradient would be NaN where a memory is exact.
    power = torch.where(size > 0, size, 1.0).pow(p - 1)
    return torch.where(size > 0, (y - v).sign() * power, size)  # zero, or NaN as it came


dot_product = Objective("dot", _dot_value, _dot_error)
"""Dot-product similarity, the objective of Hebbian memories (Eq. 14, 64, 92): ``-<y, v>``."""

l2 = Objective("l2", _l2_value, _l2_error)
"""Regression (Eq. 65, 88, 93) as ``1/2 ||y - v||^2``: the paper's factor 2 is absorbed in the step size."""


def lp(p: float) -> Objective:
    """The Lp objective of Miras (section 5), ``1/p ||y - v||_p^p`` for ``p >= 1``.

    Raises:
        UserError: ``p`` is below 1, where the objective is not convex, or not finite.

    >>> import torch
    >>> lp(3.0).error(torch.tensor([2.0]), torch.tensor([0.0]))
    tensor([4.])
    """
    if not 1 <= p < math.inf:
        raise UserError(f"the Lp objective needs p >= 1, got p={p}: choose 1 (robust) or more")
    return Objective(f"l{p:g}", partial(_lp_value, p=p), partial(_lp_error, p=p))


BY_NAME = {"dot": dot_product, "l2": l2}
POWER = re.compile(r"l(\d+(?:\.\d+)?)")


def get(name: str) -> Objective:
    """The objective called ``name``: ``"dot"``, ``"l2"``, or ``"l"`` and a power, such as ``"l3"`` or ``"l1.5"``.

    Raises:
        UserError: no objective has that name, or the power is below 1.

    >>> get("l1.5").name
    'l1.5'
    """
    if name in BY_NAME:
        return BY_NAME[name]
    if power := POWER.fullmatch(str(name)):
        return lp(float(power[1]))
    raise UserError(f"unknown objective {name!r}: {nearest(name, BY_NAME)}, or l and a power of at least 1, as in l3")
