"""Momentum as an associative memory of gradients: Eq. 33, 47 and 51.

One gradient step on ``<m, P phi(g)>`` with a ridge: ``m <- momentum * m - P phi(g)``, then ``W <- W + lr * sigma(m)``.
The paper keeps the step size inside the memory; here it stands in front of the read, as in `torch.optim.SGD`, so that
a learning-rate schedule acts at once. At a constant rate both are the same numbers. The state is ``-m``, the gradient's
own sign, also as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.optim import outputs, preconditioner
from nestlearn.optim.base import MemoryOptimizer, State, by_step, check_all, sweep, zeros
from nestlearn.optim.outputs import Output
from nestlearn.optim.preconditioner import Preconditioner


class Momentum(MemoryOptimizer):
    """Momentum (Eq. 33-34): ``m <- momentum * m - g``, ``W <- W + lr * sigma(m)``.

    With the identity output it is `torch.optim.SGD` with that momentum.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: step size, in units of the parameter per unit of gradient (per unit of output, with another output).
        momentum: retained fraction of the memory per step; 1 keeps everything.
        output: sigma of Eq. 52: ``"identity"``, ``"sign"``, ``"tanh"``, ``"orthogonal"`` or a function of a tensor.
        weight_decay: decoupled: ``W <- (1 - lr * weight_decay) W`` first.

    Raises:
        UserError: a hyper-parameter is out of range.
        NotFiniteGradient: a gradient is infinite or NaN, by name.

    >>> layer = torch.nn.Linear(2, 1); layer(torch.ones(1, 2)).sum().backward()
    >>> Momentum(layer.parameters(), lr=0.1).step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.9,
        *,
        output: str | Output = "identity",
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, output=output, weight_decay=weight_decay))

    def _check(self, group: dict[str, Any]) -> None:
        check_all(self, group, [("momentum", 0.0, 1.0)])
        outputs.check(group["output"])

    def _memory(self, p: Tensor, group: dict[str, Any]) -> State:
        return {"momentum": zeros(p)}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        write(group, params, grads, memories)


class PreconditionedMomentum(Momentum):
    """Value-ful momentum (Eq. 46-47): ``m <- momentum * m - P g``, each gradient stored with its own value P.

    Args:
        params, lr, momentum, output, weight_decay: see `Momentum`.
        preconditioner: ``"diagonal"``, the inverse root of a running mean of squares, so that ``lr`` is in units of
            the parameter per step as for Adam; or a function from g to P g of its shape; ``None`` is P = 1.
        beta2: retained fraction of the mean of squares per step.
        eps: added to the root, in units of the gradient.

    >>> layer = torch.nn.Linear(2, 1); layer(torch.ones(1, 2)).sum().backward()
    >>> PreconditionedMomentum(layer.parameters(), lr=1e-3).step()
    """

    _squares = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        momentum: float = 0.9,
        *,
        preconditioner: Preconditioner = "diagonal",
        beta2: float = 0.99,
        eps: float = 1e-8,
        output: str | Output = "identity",
        weight_decay: float = 0.0,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, output=output, weight_decay=weight_decay)
        MemoryOptimizer.__init__(
            self, params, {**defaults, "preconditioner": preconditioner, "beta2": beta2, "eps": eps}
        )

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        preconditioner.check(group["preconditioner"])
        check_all(self, group, [("beta2", 0.0, 1.0), ("eps", 0.0, 1.0)])

    def _memory(self, p: Tensor, group: dict[str, Any]) -> State:
        return {**super()._memory(p, group), **preconditioner.memory(p, group["preconditioner"])}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        write(group, params, grads, memories)


def cubic(g: Tensor, largest: Tensor | None = None) -> Tensor:
    """``g (1 + (g / largest)^2) / 2``: odd features up to order three that keep sign and scale of the gradient.

    ``largest`` is the largest absolute element, that of ``g`` if it is not given.
    """
    largest = largest_element(g) if largest is None else largest
    return g.mul(math.sqrt(0.5) / largest).square_().add_(0.5).mul_(g)


