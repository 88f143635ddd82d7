"""Deep momentum (Eq. 50, DMGD): an MLP memory of gradients that is trained while the model trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.memory import MLPMemory, objectives
from nestlearn.memory.objectives import Objective
from nestlearn.optim import outputs
from nestlearn.optim.base import MemoryOptimizer, State, check_all, refuse_sharded, state_dtype
from nestlearn.optim.outputs import Output


class DeepMomentum(MemoryOptimizer):
    """Deep momentum gradient descent (Eq. 50): ``W <- W + lr * sigma(m_phi(u))``, phi trained online.

    The memory is ``m(k) = W1 silu(W2 k)``, applied to each row of the gradient (d_out, d_in); an element is a row of a
    vector. Keys are the rows divided by the root mean square of the whole gradient, values ``-P(k)``. Every step
    first takes ``inner_steps`` gradient steps on the internal objective, then reads. W1 starts at zero, so the first
    update is small. An update is in units of the parameter, whatever the gradient's size.

    Two choices that the paper leaves open. An inner step is divided by the mean squared norm of the layer's input, as
    Eq. 57 does, so ``inner_lr`` needs no tuning to the width. Only W1 is decayed: W2 holds the features by which the
    memory finds what it stored, and a decay to zero would end all reading.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: in units of the parameter per step.
        momentum: retained fraction of W1 per step.
        hidden: width of the memory.
        inner_lr: step of the memory's own training: 1 corrects a single pair completely.
        inner_steps: gradient steps of the memory per step of the model.
        objective: the internal one: ``"l2"``, ``"dot"`` (unbounded below: it needs ``momentum < 1``) or an `Objective`.
        value: P, from keys (rows, d_in) to values of that shape; by default the key itself.
        output, weight_decay: see `Momentum`.
        seed: of the features W2 at the start.

    Raises:
        UserError: a hyper-parameter is out of range.
        NotFiniteGradient: a gradient is infinite or NaN, by name.

    >>> layer = torch.nn.Linear(2, 1); layer(torch.ones(1, 2)).sum().backward()
    >>> DeepMomentum(layer.parameters(), lr=1e-3).step()
    """

    _squares = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.99,
        *,
        hidden: int = 64,
        inner_lr: float = 0.5,
        inner_steps: int = 1,
        objective: str | Objective = "l2",
        value: Callable[[Tensor], Tensor] | None = None,
        output: str | Output = "identity",
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, hidden=hidden, inner_lr=inner_lr, inner_steps=inner_steps)
        defaults |= dict(objective=objective, value=value, output=output, weight_decay=weight_decay, seed=seed)
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_all(self, group, [("momentum", 0.0, 1.0), ("inner_lr", 0.0, 2.0)])
        for name in ("hidden", "inner_steps"):
            if not isinstance(group[name], int) or group[name] < 1:
                raise UserError(f"DeepMomentum got {name}={group[name]}: it must be a whole number, 1 or more")
        outputs.check(group["output"])
        _objective(group)

    def _memory(self, p: Tensor, group: dict[str, Any]) -> State:
        refuse_sharded(self, [p])  # its network reads whole rows of the gradient, and is one for all of them
        width = _rows(p).shape[-1]
        generator = torch.Generator().manual_seed(group["seed"])
        _, features = MLPMemory(width, width, group["hidden"]).init(generator=generator)
        kind = dict(device=p.device, dtype=state_dtype(p))
        return {"w1": torch.zeros(width, group["hidden"], **kind), "w2": features.to(**kind)}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        reads = [
            -self._write_and_read(group, g, s).view(p.shape) for p, g, s in zip(params, grads, memories, strict=True)
        ]
        outputs.read_into(params, reads, float(group["lr"]), group["output"])

    def _write_and_read(self, group: dict[str, Any], g: Tensor, state: State) -> Tensor:
        # By the largest element first: squares of a tiny gradient would be zero.
        tiny = torch.finfo(g.dtype).tiny
        u = _rows(g / g.abs().amax().clamp(min=tiny))
        k = u / u.square().mean().sqrt().clamp(min=tiny)
        v = -(group["value"](k) if group["value"] else k)
        memory, objective = MLPMemory(u.shape[-1], u.shape[-1], group["hidden"], skip=False), _objective(group)
        w1, w2 = state["w1"], state["w2"]
        w1.mul_(group["momentum"])
        for _ in range(group["inner_steps"]):
            error = objective.error(memory.read((w1, w2), k), v)
            for w, (left, right) in zip((w1, w2), memory.factors((w1, w2), k, error), strict=True):
                step = group["inner_lr"] / right.square().sum().clamp(min=tiny)
                w.sub_(step * (left.mT @ right))
        return memory.read((w1, w2), k)


def _rows(t: Tensor) -> Tensor:
    """A gradient as rows (n, d): a vector has rows of one element."""
    return t.reshape(-1, 1) if t.ndim < 2 else t.flatten(1)


def _objective(group: dict[str, Any]) -> Objective:
    objective = group["objective"]
    return objective if isinstance(objective, Objective) else objectives.get(objective)
