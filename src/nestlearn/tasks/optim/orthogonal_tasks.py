"""Tasks along orthogonal directions, one after the other under one optimizer (section 4.3, Eq. 45).

    L_i(W) = E ||W x - y||^2,    x = U_i xi,    y = T_i xi + noise,    xi ~ N(0, I)

Task i lives in a subspace of its own, the columns of U_i (dim, width), and has a teacher T_i (outputs, width) of its
own. There is always a W that solves all tasks, so whatever is forgotten, the optimizer has forgotten it.

With exactly orthogonal subspaces a gradient of one task cannot hurt another: plain SGD forgets only by the momentum
that is left over from the task before. Other optimizers move other directions too: Adam because it divides coordinate
by coordinate, Muon because it lifts small singular values of what is left over. Hence four settings:

    aligned     linear, U_i are coordinates
    rotated     linear, the same turned at random
    overlap     linear, turned, any two subspaces at the cosine `OVERLAP`
    mlp         y = tanh teacher, student with one hidden layer, turned: the tasks share the second layer
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.tasks.cells import Cell, run_cells
from nestlearn.tasks.optim import optimizers
from nestlearn.tasks.optim.search import Effort, search

SETTINGS = ("aligned", "rotated", "overlap", "mlp")
OPTIMIZERS = ("sgd-momentum", "adamw", "delta-momentum", "delta-momentum-inf", "deep-momentum", "muon", "m3")
OVERLAP = 0.3
WIDTH, OUTPUTS, HIDDEN = 4, 16, 64
NOISE = 0.1  # standard deviation of the noise of a target whose signal has variance 1
BATCH, SAMPLES = 16, 512
TRACE = 5  # steps between two points of the memory's trace
SCALES = {
    "cpu": dict(settings=SETTINGS, tasks=6, steps=200, effort=Effort(points=7)),
    "smoke": dict(settings=("rotated",), tasks=3, steps=20, effort=Effort(points=2, extensions=0, seeds=(0,))),
}
MEMORIES = ("momentum", "momentum_buffer", "exp_avg", "fast")  # a momentum of the weight's shape, by its key in a state


class Stream(NamedTuple):
    """The tasks of one seed: ``bases`` U (N, dim, width) with orthonormal columns, ``teachers`` T."""

    bases: Tensor
    teachers: list[nn.Module]


def make_stream(setting: str, tasks: int, seed: int) -> Stream:
    """Subspaces and teachers of ``tasks`` tasks, float64.

    >>> bases = make_stream("overlap", 2, seed=0).bases
    >>> (bases[0].mT @ bases[1]).diagonal().round(decimals=6).unique().tolist()
    [0.3]
    """
    generator = torch.Generator().manual_seed(seed)
    dim = (tasks + 1) * WIDTH
    overlap = OVERLAP if setting == "overlap" else 0.0
    blocks = torch.eye(dim, dtype=torch.float64).view(dim, tasks + 1, WIDTH).transpose(0, 1)
    bases = math.sqrt(1 - overlap) * blocks[:-1] + math.sqrt(overlap) * blocks[-1:]  # the last block is in all
    if setting != "aligned":
        rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        bases = rotation @ bases
    return Stream(bases, [_teacher(setting, generator) for _ in range(tasks)])


def _teacher(setting: str, generator: torch.Generator) -> nn.Module:
    """From xi (B, width) to outputs (B, outputs) of variance about 1."""

    def layer(width: int, outputs: int, gain: float) -> nn.Linear:
        linear = nn.Linear(width, outputs, bias=False, dtype=torch.float64)
        noise = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
        linear.weight.data.copy_(gain * noise / math.sqrt(width))
        return linear.requires_grad_(False)

    if setting != "mlp":
        return layer(WIDTH, OUTPUTS, 1.0)
    return nn.Sequential(layer(WIDTH, 32, 2.0), nn.Tanh(), layer(32, OUTPUTS, 1.3))


def make_student(setting: str, tasks: int, seed: int) -> nn.Module:
    """From x (B, dim) to outputs; the linear one starts at zero."""
    torch.manual_seed(seed)
    dim = (tasks + 1) * WIDTH
    if setting == "mlp":
        return nn.Sequential(nn.Linear(dim, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS)).double()
    student = nn.Linear(dim, OUTPUTS, bias=False, dtype=torch.float64)
    nn.init.zeros_(student.weight)
    return student


def learn(optimizer: str, lr: float, seed: int, setting: str, tasks: int, steps: int) -> dict[str, Any]:
    """A cell: all tasks in turn, ``steps`` batches of `BATCH` each, with one optimizer that is never reset.

    Losses are relative: of the noise-free targets, divided by their mean square, so 1 is knowing nothing and 0 all.

    Returns ``validation_loss`` (the criterion: mean loss of all tasks at the end), ``losses`` (row t: of each task
    after task t), ``first_task`` (of the first task at the end), ``forgetting`` (mean over all tasks but the last of
    the loss at the end minus that right after the task), ``last_task`` (of the last task at the end), ``memory``
    (``[step, cos(m, U_1)]`` of the first layer, null without such a memory) and ``diverged``.
    """
    stream = make_stream(setting, tasks, seed)
    student = make_student(setting, tasks, seed)
    rule = optimizers.build(optimizer, student, lr)
    weight = next(student.parameters())
    generator = torch.Generator().manual_seed(1000 + seed)
    trace: list[list[float]] = []
    losses: list[list[float]] = []
    for task in range(tasks):
        for step in range(steps):
            rule.zero_grad()
            batch_loss(stream, student, task, generator).backward()
            rule.step()
            memory = memory_of(rule, weight)
            if memory is not None and (step + 1) % TRACE == 0:
                trace.append([task * steps + step + 1, cosine(memory, stream.bases[0])])
        losses.append(relative_losses(setting, stream, student))
        if not all(map(math.isfinite, losses[-1])):
            return {"diverged": True}
    end = losses[-1]
    forgotten = [end[i] - losses[i][i] for i in range(tasks - 1)]
    summary = {"first_task": end[0], "last_task": end[-1], "forgetting": sum(forgotten) / len(forgotten)}
    return {
        "validation_loss": sum(end) / tasks,
        **summary,
        "losses": losses,
        "memory": trace or None,
        "diverged": False,
    }


def batch_loss(stream: Stream, student: nn.Module, task: int, generator: torch.Generator) -> Tensor:
    """Eq. 45 on a fresh batch, summed over outputs."""
    xi = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    target = stream.teachers[task](xi)
    target = target + NOISE * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    return (student(xi @ stream.bases[task].mT) - target).square().sum(1).mean()


@torch.no_grad()
def relative_losses(setting: str, stream: Stream, student: nn.Module) -> list[float]:
    """The noise-free loss of every task over the mean square of its targets: exact if linear, else on `SAMPLES`."""
    if isinstance(student, nn.Linear):
        teachers = torch.stack([next(teacher.parameters()) for teacher in stream.teachers])
        errors = student.weight @ stream.bases - teachers
        return (errors.square().sum((1, 2)) / teachers.square().sum((1, 2))).tolist()
    xi = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    targets = [teacher(xi) for teacher in stream.teachers]
    outputs = [student(xi @ basis.mT) for basis in stream.bases]
    return [((o - y).square().sum() / y.square().sum()).item() for o, y in zip(outputs, targets, strict=True)]


def memory_of(rule: Optimizer, weight: Tensor) -> Tensor | None:
    """The momentum that an optimizer holds of ``weight``, in its shape; ``None`` if it holds none of that kind."""
    state = rule.state[weight]
    return next((state[key] for key in MEMORIES if key in state), None)


def cosine(memory: Tensor, basis: Tensor) -> float:
    """Of the angle between a momentum (outputs, dim) and the subspace of a task: ``||m U|| / ||m||``."""
    return ((memory @ basis).norm() / memory.norm().clamp(min=1e-300)).item()


def run(scale: str, folder: Path, workers: int) -> dict[str, Any]:
    """Search every optimizer in every setting: ``{"settings": {setting: {optimizer: summary}}, "tasks", "steps"}``."""
    chosen = SCALES[scale]
    tasks, steps = chosen["tasks"], chosen["steps"]

    def make_cell(setting: str, optimizer: str, lr: float, seed: int) -> Cell:
        arguments = dict(optimizer=optimizer, lr=lr, seed=seed, setting=setting, tasks=tasks, steps=steps)
        return Cell(f"orthogonal-{setting}-{optimizer}-lr{lr:g}-seed{seed}", learn, arguments)

    def compute(cells: Any) -> Any:
        return run_cells(cells, folder, workers, "orthogonal tasks")

    found = search("orthogonal", chosen["settings"], OPTIMIZERS, make_cell, compute, chosen["effort"])
    return {"settings": found, "tasks": tasks, "steps": steps, "seeds": len(chosen["effort"].seeds)}
