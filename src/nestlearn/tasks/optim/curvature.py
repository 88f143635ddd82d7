"""The toy of Figure 4: momentum and delta momentum where the curvature changes quickly (Eq. 53, section 4.4).

    psi(r, theta) = r^2 + k (r - theta + a sin(omega r))^2,    from (-3.5, 2) to the optimum (0, 0)

The paper gives neither k, a, omega nor any learning rate, so there are five landscapes, and every method gets the same
grid of learning rate and momentum in each.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from nestlearn.optim import DeltaMomentum, Momentum, NotFiniteGradient
from nestlearn.tasks.cells import Cell, run_cells


class Landscape(NamedTuple):
    """Constants of Eq. 53; omega in radians per unit of r."""

    k: float
    a: float
    omega: float


# The first three are those of the specification's check; the first is drawn.
LANDSCAPES = {
    "k1-a1-w4": Landscape(1.0, 1.0, 4.0),
    "k10-a0.5-w5": Landscape(10.0, 0.5, 5.0),
    "k5-a1-w8": Landscape(5.0, 1.0, 8.0),
    "k1-a0.5-w2": Landscape(1.0, 0.5, 2.0),
    "k20-a0.2-w10": Landscape(20.0, 0.2, 10.0),
}
METHODS = {
    "momentum": "momentum (Eq. 33)",
    "clipped": "momentum, gradient clipped to norm 1",
    "delta": "delta momentum (Eq. 49), erase 1",
    "delta-inf": "delta momentum, erase inf",
}
START = (-3.5, 2.0)
TOLERANCE = 1e-3  # of the distance to the optimum and of the last update
FAR = 1e3  # a point this far has diverged
RATES = tuple(float(f"{10 ** (-3.5 + k / 3):.2g}") for k in range(10))  # 3.2e-4 to 0.32, three a decade
MOMENTA = (0.5, 0.8, 0.9, 0.95, 0.99)
SCALES = {"cpu": (tuple(LANDSCAPES), RATES, MOMENTA, 3000), "smoke": (tuple(LANDSCAPES)[:1], RATES[6:8], (0.9,), 400)}


def psi(landscape: Landscape, r: float, theta: float) -> float:
    """Eq. 53.

    >>> psi(LANDSCAPES["k1-a1-w4"], 0.0, 2.0)
    4.0
    """
    return r**2 + landscape.k * (r - theta + landscape.a * math.sin(landscape.omega * r)) ** 2


def gradient(landscape: Landscape, r: float, theta: float) -> tuple[float, float]:
    """The gradient of `psi` in closed form."""
    k, a, omega = landscape
    bend = 2 * k * (r - theta + a * math.sin(omega * r))
    return 2 * r + bend * (1 + a * omega * math.cos(omega * r)), -bend


def optimizer_of(method: str, point: torch.Tensor, lr: float, momentum: float) -> Optimizer:
    """The package's optimizer over ``point`` (2,); both numbers of the point are one key of the delta rule."""
    if method in ("delta", "delta-inf"):
        erase = 1.0 if method == "delta" else math.inf
        return DeltaMomentum([point], lr=lr, momentum=momentum, erase=erase, keys="whole")
    return Momentum([point], lr=lr, momentum=momentum)


def descend(method: str, landscape: Landscape, lr: float, momentum: float, budget: int) -> list[tuple[float, float]]:
    """The points from `START` on, until the optimum, divergence or ``budget`` steps.

    At the optimum the distance to it and the last update are both below `TOLERANCE`: a point that only flies past it
    has not arrived.
    """
    point = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    point.grad = torch.zeros_like(point)
    optimizer = optimizer_of(method, point, lr, momentum)
    path = [START]
    for _ in range(budget):
        g = gradient(landscape, *path[-1])
        shrink = min(1.0, 1.0 / max(math.hypot(*g), 1e-30)) if method == "clipped" else 1.0
        point.grad.copy_(torch.tensor(g, dtype=torch.float64).mul_(shrink))
        try:
            optimizer.step()
        except NotFiniteGradient:
            break
        r, theta = point.tolist()
        path.append((r, theta))
        if arrived(path) or not math.hypot(r, theta) < FAR:
            break
    return path


def arrived(path: list[tuple[float, float]]) -> bool:
    """Whether the last point is at the optimum, see `descend`."""
    return len(path) > 1 and math.hypot(*path[-1]) < TOLERANCE and math.dist(path[-1], path[-2]) < TOLERANCE


def tune(method: str, landscape: str, rates: list[float], momenta: list[float], budget: int) -> dict[str, Any]:
    """A cell: the fewest steps to the optimum over the grid.

    Returns ``steps`` (null if no setting arrives within ``budget``), ``lr``, ``momentum``, ``arrived`` of ``tried``
    settings, ``median`` (steps of those that arrived), ``at_edge`` (of the learning rates) and ``path``.
    """
    found: list[tuple[int, float, float]] = []
    shortest: list[tuple[float, float]] = []
    for lr in rates:
        for momentum in momenta:
            path = descend(method, LANDSCAPES[landscape], lr, momentum, budget)
            if arrived(path):
                found.append((len(path) - 1, lr, momentum))
                shortest = path if not shortest or len(path) < len(shortest) else shortest
    tried = len(rates) * len(momenta)
    if not found:
        return {"diverged": True, "steps": None, "arrived": 0, "tried": tried}
    found.sort()
    steps, lr, momentum = found[0]
    edge = len(rates) > 1 and lr in (rates[0], rates[-1])
    counts = {"arrived": len(found), "tried": tried, "median": found[len(found) // 2][0], "at_edge": edge}
    return {"steps": steps, "lr": lr, "momentum": momentum, **counts, "path": shortest}


def run(scale: str, folder: Path, workers: int) -> dict[str, Any]:
    """Tune every method in every landscape: ``{"landscapes": {landscape: {method: result of `tune`}}, ...}``."""
    landscapes, rates, momenta, budget = SCALES[scale]
    grid = {"rates": list(rates), "momenta": list(momenta), "budget": budget}
    cells = {
        (landscape, method): Cell(
            f"curvature-{landscape}-{method}", tune, {"method": method, "landscape": landscape, **grid}
        )
        for landscape in landscapes
        for method in METHODS
    }
    results = run_cells(list(cells.values()), folder, workers, "curvature")
    table = {name: {m: results[cells[name, m].name] for m in METHODS} for name in landscapes}
    return {"landscapes": table, **grid}
