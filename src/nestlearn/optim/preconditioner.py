"""The value of a gradient in a momentum memory: ``P g`` of Eq. 46-51, by default ``g`` itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.optim.base import State, zeros

Preconditioner = str | Callable[[Tensor], Tensor] | None
SECOND = "second_moment"


def check(preconditioner: Preconditioner) -> None:
    """Raise `UserError` unless it is ``None``, ``"diagonal"`` or a function."""
    if preconditioner is not None and preconditioner != "diagonal" and not callable(preconditioner):
        raise UserError(
            f"unknown preconditioner {preconditioner!r}: give None, 'diagonal' or a function from g to P g of its shape"
        )


def memory(p: Tensor, preconditioner: Preconditioner) -> State:
    """What the preconditioner remembers of one parameter: ``"diagonal"`` the mean square of each element."""
    return {SECOND: zeros(p), "step": torch.tensor(0.0)} if preconditioner == "diagonal" else {}


def diagonal(group: dict[str, Any], t: int, grads: list[Tensor], second_moments: list[Tensor]) -> list[Tensor]:
    """``P g`` for each gradient, the t-th of its parameter; writes the memory of squares in place.

    That memory takes a step of ``1 - beta2`` on ``1/2 ||v - g^2||^2``, and
    ``P = 1 / (sqrt(v / (1 - beta2^t)) + eps)``, the second memory of Adam (Eq. 101-105).
    """
    torch._foreach_mul_(second_moments, group["beta2"])
    torch._foreach_addcmul_(second_moments, grads, grads, value=1 - group["beta2"])
    root = torch._foreach_div(second_moments, 1 - group["beta2"] ** t)
    torch._foreach_sqrt_(root)
    torch._foreach_add_(root, group["eps"])
    return list(torch._foreach_div(grads, root))
