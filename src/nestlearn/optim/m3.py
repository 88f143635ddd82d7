"""M3, the multi-scale momentum Muon (Eq. 75, Algorithm 1): two momenta at two frequencies, both orthogonalised."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError, nearest
from nestlearn.optim.base import State, by_step, check_all, is_number, sweep, zeros
from nestlearn.optim.matrices import MatrixOptimizer, adjustment, orthogonalize

MODES = ("ema", "paper")
DENOMINATORS = ("relative", "paper", "none")


class M3(MatrixOptimizer):
    """M3 (Eq. 75, Algorithm 1) for a whole model::

        at the start of every chunk but the first:  M2 <- beta3 M2 + (1 - beta3) mean of the chunk's g;  O2 = sigma(M2)
        M1 <- beta1 M1 + (1 - beta1) g              V <- beta2 V + (1 - beta2) g^2
        W <- W - lr a (sigma(M1) + alpha O2) / denominator

    sigma is Newton-Schulz; a is the adjustment for the shape. Two departures from the print, both with the print as an
    option. ``mode="ema"`` decays the memories: the printed sums never forget. ``denom``: the print divides by
    ``sqrt(V)``, so a step that Newton-Schulz has made free of the gradient's scale becomes proportional to its inverse
    (a loss times 100 makes the step 100 times smaller); ``"relative"`` keeps the ratios between the elements and gives
    the update the size that it had before the division.

    Args:
        params: parameters, named parameters or groups, see `MatrixOptimizer`; `matrix_groups` makes good ones.
        lr: in units of spectral norm per update (``denom="paper"``: times the gradient's unit).
        betas: retained fractions: of the fast momentum per step, of the second moment per step, of the slow momentum
            per chunk.
        alpha: weight of the slow momentum beside the fast one.
        chunk_size: steps between two updates of the slow momentum.
        mode: ``"ema"``, or ``"paper"``: ``M + beta g`` as printed.
        denom: ``"relative"``, ``"paper"`` (``sqrt(V) + eps``) or ``"none"``, which keeps no second moment.
        eps: added to the denominator: ``"paper"``, in units of the gradient, by default 1e-8; ``"relative"``, in units
            of the root mean square of the denominator, by default 1: without it a few elements of rare gradient take
            the whole update.
        weight_decay, orthogonalization, steps, adjust, adam_lr, adam_betas, adam_eps, foreach: see `Muon`. ``steps=0``
            turns the orthogonalisation off.

    Raises:
        UserError: a hyper-parameter is out of range.
        NotFiniteGradient: a gradient is infinite or NaN, by name.

    >>> layer = torch.nn.Linear(2, 2); layer(torch.ones(1, 2)).sum().backward()
    >>> M3(layer.parameters(), lr=0.02).step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        *,
        betas: tuple[float, float, float] = (0.9, 0.99, 0.9),
        alpha: float = 0.1,
        chunk_size: int = 10,
        mode: str = "ema",
        denom: str = "relative",
        eps: float | None = None,
        weight_decay: float = 0.0,
        orthogonalization: str = "newton-schulz",
        steps: int | None = None,
        adjust: str = "original",
        adam_lr: float = 3e-4,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        foreach: bool | None = None,
    ) -> None:
        eps = eps if eps is not None else 1.0 if denom == "relative" else 1e-8
        defaults = dict(lr=lr, betas=betas, alpha=alpha, chunk_size=chunk_size, mode=mode, denom=denom, eps=eps)
        defaults |= dict(orthogonalization=orthogonalization, steps=steps, adjust=adjust, foreach=foreach)
        defaults |= dict(weight_decay=weight_decay, adam_lr=adam_lr, adam_betas=adam_betas, adam_eps=adam_eps)
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_all(
            self, group, [("alpha", 0.0, math.inf), *([("eps", 0.0, math.inf)] if group["eps"] is not None else [])]
        )
        betas, chunk_size = group["betas"], group["chunk_size"]
        three = isinstance(betas, tuple | list) and len(betas) == 3
        if not three or not all(is_number(beta) and 0.0 <= beta <= 1.0 for beta in betas):
            raise UserError(
                f"M3 got betas={betas!r}: give three fractions, of fast momentum, second moment, slow momentum"
            )
        if type(chunk_size) is not int or chunk_size < 1:
            raise UserError(f"M3 got chunk_size={chunk_size!r}: it must be a whole number of steps, 1 or more")
        for name, allowed in (("mode", MODES), ("denom", DENOMINATORS)):
            if group[name] not in allowed:
                raise UserError(f"unknown {name} {group[name]!r} of M3: {nearest(str(group[name]), allowed)}")

    def _matrix_memory(self, p: Tensor, group: dict[str, Any]) -> State:
        names = ["fast", "slow", "slow_orthogonal", *([] if group["denom"] == "none" else ["second_moment"])]
        return {"step": torch.tensor(0.0), **{name: zeros(p) for name in names}}

    def _update_matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]
    ) -> None:
        for t, at in by_step(memories):
            self._update_batch(group, t, [params[i] for i in at], [grads[i] for i in at], [memories[i] for i in at])

    def _update_batch(
        self, group: dict[str, Any], t: int, params: list[Tensor], grads: list[Tensor], memories: list[State]
    ) -> None:
        """One step, the t-th (from 1), of matrices that have seen as many gradients."""
        (beta1, beta2, beta3), ema, chunk = group["betas"], group["mode"] == "ema", group["chunk_size"]
        fast, slow, slow_o = ([s[name] for s in memories] for name in ("fast", "slow", "slow_orthogonal"))
        if t > 1 and (t - 1) % chunk == 0:
            for kept, o in zip(slow_o, _orthogonal(slow, group), strict=True):
                kept.copy_(o.view(kept.shape))
        if ema and (t - 1) % chunk == 0:
            torch._foreach_mul_(slow, beta3)  # between its reads the slow memory itself gathers the chunk's gradients
        for g, m1, m2 in sweep(grads, fast, slow):
            if ema:
                torch._foreach_lerp_(m1, g, 1 - beta1)
                torch._foreach_add_(m2, g, alpha=(1 - beta3) / chunk)
            else:
                torch._foreach_add_(m1, g, alpha=beta1)
                torch._foreach_add_(m2, g, alpha=beta3)
        updates = [o.reshape(p.shape) for o, p in zip(_orthogonal(fast, group), params, strict=True)]
        if group["alpha"] and t > chunk:
            updates = list(torch._foreach_add(updates, slow_o, alpha=group["alpha"]))
        if group["denom"] != "none":
            second = [s["second_moment"] for s in memories]
            for g, v in sweep(grads, second):
                if ema:
                    torch._foreach_mul_(v, beta2)
                torch._foreach_addcmul_(v, g, g, value=1 - beta2 if ema else beta2)
            updates = [self._divide(u, v, group) for u, v in zip(updates, second, strict=True)]
        for p, u in zip(params, updates, strict=True):
            p.add_(u, alpha=-float(group["lr"]) * adjustment(p.shape, group["adjust"]))

    def _divide(self, update: Tensor, second_moment: Tensor, group: dict[str, Any]) -> Tensor:
        root = second_moment.sqrt()
        if group["denom"] == "paper":
            return update / (root + group["eps"])
        tiny = torch.finfo(update.dtype).tiny
        mean = second_moment.mean().sqrt().clamp(min=tiny)
        divided = update / (root / mean + group["eps"])
        return divided * (update.norm() / divided.norm().clamp(min=tiny))


def _orthogonal(memories: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Their orthogonal factors, or, with ``steps=0``, the memories as they are."""
    return list(memories) if group["steps"] == 0 else orthogonalize(memories, group)
