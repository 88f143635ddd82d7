"""The same search of the learning rate for every optimizer, and the seeds after it.

Every optimizer gets the same number of points of its own logarithmic grid with seed 0. While the best point of any of
them lies at an edge of its grid, all of them get one more point, at the edge nearer to their best, twice at most.
The best point then runs with the other seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nestlearn.tasks.cells import Cell, Result, diverged
from nestlearn.tasks.plan import best, summarise

# The middle of each grid, by experiment and optimizer, in the units of the optimizer's class.
CENTRES: dict[str, dict[str, float]] = {
    "orthogonal": {
        "sgd-momentum": 3.2e-3,
        "adamw": 1e-2,
        "muon": 1e-2,
        "m3": 1e-2,
        "delta-momentum": 3.2e-3,
        "delta-momentum-inf": 1e-2,
        "deep-momentum": 3.2e-3,
    },
    "vision": {"adamw": 1e-3, "muon": 1e-2, "adamuon": 1e-2, "m3": 1e-2},
    "language": {"adamw": 3.2e-3, "muon": 2e-2, "m3": 2e-2},
}
RATIO = 10**0.5  # between two neighbours of a grid


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to search: ``points`` of each first grid, ``extensions`` of it at most, and the seeds of the best."""

    points: int = 5
    extensions: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)


MakeCell = Callable[[str, str, float, int], Cell]
Run = Callable[[Sequence[Cell]], Mapping[str, Result]]


def grid(centre: float, points: int) -> list[float]:
    """``points`` learning rates around ``centre``, half a decade apart.

    >>> grid(0.01, 3)
    [0.0032, 0.01, 0.032]
    """
    return [_round(centre * RATIO ** (k - (points - 1) // 2)) for k in range(points)]


def search(
    experiment: str,
    settings: Sequence[str],
    optimizers: Sequence[str],
    make_cell: MakeCell,
    run: Run,
    effort: Effort,
    criterion: str = "validation_loss",
) -> dict[str, dict[str, dict[str, Any]]]:
    """Search every optimizer in every setting: ``result[setting][optimizer]``, see `summary`.

    Args:
        experiment: a row of `CENTRES`.
        settings: what is searched independently, as data sets.
        optimizers: the names to compare.
        make_cell: from setting, optimizer, learning rate and seed to a cell.
        run: from cells to their results by name.
        effort: points, extensions and seeds.
        criterion: the number of a result that is to be small; a run that diverged is worse than any.
    """
    centres = CENTRES[experiment]
    entries = [(setting, name) for setting in settings for name in optimizers]
    grids = {entry: grid(centres[entry[1]], effort.points) for entry in entries}
    found: dict[tuple[str, str], dict[float, Result]] = {entry: {} for entry in entries}

    def measure() -> None:
        todo = {(e, lr): make_cell(*e, lr, effort.seeds[0]) for e in entries for lr in grids[e] if lr not in found[e]}
        results = run(list(todo.values()))
        for (entry, lr), cell in todo.items():
            found[entry][lr] = results[cell.name]

    measure()
    extended = dict.fromkeys(settings, 0)
    for _ in range(effort.extensions):
        at_edge = {setting for setting, name in entries if _at_edge(found[setting, name], criterion)}
        for entry in entries:
            if entry[0] in at_edge:
                grids[entry] = extend(grids[entry], best(found[entry], [criterion]))
        for setting in at_edge:
            extended[setting] += 1
        if at_edge:
            measure()

    chosen = {entry: best(found[entry], [criterion]) for entry in entries}
    cells = {(e, s): make_cell(*e, lr, s) for e, lr in chosen.items() if lr is not None for s in effort.seeds[1:]}
    results = run(list(cells.values())) if cells else {}
    searched: dict[str, dict[str, dict[str, Any]]] = {setting: {} for setting in settings}
    for entry in entries:
        setting, name = entry
        later = [results[cells[entry, s].name] for s in effort.seeds[1:] if (entry, s) in cells]
        searched[setting][name] = summary(found[entry], later, criterion, extended[setting])
    return searched


def extend(rates: list[float], centre: float | None) -> list[float]:
    """One more point, at the edge nearer to ``centre``; downward if everything diverged.

    >>> extend([0.1, 0.32, 1.0], 1.0), extend([0.1, 0.32, 1.0], None)
    ([0.1, 0.32, 1.0, 3.2], [0.032, 0.1, 0.32, 1.0])
    """
    upward = centre is not None and 2 * rates.index(centre) >= len(rates) - 1
    return [*rates, _round(rates[-1] * RATIO)] if upward else [_round(rates[0] / RATIO), *rates]


def summary(found: Mapping[float, Result], later: list[Result], criterion: str, extended: int) -> dict[str, Any]:
    """What a search found.

    Returns ``grid`` (each learning rate with its criterion at the first seed, null if it diverged), ``lr`` (the best,
    null if all diverged), ``at_edge``, ``extended`` (points added to the grid), and of the results of all seeds at
    ``lr`` what `nestlearn.tasks.plan.summarise` says.
    """
    lr = best(found, [criterion])
    return {
        "grid": [[rate, None if diverged(r, criterion) else r[criterion]] for rate, r in sorted(found.items())],
        "lr": lr,
        "at_edge": _at_edge(found, criterion),
        "extended": extended,
        **summarise([] if lr is None else [found[lr], *later], criterion),
    }


def _at_edge(found: Mapping[float, Result], criterion: str) -> bool:
    return best(found, [criterion]) in (None, min(found), max(found))


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")
