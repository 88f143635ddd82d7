"""The oracle: the optimizers of the paper as plain as its equations, for tests and for reading.

Everything is one matrix at a time, and the step size is where the paper has it, inside the memory. The momentum of
Eq. 33-51 is literally a memory of `nestlearn.memory`: the rows of the gradient are its keys, the rows of -P^T their
values, and the optimizer's step is the memory's own gradient step.

Legend: w, m, g are (o, i); P is (o, o); eta is a step size, alpha a retained fraction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestlearn.memory import LinearMemory, objectives
from nestlearn.memory.objectives import Objective


def momentum(
    w: Tensor,
    m: Tensor,
    g: Tensor,
    eta: float,
    alpha: float = 1.0,
    *,
    preconditioner: Tensor | None = None,
    feature: Callable[[Tensor], Tensor] = lambda g: g,
    objective: Objective = objectives.dot_product,
    output: Callable[[Tensor], Tensor] = lambda m: m,
) -> tuple[Tensor, Tensor]:
    """One step ``m <- alpha m - eta grad_m L(m; phi(g), -P)``, ``W <- W + sigma(m)``: the next W and m.

    The dot product is Eq. 33 (P = I), 47 and 51; L2 is delta momentum, Eq. 49; sigma is Eq. 52.

    >>> w, m = momentum(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), eta=0.1, alpha=0.9)
    >>> m
    tensor([[0.8000, 0.8000]])
    """
    p = torch.eye(len(g), dtype=g.dtype) if preconditioner is None else preconditioner
    keys, values = feature(g), -p.mT
    (gradient,) = LinearMemory(g.shape[1], g.shape[0]).gradient((m,), keys, values, objective)
    m = alpha * m - eta * gradient
    return w + output(m), m


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Muon's quintic Newton-Schulz of one wide or square matrix, in its own precision."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / g.norm() if g.norm() > 0 else g
    for _ in range(steps):
        x = a * x + b * (x @ x.mT) @ x + c * (x @ x.mT) @ (x @ x.mT) @ x
    return x


def m3(
    w: Tensor,
    gradients: list[Tensor],
    eta: float,
    *,
    betas: tuple[float, float, float],
    alpha: float,
    chunk: int,
    eps: float = 1e-8,
    ema: bool = True,
    second_moment: bool = True,
    sigma: Callable[[Tensor], Tensor] = newton_schulz,
) -> Tensor:
    """Algorithm 1 over a list of gradients, from zero memories: the last W. ``ema=False`` is the print.

    The denominator is the printed one; ``second_moment=False`` leaves it out.
    """
    beta1, beta2, beta3 = betas
    m1, m2, v, o2, buffer = (torch.zeros_like(w) for _ in range(5))
    for t, g in enumerate(gradients):
        if t > 0 and t % chunk == 0:
            m2 = beta3 * m2 + (1 - beta3) * buffer / chunk if ema else m2 + beta3 * buffer
            o2, buffer = sigma(m2), torch.zeros_like(w)
        buffer = buffer + g
        m1 = beta1 * m1 + (1 - beta1) * g if ema else m1 + beta1 * g
        v = beta2 * v + (1 - beta2) * g * g if ema else v + beta2 * g * g
        update = sigma(m1) + alpha * o2
        w = w - eta * (update / (v.sqrt() + eps) if second_moment else update)
    return w
