"""What a task runs, and what came out: rows of models, each searched alike, each then run with all seeds.

A row is one model in one setting. All rows of a plan get the same learning rates at the first seed; the best by the
plan's criterion then runs with the other seeds. That budget is part of the plan.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.tasks.cells import Cell, Result, diverged, finished_cells, run_cells


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one setting.

    Args:
        setting: what is measured, as a data set or a language; results are only compared inside one.
        model: the name in the report.
        arguments: of the plan's function for this row alone, of JSON's types.
        reason: why the row cannot be run, in one line; ``None`` if it can.
        rates: in place of the plan's, and as many: of a method that has no learning rate but something else to choose.
    """

    setting: str
    model: str
    arguments: Mapping[str, Any]
    reason: str | None = None
    rates: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All rows of a task at one scale.

    Args:
        task: its name, unique in the suite.
        function: from a row's arguments, those in ``shared``, ``lr`` and ``seed`` to a result, see `Cell`.
        shared: arguments that are equal in all rows.
        rows: what is to be measured.
        rates: learning rates, tried with the first seed.
        seeds: the best rate runs with all of them.
        criterion: names of numbers in a result that are to be small, on validation data; the next decides a tie.
        data: the folder of real data, the argument ``data`` of the function: neither the report nor a cell names it.
            Without one the function has no such argument.
    """

    task: str
    function: Callable[..., Result]
    shared: Mapping[str, Any]
    rows: Sequence[Row]
    rates: Sequence[float]
    seeds: Sequence[int]
    criterion: Sequence[str]
    data: str | None = None

    def cell(self, row: Row, lr: float, seed: int) -> Cell:
        """One run of a row."""
        name = f"{self.task}-{slug(row.setting)}-{slug(row.model)}-lr{lr:g}-seed{seed}"
        where = {} if self.data is None else {"data": self.data}
        return Cell(name, self.function, {**self.shared, **row.arguments, "lr": lr, "seed": seed}, where)

    def search(self, unable: bool = False) -> dict[tuple[int, float], Cell]:
        """The first stage, by number of the row and learning rate; with rows that are ``unable`` to run now or not."""
        some = [n for n, row in enumerate(self.rows) if unable or row.reason is None]
        return {(n, lr): self.cell(self.rows[n], lr, self.seeds[0]) for n in some for lr in self.rates_of(n)}

    def rates_of(self, row: int) -> Sequence[float]:
        """What is tried for the row of that number; every row has as many."""
        own = self.rows[row].rates
        assert own is None or len(own) == len(self.rates), "a row with another search budget"
        return self.rates if own is None else own

    def recipe(self) -> dict[str, Any]:
        """All that a reader needs to repeat a number, but the arguments of each row."""
        return {
            "function": f"{self.function.__module__}.{self.function.__qualname__}",
            "shared": dict(self.shared),
            "rates": list(self.rates),
            "seeds": list(self.seeds),
            "criterion": list(self.criterion),
            "runs_per_row": len(self.rates) + len(self.seeds) - 1,
        }


def slug(text: str) -> str:
    """A name as a part of a file's.

    >>> slug("hope, chunk 16"), slug("(aa)*")
    ('hope-chunk-16', 'aa')
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def carry_out(plan: Plan, folder: Path, workers: int) -> None:
    """Run all cells of a plan that are not finished. Raises what `run_cells` raises."""
    search = list(plan.search().values())
    able = len({n for n, _ in plan.search()})
    run_cells(search, folder, workers, f"{plan.task}, learning rates", later=able * (len(plan.seeds) - 1))
    run_cells([*search, *_seed_cells(plan, folder).values()], folder, workers, f"{plan.task}, seeds")


