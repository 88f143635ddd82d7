"""Time of one optimizer step on the parameters of a transformer of 125 M, beside torch's optimizers.

No model runs: the gradients are random and stay the same. All candidates update the same parameters and take turns in
one process, so that a machine that slows down slows all of them. Two parts: the hidden matrices alone, and all
parameters, where Muon and M3 leave embeddings and vectors to AdamW.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestlearn import optim
from nestlearn.tasks.cells import Cell, run_cells

PARTS = ("hidden", "all")
CHUNK = 10  # of M3, its default: the timed steps cover each chunk's slow step in its due share
SCALES = {
    "cpu": dict(layers=12, width=768, vocabulary=50_304, positions=1_024, rounds=5),
    "smoke": dict(layers=2, width=32, vocabulary=256, positions=32, rounds=2),
}


class Shapes(NamedTuple):
    """Of all parameters: hidden matrices (d_out, d_in), and embeddings and vectors."""

    matrices: list[tuple[int, ...]]
    others: list[tuple[int, ...]]


class Candidate(NamedTuple):
    """``make`` gives the optimizers of one step; ``peer`` is the candidate of torch to divide by; ``steps`` a round."""

    name: str
    peer: str | None
    make: Callable[[], list[Optimizer]]
    steps: int


def shapes(layers: int, width: int, vocabulary: int, positions: int) -> Shapes:
    """Four matrices of attention and two of an MLP four times as wide in each layer, norms without bias, tied head.

    >>> sum(a * b for a, b in shapes(12, 768, 50_304, 1_024).matrices)
    84934656
    """
    layer: list[tuple[int, ...]] = [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)]
    vectors: list[tuple[int, ...]] = [(width,)] * (2 * layers + 1)
    return Shapes(layer * layers, [(vocabulary, width), (positions, width), *vectors])


def candidates(matrices: list[Tensor], others: list[Tensor], steps: int) -> list[Candidate]:
    """Every optimizer over all of ``matrices`` and ``others``; ``steps`` a round, Muon one."""
    every = [*matrices, *others]

    def alike(factory: Callable[..., Optimizer], **options: Any) -> Callable[[], list[Optimizer]]:
        return lambda: [factory(every, lr=1e-4, **options)]

    def by_kind(factory: Callable[..., Optimizer]) -> Callable[[], list[Optimizer]]:
        groups: list[dict[str, Any]] = [{"params": matrices}]
        return lambda: [factory([*groups, {"params": others, "adam": True}] if others else groups, lr=1e-4)]

    def torch_muon() -> list[Optimizer]:
        rest = [torch.optim.AdamW(others, lr=1e-4)] if others else []
        return [torch.optim.Muon(matrices, lr=1e-4), *rest]

    sgd, muon = "torch SGD, momentum", "torch Muon + AdamW" if others else "torch Muon"
    return [
        Candidate(sgd, None, alike(torch.optim.SGD, momentum=0.9), steps),
        Candidate(
            "torch SGD, momentum, foreach=False", sgd, alike(torch.optim.SGD, momentum=0.9, foreach=False), steps
        ),
        Candidate("torch AdamW", None, alike(torch.optim.AdamW), steps),
        Candidate("torch AdamW, fused", "torch AdamW", alike(torch.optim.AdamW, fused=True), steps),
        Candidate("Momentum", sgd, alike(optim.Momentum), steps),
        Candidate("Momentum, once more", sgd, alike(optim.Momentum), steps),
        Candidate("FeatureMomentum", sgd, alike(optim.FeatureMomentum), steps),
        Candidate("DeltaMomentum, elements", sgd, alike(optim.DeltaMomentum, keys="elements"), steps),
        Candidate("DeltaMomentum, whole", sgd, alike(optim.DeltaMomentum, keys="whole"), steps),
        Candidate("DeltaMomentum, rows", sgd, alike(optim.DeltaMomentum, keys="rows"), steps),
        Candidate("DeepMomentum", sgd, alike(optim.DeepMomentum), steps),
        Candidate("PreconditionedMomentum", "torch AdamW", alike(optim.PreconditionedMomentum), steps),
        Candidate(muon, None, torch_muon, 1),
        Candidate("Muon", muon, by_kind(optim.Muon), 1),
        Candidate("Muon, once more", muon, by_kind(optim.Muon), 1),
        Candidate("M3", muon, by_kind(optim.M3), steps),
    ]


def measure(part: str, layers: int, width: int, vocabulary: int, positions: int, rounds: int) -> dict[str, Any]:
    """A cell: time all candidates on one of `PARTS`.

    Every candidate makes one step to warm up, then in each round ``CHUNK / rounds`` steps (Muon one), so that M3 makes
    exactly one chunk of steps, one of them slow.

    Returns ``parameters``, ``threads``, ``rounds`` and ``candidates``: of each ``name``, ``peer``, ``seconds`` per
    step (the mean over the chunk for M3, the median of the rounds for all others), ``low`` and ``high`` (of the
    rounds), ``ratio`` to the peer's seconds, and ``bytes_per_parameter`` of its state.
    """
    torch.manual_seed(0)
    wanted = shapes(layers, width, vocabulary, positions)
    matrices = [_parameter(shape) for shape in wanted.matrices]
    others = [_parameter(shape) for shape in wanted.others] if part == "all" else []
    count = sum(p.numel() for p in [*matrices, *others])
    entries = candidates(matrices, others, CHUNK // rounds)
    made = {entry.name: entry.make() for entry in entries}
    timed: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for entry in entries:
        seconds_of(made[entry.name], 1)
    for _ in range(rounds):
        for entry in entries:
            timed[entry.name].append(seconds_of(made[entry.name], entry.steps))
    typical = {n: statistics.fmean(times) if n == "M3" else statistics.median(times) for n, times in timed.items()}
    rows = [
        {
            "name": entry.name,
            "peer": entry.peer,
            "seconds": typical[entry.name],
            "low": min(timed[entry.name]),
            "high": max(timed[entry.name]),
            "ratio": None if entry.peer is None else typical[entry.name] / typical[entry.peer],
            "bytes_per_parameter": state_bytes(made[entry.name]) / count,
        }
        for entry in entries
    ]
    return {"parameters": count, "threads": torch.get_num_threads(), "rounds": rounds, "candidates": rows}


def seconds_of(optimizers: list[Optimizer], steps: int) -> float:
    """Wall-clock seconds per step, over ``steps`` steps."""
    begin = time.perf_counter()
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.step()
    return (time.perf_counter() - begin) / steps


def state_bytes(optimizers: list[Optimizer]) -> int:
    """Of all tensors that the optimizers hold, in bytes."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _parameter(shape: tuple[int, ...]) -> Tensor:
    p = (0.02 * torch.randn(shape)).requires_grad_()
    p.grad = 1e-3 * torch.randn(shape)
    return p


def run(scale: str, folder: Path) -> dict[str, Any]:
    """Both parts, one after the other in this process with all its threads: ``{part: result of measure}``."""
    cells = [Cell(f"step-time-{part}", measure, {"part": part, **SCALES[scale]}) for part in PARTS]
    results = run_cells(cells, folder, workers=1, label="step time")
    return {part: results[cell.name] for part, cell in zip(PARTS, cells, strict=True)}
