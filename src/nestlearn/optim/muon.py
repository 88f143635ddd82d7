"""Muon (Eq. 42-44): a linear momentum memory whose output is orthogonalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestlearn.optim.base import State, check_all, zeros
from nestlearn.optim.matrices import MatrixOptimizer, adjustment, orthogonalize


class Muon(MatrixOptimizer):
    """Muon (Eq. 42) for a whole model: ``m <- momentum m + (1 - momentum) g``, ``W <- W - lr a sigma(m)``.

    sigma brings all singular values near one; a is the adjustment for the shape. It equals `torch.optim.Muon` at equal
    settings, up to the precision of the products, and takes convolutions, vectors (AdamW) and any dtype as well.

    Args:
        params: parameters, named parameters or groups, see `MatrixOptimizer`; `matrix_groups` makes good ones.
        lr: in units of spectral norm per update.
        momentum: retained fraction of the memory per step.
        nesterov: orthogonalise ``(1 - momentum) g + momentum m`` instead of m.
        weight_decay: decoupled: ``W <- (1 - lr * weight_decay) W`` first.
        orthogonalization: ``"newton-schulz"`` (quintic), or ``"learned"``: gradient descent on Eq. 43 (Eq. 44).
        steps: of the orthogonalisation; by default 5 for Newton-Schulz and 15 for ``"learned"``.
        adjust: ``"original"``, ``"match_rms_adamw"`` or ``"none"``; see `adjustment`.
        adam_lr, adam_betas, adam_eps: of the inner AdamW.
        foreach: orthogonalise matrices of equal shape in one batched product; by default where it is faster.

    Raises:
        UserError: a hyper-parameter is out of range.
        NotFiniteGradient: a gradient is infinite or NaN, by name.

    >>> layer = torch.nn.Linear(2, 2); layer(torch.ones(1, 2)).sum().backward()
    >>> Muon(layer.parameters(), lr=0.02).step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        orthogonalization: str = "newton-schulz",
        steps: int | None = None,
        adjust: str = "original",
        adam_lr: float = 3e-4,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        defaults |= dict(orthogonalization=orthogonalization, steps=steps, adjust=adjust, foreach=foreach)
        defaults |= dict(adam_lr=adam_lr, adam_betas=adam_betas, adam_eps=adam_eps)
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_all(self, group, [("momentum", 0.0, 1.0)])

    def _matrix_memory(self, p: Tensor, group: dict[str, Any]) -> State:
        return {"momentum": zeros(p)}

    def _update_matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]
    ) -> None:
        momentum = group["momentum"]
        stored = [s["momentum"] for s in memories]
        torch._foreach_lerp_(stored, grads, 1 - momentum)
        reads = list(torch._foreach_lerp(grads, stored, momentum)) if group["nesterov"] else stored
        for p, o in zip(params, orthogonalize(reads, group), strict=True):
            p.add_(o.view(p.shape), alpha=-float(group["lr"]) * adjustment(p.shape, group["adjust"]))