def outcomes(plan: Plan, folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What the folder holds of every row: ``result[setting][model]``, at any moment.

    An outcome has

    * ``state``: ``"finished"``, ``"partial"`` (some seeds are missing) or ``"not run"``, and ``reason`` (or null);
    * ``grid``: ``[lr, value of the first criterion]``, null if it diverged, of the learning rates that are finished;
    * ``lr``: the best, null without one; ``at_edge``: whether it is the largest or the smallest of several;
    * ``runs``: the results at ``lr`` by seed, ``diverged``: how many of them did;
    * ``mean`` and ``spread``: of every number in the results, the standard deviation over the seeds (null of one seed).
      A number that one seed lacks has neither;
    * ``arguments`` of the row, ``commits`` (count of cells by commit) and ``seconds`` of all its cells.
    """
    search = plan.search(unable=True)  # what was run counts, also where its data is gone
    kept = finished_cells(list(search.values()), folder)
    later = _seed_cells(plan, folder, unable=True)
    kept |= finished_cells(list(later.values()), folder)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for n, row in enumerate(plan.rows):
        tried = {lr: search[n, lr] for lr in plan.rates_of(n) if (n, lr) in search}
        finished = {lr: kept[cell.name] for lr, cell in tried.items() if cell.name in kept}
        lr = best({rate: record["result"] for rate, record in finished.items()}, plan.criterion)
        complete = bool(tried) and len(finished) == len(tried)
        seeds = [kept[later[n, s].name] for s in plan.seeds[1:] if (n, s) in later and later[n, s].name in kept]
        records = [finished[lr], *seeds] if complete and lr is not None else []
        found.setdefault(row.setting, {})[row.model] = {
            **_state(row, plan, len(finished), complete, records),
            "grid": [[rate, _value(record["result"], plan.criterion[0])] for rate, record in finished.items()],
            "lr": lr if complete else None,
            "at_edge": complete and len(plan.rates) > 1 and lr in (min(plan.rates_of(n)), max(plan.rates_of(n))),
            "arguments": dict(row.arguments),
            "commits": Counter(str(record.get("commit")) for record in [*finished.values(), *seeds]),
            "seconds": sum(record["seconds"] for record in [*finished.values(), *seeds]),
            **summarise([record["result"] for record in records], plan.criterion[0]),
        }
    return found


def best(found: Mapping[float, Result], criterion: Sequence[str]) -> float | None:
    """The learning rate of the smallest criterion; ``None`` if all diverged.

    >>> best({0.1: {"error": 0, "loss": 2.0}, 0.2: {"error": 0, "loss": 1.0}}, ["error", "loss"])
    0.2
    """
    good = {lr: r for lr, r in found.items() if not any(diverged(r, key) for key in criterion)}
    return min(good, key=lambda lr: [good[lr][key] for key in criterion]) if good else None


def summarise(runs: list[Result], criterion: str) -> dict[str, Any]:
    """``runs``, ``diverged``, ``mean`` and ``spread`` of an outcome.

    >>> summarise([{"loss": 1.0}, {"loss": 2.0}], "loss")["mean"]
    {'loss': 1.5}
    """
    names = {key for run in runs for key, value in run.items() if type(value) in (int, float)}
    columns = {key: [run.get(key) for run in runs] for key in sorted(names)}
    numbers = {key: [float(v) for v in values] for key, values in columns.items() if None not in values}  # type: ignore[arg-type]
    return {
        "runs": runs,
        "diverged": sum(diverged(run, criterion) for run in runs),
        "mean": {key: statistics.fmean(values) for key, values in numbers.items()},
        "spread": {key: statistics.stdev(v) if len(v) > 1 else None for key, v in numbers.items()},
    }


def _seed_cells(plan: Plan, folder: Path, unable: bool = False) -> dict[tuple[int, int], Cell]:
    """The second stage, of the rows whose search is finished: by number of the row and seed."""
    search = plan.search(unable)
    kept = finished_cells(list(search.values()), folder)
    cells = {}
    for n in {n for n, _ in search}:
        names = {lr: search[n, lr].name for lr in plan.rates_of(n)}
        if all(name in kept for name in names.values()):
            lr = best({lr: kept[name]["result"] for lr, name in names.items()}, plan.criterion)
            if lr is not None:
                cells |= {(n, seed): plan.cell(plan.rows[n], lr, seed) for seed in plan.seeds[1:]}
    return cells


def _state(row: Row, plan: Plan, tried: int, complete: bool, records: list[Any]) -> dict[str, Any]:
    if row.reason is not None and not records:
        return {"state": "not run", "reason": row.reason}
    if not complete:
        return {"state": "not run", "reason": f"{tried} of {len(plan.rates)} learning rates tried" if tried else None}
    if not records:
        return {"state": "finished", "reason": "diverged at every learning rate"}
    missing = len(plan.seeds) - len(records)
    reason = f"{len(records)} of {len(plan.seeds)} seeds" if missing else None
    return {"state": "partial" if missing else "finished", "reason": reason}


def _value(result: Result, key: str) -> Any:
    return None if diverged(result, key) else result[key]
