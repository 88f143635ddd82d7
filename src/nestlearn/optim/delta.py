"""Delta momentum (Eq. 48-49): a momentum that forgets along the gradient it is about to store."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError, nearest
from nestlearn.optim.base import State, as_matrix, check_all
from nestlearn.optim.momentum import Momentum, PreconditionedMomentum, largest_element, write
from nestlearn.optim.outputs import Output
from nestlearn.optim.preconditioner import Preconditioner

KEYS = ("rows", "whole", "elements")


class DeltaMomentum(PreconditionedMomentum):
    """Delta momentum (Eq. 49): ``m <- m (momentum I - e g^T g) - P g``, ``W <- W + lr * sigma(m)``.

    One gradient step on ``1/2 ||m g^T + P||^2`` (Eq. 48, in units in which the values are -P): the memory first
    forgets what it holds along the present gradient. The erase coefficient is
    ``e = min(erase * lr, max_erase / ||g||_F^2)``; the cap keeps the step stable for any gradient.

    Args:
        params, lr, momentum, output, weight_decay: see `Momentum`.
        erase: coefficient of ``g^T g`` in units of ``lr``: 1 is the print, 0 is `Momentum`, ``math.inf`` always forgets
            the fraction ``max_erase`` along the gradient, whatever its size.
        max_erase: largest fraction of the memory along the gradient that one step forgets; below 2 for stability.
        keys: what is a key. ``"rows"``: the rows of g (d_out, d_in), as printed; costs two matrix products.
            ``"whole"``: g as one row, ``m - e <m, g> g``. ``"elements"``: each number, ``m - e g^2 m``, where
            ``max_erase`` is reached at the largest element. Vectors are one row.
        preconditioner, beta2, eps: see `PreconditionedMomentum`; by default P = 1.

    Raises:
        UserError: a hyper-parameter is out of range.
        NotFiniteGradient: a gradient is infinite or NaN, by name.

    >>> layer = torch.nn.Linear(2, 1); layer(torch.ones(1, 2)).sum().backward()
    >>> DeltaMomentum(layer.parameters(), lr=0.1).step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.9,
        *,
        erase: float = 1.0,
        max_erase: float = 0.5,
        keys: str = "rows",
        preconditioner: Preconditioner = None,
        beta2: float = 0.99,
        eps: float = 1e-8,
        output: str | Output = "identity",
        weight_decay: float = 0.0,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, output=output, weight_decay=weight_decay)
        defaults |= dict(erase=erase, max_erase=max_erase, keys=keys)
        super(Momentum, self).__init__(
            params, {**defaults, "preconditioner": preconditioner, "beta2": beta2, "eps": eps}
        )

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_all(self, group, [("erase", 0.0, math.inf), ("max_erase", 0.0, 2.0)])
        if group["keys"] not in KEYS:
            raise UserError(f"unknown keys {group['keys']!r}: {nearest(str(group['keys']), KEYS)}")

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        kinds = [group["keys"] if p.ndim > 1 or group["keys"] == "elements" else "whole" for p in params]
        for kind, p, g, state in zip(kinds, params, grads, memories, strict=True):
            if kind == "rows":
                forget_rows(state["momentum"], g, group)
                write(group, [p], [g], [state], forget=lambda m, g: None)
            else:
                write(group, [p], [g], [state], forget=elementwise_forget(kind, state["momentum"], g, group))


def coefficient(size: Tensor, group: dict[str, Any]) -> Tensor:
    """``e = min(erase * lr, max_erase / size)`` for a squared norm of the gradient."""
    printed = group["erase"] * float(group["lr"]) if group["erase"] < math.inf else math.inf
    return (group["max_erase"] / size.clamp(min=1e-30)).clamp(max=printed)


def forget_rows(m: Tensor, g: Tensor, group: dict[str, Any]) -> None:
    """``m <- m (momentum I - e g^T g)`` in place, for m and g as matrices (d_out, d_in)."""
    m, g, momentum = as_matrix(m), as_matrix(g), group["momentum"]
    e = coefficient(g.square().sum(), group)
    if m.shape[0] <= m.shape[1]:  # the same product, the short side in the middle
        m.addmm_(e * (m @ g.mT), g, beta=momentum, alpha=-1)
    else:
        m.copy_(torch.addmm(m, m, e * (g.mT @ g), beta=momentum, alpha=-1))


def elementwise_forget(
    keys: str, m: Tensor, g: Tensor, group: dict[str, Any]
) -> Callable[[list[Tensor], list[Tensor]], None]:
    """For `write`: ``m <- momentum m - e <m, g> g`` (``"whole"``) or ``(momentum - e g^2) m`` (``"elements"``)."""
    momentum = group["momentum"]
    if keys == "whole":
        row = g.reshape(-1)
        along = coefficient(torch.dot(row, row), group) * torch.dot(m.reshape(-1), row)
    else:
        e = coefficient(largest_element(g).square(), group)

    def forget(memories: list[Tensor], pieces: list[Tensor]) -> None:
        for memory, piece in zip(memories, pieces, strict=True):
            if keys == "whole":
                memory.mul_(momentum).sub_(along * piece)
            else:
                memory.mul_(piece.square().mul_(-e).add_(momentum))

    return forget
