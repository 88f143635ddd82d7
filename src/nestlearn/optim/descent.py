"""Descent with an objective of its own: delta gradient descent (Eq. 56-57), generalised descent (Eq. 59-60).

Gradient descent writes to the memory ``y = W x`` of a layer with the objective ``-<W x, u>``, where u = -dL/dy is the
layer's own surprise (Eq. 31, 58). These two replace that objective. The rules are those of `nestlearn.memory`: an
optimizer and a memory layer are the same object on different context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError, nearest
from nestlearn.memory import LinearMemory, objectives, rules
from nestlearn.memory.objectives import Objective
from nestlearn.optim.base import State
from nestlearn.optim.inputs import Grams, LayerOptimizer, Pairs, grouped, over_processes

MODES = ("implicit", "explicit")
Value = Callable[[Tensor, Tensor, Tensor], Tensor]


class DGD(LayerOptimizer):
    """Delta gradient descent (Eq. 56-57): each weight also forgets what it answers to its present inputs.

    For a weight W (o, k) that read the rows x_b (n, k) since the last step, with ``G = mean_b x_b x_b^T`` (k, k):

    - ``mode="implicit"``: ``W <- (W - lr * grad) (I + lr * G)^-1``, the exact minimiser of
      ``mean_b 1/2 ||W x_b - u_b||^2 + 1/(2 lr) ||W - W_t||^2`` with u_b = -dL/dy_b. For one row it is Eq. 57 with the
      step ``lr / (1 + lr ||x||^2)``. Stable for every ``lr``.
    - ``mode="explicit"``: ``W <- W (I - lr * G) - lr * grad``. Needs ``lr`` times the largest eigenvalue of G below 2.

    Explicit DGD is gradient descent on ``L + 1/2 mean_b ||W x_b||^2``: it shrinks outputs. With a square loss it
    settles at ``W x = y / 2``, half of the target. It forgets on purpose; it is not a faster SGD.

    Rows are tokens of `torch.nn.Linear` (n = all leading dimensions), positions of a convolution (patches; G is
    (groups, k, k)) and tokens of an embedding, whose one-hot keys make G diagonal; its padding row neither learns nor
    forgets. The loss is taken as a mean, as ``p.grad`` is. Every other parameter has no input here and follows plain
    gradient descent ``W - lr * grad`` (Eq. 58): biases, norms, weights tied to two kinds of layer, weights that no
    watched layer read (functional or parametrized use, transposed convolutions, attention's fused projections).

    G takes k * k numbers per weight and costs one matrix product per forward; the implicit step also a Cholesky of it.

    Args:
        model: the module to train. Its layers are watched by forward hooks, see `close`.
        lr: eta, the step: parameter per unit of gradient, and forgetting per unit of squared input.
        mode: ``"implicit"`` or ``"explicit"``.
        weight_decay: decoupled, ``W <- (1 - lr * weight_decay) W`` first; 1 minus that product is the alpha of Eq. 88.

    Raises:
        UserError: a hyper-parameter is out of range, or ``model`` is not a module.
        NotFiniteGradient: a gradient is infinite or NaN, by name.

    >>> layer = torch.nn.Linear(2, 1); optimizer = DGD(layer, lr=0.1)
    >>> layer(torch.ones(1, 2)).sum().backward(); optimizer.step()
    """

    def __init__(
        self, model: nn.Module, lr: float = 0.01, *, mode: str = "implicit", weight_decay: float = 0.0
    ) -> None:
        super().__init__(model, dict(lr=lr, mode=mode, weight_decay=weight_decay))

    def _watch(self, model: nn.Module) -> Grams:
        return Grams(model)

    def _check(self, group: dict[str, Any]) -> None:
        if group["mode"] not in MODES:
            raise UserError(f"unknown mode {group['mode']!r}: {nearest(str(group['mode']), MODES)}")

    def _memory(self, p: Tensor, group: dict[str, Any]) -> State:
        return {}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        lr, implicit, grams = float(group["lr"]), group["mode"] == "implicit", self._inputs
        assert isinstance(grams, Grams)
        rest: list[tuple[Tensor, Tensor]] = []
        for p, g in zip(params, grads, strict=True):
            moment = grams.mean(p)
            if moment is None:
                rest.append((p, g))
                continue
            groups = grams.kinds[p][1]
            w, g = grouped(p.to(g.dtype), groups), grouped(g, groups)
            if moment.ndim == 1:  # one-hot keys: every row of the table on its own
                kept = moment[:, None] * lr
                new = (w - lr * g) / (1 + kept) if implicit else w - kept * w - lr * g
            else:
                new = (rules.proximal_dgd_batch if implicit else rules.dgd_batch)(w, moment, g, lr)
            p.copy_(new.reshape(p.shape))
        descend(rest, lr)


class GGD(LayerOptimizer):
    """Generalised gradient descent (Definition 5, Eq. 59-60): the objective of every weight is a choice.

    ``steps`` explicit steps ``W <- W_t - lr * grad`` on ``mean_b objective(W x_b, u_b)``, each from the gradient at the
    W of the step before: descent on the objective plus ``1/(2 lr) ||W - W_t||^2``. The value u_b is generated once,
    by W_t itself: -dL/dy_b unless ``value`` says otherwise. With ``"dot"`` it is gradient descent (Eq. 58); with
    ``"l2"`` explicit `DGD` after one step, tending to implicit `DGD` as ``steps`` grows (if lr times the largest
    eigenvalue of ``mean_b x_b x_b^T`` is below 1).

    Rows are those of `torch.nn.Linear` and convolutions, as for `DGD`. Embeddings, biases and every other parameter
    follow plain gradient descent ``W - lr * grad``. Factors that reach ``p.grad`` after the backward pass (clipping,
    loss scaling, averaging over processes) are applied to dL/dy_b too; what else is in ``p.grad``, as the gradient of a
    penalty on the weights, is descended as it is.

    The rows (n, k) and (n, o) of every layer stay in memory until the step; a step costs one and ``2 * steps`` matrix
    products with them.

    Args:
        model: the module to train. Its layers are watched by forward hooks, see `close`.
        lr: eta, the step, in units of the parameter per unit of the objective's gradient.
        objective: ``"dot"``, ``"l2"`` or a `nestlearn.memory.objectives.Objective`.
        value: ``value(W, x, delta) -> u`` for W (o, k), keys x (n, k), delta = dL_b/dy_b (n, o) and values u (n, o),
            each row on its own (rows may come in pieces). W is the weight after its decay. A grouped convolution has a
            leading dimension of groups. By default ``-delta``.
        steps: explicit steps per update, 1 or more.
        weight_decay: decoupled, ``W <- (1 - lr * weight_decay) W`` first.

    Raises:
        UserError: a hyper-parameter is out of range, ``model`` is not a module, or ``value`` has a wrong shape.
        NotFiniteGradient: a gradient is infinite or NaN, by name.

    >>> layer = torch.nn.Linear(2, 1); optimizer = GGD(layer, lr=0.1, objective=objectives.lp(1.5))
    >>> layer(torch.ones(1, 2)).sum().backward(); optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        objective: str | Objective = "l2",
        *,
        value: Value | None = None,
        steps: int = 1,
        weight_decay: float = 0.0,
    ) -> None:
        self._objective = objectives.get(objective) if isinstance(objective, str) else objective
        self._value = value
        super().__init__(model, dict(lr=lr, steps=steps, weight_decay=weight_decay))

    def _watch(self, model: nn.Module) -> Pairs:
        return Pairs(model)

    def _check(self, group: dict[str, Any]) -> None:
        if not (isinstance(group["steps"], int) and group["steps"] >= 1):
            raise UserError(f"GGD got steps={group['steps']}: it must be a whole number, 1 or more")

    def _memory(self, p: Tensor, group: dict[str, Any]) -> State:
        return {}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        lr, pairs = float(group["lr"]), self._inputs
        assert isinstance(pairs, Pairs)
        rest: list[tuple[Tensor, Tensor]] = []
        for p, g in zip(params, grads, strict=True):
            samples = Samples(pairs, p, g)
            if not samples.rows:
                rest.append((p, g))
                continue
            start = w = grouped(p.to(g.dtype), samples.groups)
            for _ in range(group["steps"]):
                w = start - lr * samples.gradient(w, self._objective, lambda x, d, w=start: self._generate(w, x, d))
            p.copy_(w.reshape(p.shape))
        descend(rest, lr)

    def _generate(self, w: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        if self._value is None:
            return -delta
        u = self._value(w, x, delta)
        if u.shape != delta.shape:
            raise UserError(f"value gave the shape {tuple(u.shape)} for {tuple(delta.shape)}: give one value per row")
        return u


class Samples:
    """The rows that one weight read since the last step, with gradients that match ``p.grad``.

    The backward pass gives dL/dy_b of the mean loss; n times that is the gradient of the loss L_b of one row, and the
    mean of ``delta_b x_b^T`` is ``p.grad``. What has since multiplied ``p.grad`` (clipping, a loss scale, the number of
    processes) is the factor between the two; it is found by projection. What remains of ``p.grad`` came by another way
    than these rows and is in every gradient as it is.
    """

    def __init__(self, pairs: Pairs, p: Tensor, grad: Tensor) -> None:
        self.rows = pairs.rows(p)
        if not self.rows:
            return
        self.groups = pairs.kinds[p][1]
        self._pairs, self._p = pairs, p
        grad = grouped(grad, self.groups)
        raw = torch.zeros_like(grad)
        for x, delta in pairs.of(p):
            raw += delta.mT @ x
        over_processes(raw)
        self._sound = raw.isfinite().all()
        factor = (grad * raw).sum() / raw.square().sum().clamp(min=torch.finfo(raw.dtype).tiny)
        self._scale, self._rest = self.rows * factor, grad - factor * raw

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys x (n, k) and gradients delta (n, o) in pieces, with groups in front if there are any."""
        for x, delta in self._pairs.of(self._p):
            yield x, self._scale * delta

    def trace(self) -> Tensor:
        """``mean_b ||x_b||^2``, () or (groups,): the trace of the second moment."""
        total = self._scale.new_zeros(() if self.groups == 1 else (self.groups,))
        for x, _ in self._pairs.of(self._p):
            total += x.square().sum((-2, -1))
        return over_processes(total) / self.rows

    def gradient(self, w: Tensor, objective: Objective, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The gradient of ``mean_b objective(w x_b, value(x_b, delta_b))``, shaped like ``w``.

        Zero if a delta is not finite: the base class is about to refuse that gradient, or has put zeros for it.
        """
        memory = LinearMemory(w.shape[-1], w.shape[-2])
        total = torch.zeros_like(w)
        for x, delta in self:
            total += memory.gradient((w,), x, value(x, delta), objective)[0]
        return torch.where(self._sound, over_processes(total) / self.rows + self._rest, 0)


def descend(parameters: list[tuple[Tensor, Tensor]], lr: float) -> None:
    """Gradient descent (Eq. 58) on pairs of a parameter and its gradient, in place."""
    if parameters:
        torch._foreach_add_([p for p, _ in parameters], [g for _, g in parameters], alpha=-lr)