def largest_element(g: Tensor) -> Tensor:
    """The largest absolute element, and instead of zero a tiny number whose square can be divided by."""
    low, high = torch.aminmax(g)
    return torch.maximum(high, -low).clamp(min=1e-18)


class FeatureMomentum(PreconditionedMomentum):
    """Momentum with higher-order keys (Eq. 51): ``m <- momentum * m - P phi(g)``.

    Args:
        params, lr, momentum, output, weight_decay: see `Momentum`.
        feature: phi, from a gradient to features of its shape: ``"cubic"`` (large elements count up to twice as
            much), or a function.
        preconditioner, beta2, eps: see `PreconditionedMomentum`; by default P = 1.

    >>> layer = torch.nn.Linear(2, 1); layer(torch.ones(1, 2)).sum().backward()
    >>> FeatureMomentum(layer.parameters(), lr=0.01, feature=lambda g: g.sign() * g.abs().sqrt()).step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.9,
        *,
        feature: str | Callable[[Tensor], Tensor] = "cubic",
        preconditioner: Preconditioner = None,
        beta2: float = 0.99,
        eps: float = 1e-8,
        output: str | Output = "identity",
        weight_decay: float = 0.0,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, output=output, weight_decay=weight_decay, feature=feature)
        MemoryOptimizer.__init__(
            self, params, {**defaults, "preconditioner": preconditioner, "beta2": beta2, "eps": eps}
        )

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        feature = group["feature"]
        if not callable(feature) and feature != "cubic":
            raise UserError(f"unknown feature {feature!r}: give 'cubic' or a function from g to features of its shape")

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        if callable(group["feature"]):
            write(group, params, [group["feature"](g) for g in grads], memories)
            return
        for p, g, state in zip(params, grads, memories, strict=True):
            largest = largest_element(g)
            write(group, [p], [g], [state], lambda pieces, largest=largest: [cubic(piece, largest) for piece in pieces])


Lists = list[Tensor]


def write(
    group: dict[str, Any],
    params: Lists,
    grads: Lists,
    memories: list[State],
    phi: Callable[[Lists], Lists] | None = None,
    forget: Callable[[Lists, Lists], None] | None = None,
) -> None:
    """``m <- momentum * m - P phi(g)`` and ``W <- W + lr * sigma(m)``, in place and, where possible, in one sweep.

    ``phi`` and ``forget(m, g)``, which takes the place of ``momentum * m``, work element by element on lists.
    """
    values, p_of_g = grads, group.get("preconditioner")
    diagonal, at_once = p_of_g == "diagonal", group["output"] == "identity"  # other outputs may need a whole tensor
    if callable(p_of_g):
        values, phi = [p_of_g(value) for value in (phi(grads) if phi else grads)], None
    for t, at in by_step(memories) if diagonal else [(0, range(len(params)))]:
        columns = [[column[i] for i in at] for column in (params, grads, values)]
        names = ["momentum", *([preconditioner.SECOND] if diagonal else [])]
        columns += [[memories[i][name] for i in at] for name in names]
        for p, g, value, m, *second in sweep(*columns):
            if phi:
                value = phi(value)
            if diagonal:
                value = preconditioner.diagonal(group, t, value, *second)
            if forget:
                forget(m, g)
                torch._foreach_add_(m, value)
            elif m[0].is_cpu:  # one pass instead of two
                torch.add(value[0], m[0], alpha=group["momentum"], out=m[0])
            else:
                torch._foreach_mul_(m, group["momentum"])
                torch._foreach_add_(m, value)
            if at_once:
                outputs.read_into(p, m, float(group["lr"]), "identity")
    if not at_once:
        outputs.read_into(params, [s["momentum"] for s in memories], float(group["lr"]), group["output"])
