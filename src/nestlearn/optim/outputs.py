"""How a momentum memory is read into an update (Eq. 52): ``W <- W + lr * sigma(m)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestlearn.errors import UserError, nearest
from nestlearn.optim.base import as_matrix
from nestlearn.optim.orthogonal import newton_schulz

Output = Callable[[Tensor], Tensor]


def _orthogonal(m: Tensor) -> Tensor:
    return newton_schulz(as_matrix(m)).reshape(m.shape)


BY_NAME: dict[str, Output | None] = {
    "identity": None,  # the memory itself, without a copy
    "sign": torch.sign,
    "tanh": torch.tanh,
    "orthogonal": _orthogonal,
}


def check(output: str | Output) -> None:
    """Raise `UserError` if no output has that name."""
    if not callable(output) and output not in BY_NAME:
        raise UserError(f"unknown output {output!r}: {nearest(str(output), BY_NAME)}, or a function of a tensor")


def read_into(params: list[Tensor], negative: list[Tensor], lr: float, output: str | Output) -> None:
    """``W <- W + lr * output(m)`` in place, for lists of W and of -m of equal shapes."""
    sigma = output if callable(output) else BY_NAME[output]
    if sigma is None:
        torch._foreach_add_(params, negative, alpha=-lr)
    else:
        torch._foreach_add_(params, [sigma(-m) for m in negative], alpha=lr)
