"""The oracle: a continuum memory that learns along one sequence, token by token, as plain as Eq. 70-74.

Errors come from autograd on each token's own objective. Slow, and right in float64; the tests hold the layer to it,
outputs, weights and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.memory.structures import Weights
from nestlearn.nn.continuum.memory import ContinuumMemory


def along(memory: ContinuumMemory, x: Tensor) -> tuple[Tensor, list[Weights]]:
    """Run ``memory``, whose levels learn from their local objective, over ``x`` (T, D).

    Returns the outputs (T, D) and the last weights of every level.
    """
    K = len(memory.levels)
    theta: list[Any] = [level.weights for level in memory.levels]
    start = list(theta)  # of the nested variant: what the next slower level holds of this one
    error: list[Any] = [None] * K
    start_error: list[Any] = [None] * K
    slots: list[Any] = [((),) * len(w) for w in theta]
    start_slots = list(slots)
    last: list[Any] = [None] * K
    outputs = []
    for t in range(len(x)):
        h, mixed = x[t], []
        for i, level in enumerate(memory.levels):
            u = level.norm(h)
            mixed.append(level.structure.read(theta[i], u[None])[0])
            if last[i] is not None:
                value = level.value @ u
                target = last[i]

                def objective(*w: Tensor, level: Any = level, key: Tensor = target, v: Tensor = value) -> Tensor:
                    return memory.objective.value(level.structure.read(w, key[None])[0], v)

                add(error, i, gradient(objective, theta[i], level, target))
            last[i] = u
            if memory.mix is None:
                h = h + mixed[-1]
        if memory.mix is not None:
            h = h + sum(w * y for w, y in zip(memory.mix, mixed, strict=True))
        outputs.append(h)
        # Eq. 71: every C(l) tokens one step on the error summed since the last one.
        for i, level in enumerate(memory.levels):
            if (t + 1) % level.chunk_size:
                continue
            e = error[i] or tuple(torch.zeros_like(w) for w in theta[i])
            theta[i], slots[i] = step(level, theta[i], e, slots[i], level)
            error[i] = None
            if memory.variant == "nested" and i + 1 < K:  # Eq. 72
                add(start_error, i, e)
                parent = memory.levels[i + 1]
                if (t + 1) % parent.chunk_size == 0:
                    start[i], start_slots[i] = step(parent, start[i], start_error[i], start_slots[i], level)
                    theta[i], slots[i], start_error[i] = start[i], ((),) * len(theta[i]), None
    return torch.stack(outputs), theta


def gradient(objective: Callable[..., Tensor], w: Weights, level: Any, key: Tensor) -> Weights:
    """The gradient of one token's objective; for DGD of ``objective + 1/2 ||W x||^2`` with x what each weight reads."""
    alias = [v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for v in w]
    grads = torch.autograd.grad(objective(*alias), alias, create_graph=True)
    if level.update.rule != "dgd":
        return grads
    into = w[1:]
    hidden = torch.nn.functional.silu(into[-1] @ key)
    if len(into) == 2:
        hidden = hidden * (into[0] @ key)
    reads = (hidden, *[key] * len(into))
    return tuple(g + torch.outer(v @ x, x) for g, v, x in zip(grads, w, reads, strict=True))


def step(level: Any, w: Weights, error: Weights, slots: Any, limited: Any) -> tuple[Weights, Any]:
    """The rule of ``level`` on the weights of ``limited``, which may be the next faster level's start."""
    stepped, kept = level.update.step(w, error, slots, level.rate, limited.weights, level.chunk_size)
    return stepped, kept


def add(sums: list[Any], i: int, terms: Sequence[Tensor]) -> None:
    sums[i] = tuple(terms) if sums[i] is None else tuple(a + b for a, b in zip(sums[i], terms, strict=True))
