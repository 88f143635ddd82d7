"""Momentum with an objective of its own (Eq. 35-37, and "GM" of appendix C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.memory import objectives
from nestlearn.memory.objectives import Objective
from nestlearn.optim import momentum as plain
from nestlearn.optim.base import State, check_all, zeros
from nestlearn.optim.descent import Samples
from nestlearn.optim.inputs import Grams, LayerOptimizer, Pairs, grouped


class GeneralizedMomentum(LayerOptimizer):
    """Generalised momentum (Eq. 35-37): the momentum of a weight is a memory from its inputs to its surprise.

    The memory m (o, k) answers the layer's input x_b with an estimate of -dL/dy_b. One step writes
    ``m <- momentum * m - mean_b error(e * m x_b, -delta_b) x_b^T`` with delta_b = dL_b/dy_b, where error is the
    derivative of the objective; then ``W <- W + lr * m``. Keys and values are given by the level below, so nothing is
    self-generated.

    - ``"dot"``: ``m <- momentum * m - grad``, which is `Momentum`.
    - ``"l2"``: ``m <- m (momentum I - e G) - grad`` with ``G = mean_b x_b x_b^T``: the memory forgets what it answers
      to the present inputs, then stores. It needs only G, as `DGD` does.
    - any other `nestlearn.memory.objectives.Objective`: the rows are kept until the step, as `GGD` does.

    As in `Momentum`, m is in units of gradients and ``lr`` stands in front of the read. In the paper's units the
    memory is ``lr * m`` and the step is ``e = lr``. Here ``e = min(lr, 1 / mean_b ||x_b||^2)``: ``1 / trace(G)`` is the
    spectral bound under which no direction of m is erased by more than itself, however large the inputs are.

    Rows and keys are as for `DGD`; an embedding has them with ``"l2"`` only. Every other parameter follows ``"dot"``.

    Args:
        model: the module to train. Its layers are watched by forward hooks, see `close`.
        lr: step size, in units of the parameter per unit of gradient.
        momentum: retained fraction of the memory per step; 1 keeps everything.
        objective: ``"dot"``, ``"l2"`` or a `nestlearn.memory.objectives.Objective`.
        weight_decay: decoupled, ``W <- (1 - lr * weight_decay) W`` first.

    Raises:
        UserError: a hyper-parameter is out of range, or ``model`` is not a module.
        NotFiniteGradient: a gradient is infinite or NaN, by name.

    >>> layer = torch.nn.Linear(2, 1); optimizer = GeneralizedMomentum(layer, lr=0.1)
    >>> layer(torch.ones(1, 2)).sum().backward(); optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        momentum: float = 0.9,
        objective: str | Objective = "l2",
        *,
        weight_decay: float = 0.0,
    ) -> None:
        self._objective = objectives.get(objective) if isinstance(objective, str) else objective
        super().__init__(model, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def _watch(self, model: nn.Module) -> Grams | Pairs | None:
        if self._objective == objectives.l2:
            return Grams(model)
        if self._objective == objectives.dot_product:  # needs nothing but the gradient
            return None
        return Pairs(model)

    def _check(self, group: dict[str, Any]) -> None:
        check_all(self, group, [("momentum", 0.0, 1.0)])

    def _memory(self, p: Tensor, group: dict[str, Any]) -> State:
        return {"momentum": zeros(p)}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        lr = float(group["lr"])
        written = [
            self._gradient(p, g, state["momentum"], lr).reshape(p.shape)
            for p, g, state in zip(params, grads, memories, strict=True)
        ]
        plain.write({**group, "output": "identity"}, params, written, memories)

    def _gradient(self, p: Tensor, g: Tensor, negative: Tensor, lr: float) -> Tensor:
        """The gradient of the mean objective at m, in units of the loss gradient. ``negative`` is -m, the state."""
        if isinstance(self._inputs, Grams) and (moment := self._inputs.mean(p)) is not None:
            groups = self._inputs.kinds[p][1]
            negative, g = grouped(negative, groups), grouped(g, groups)
            if moment.ndim == 1:
                return g - _step(lr, moment.sum()) * moment[:, None] * negative
            return g - _step(lr, moment.diagonal(dim1=-2, dim2=-1).sum(-1)) * (negative @ moment)
        if isinstance(self._inputs, Pairs) and (samples := Samples(self._inputs, p, g)).rows:
            read = -_step(lr, samples.trace()) * grouped(negative, samples.groups)
            return samples.gradient(read, self._objective, lambda x, delta: -delta)
        return g


def _step(lr: float, trace: Tensor) -> Tensor:
    """``min(lr, 1 / trace)``, with a zero trace allowed: (...) -> (..., 1, 1), or a number for a number."""
    e = (1 / trace.clamp(min=torch.finfo(trace.dtype).tiny)).clamp(max=lr)
    return e[..., None, None] if e.ndim else e
