"""torch.optim.Muon beside ours, on the hidden matrices of a transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from nestlearn.tasks.optim.step_time import candidates, shapes
from nestlearn.tasks.speed.timing import AGAIN, Run, in_turns, machine, rows

OURS, TORCH = "Muon", "torch Muon"


def step(layers: int, width: int, rounds: int, budget: float) -> dict[str, Any]:
    """A cell: one step on random gradients. ``layers``, ``width``: of `nestlearn.tasks.optim.step_time.shapes`."""
    torch.manual_seed(0)
    before = machine()
    matrices = []
    for shape in shapes(layers, width, 1, 1).matrices:
        p = (0.02 * torch.randn(shape)).requires_grad_()
        p.grad = 1e-3 * torch.randn(shape)
        matrices.append(p)
    made = {c.name: c.make() for c in candidates(matrices, [], 1) if c.name in (OURS, TORCH)}
    runs: dict[str, Run] = {name: _run(optimizers) for name, optimizers in made.items()}
    runs[OURS + AGAIN] = runs[OURS]
    parameters = sum(p.numel() for p in matrices)
    return {"machine": before, "parameters": parameters, "rows": rows(in_turns(runs, rounds, budget), [TORCH], 1)}


def _run(optimizers: list[Optimizer]) -> Run:
    return lambda: [optimizer.step() for optimizer in optimizers]
