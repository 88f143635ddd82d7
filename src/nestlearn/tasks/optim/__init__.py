"""The paper's experiments on optimizers: ``nestlearn bench optim``.

Nothing is imported here, so that the command line can check names before it loads torch.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.errors import require_extra
from nestlearn.files import write_json
from nestlearn.tasks.request import check

EXPERIMENTS = ("curvature", "orthogonal", "vision", "language", "step-time")
SCALES = ("smoke", "cpu")
# Of section 9.7. Where a run takes minutes, fewer optimizers or first points of the search are tried.
MODEL_OPTIMIZERS = {"vision": ("adamw", "muon", "adamuon", "m3"), "language": ("adamw", "muon", "m3")}
POINTS = {"mnist": 5, "cifar10": 3, "stdlib": 3}
DATASETS = ("mnist", "cifar10")


def run(only: Sequence[str], scale: str, data: str | None, out: Path, workers: int) -> dict[str, Any]:
    """Run experiments, keep each in ``out/NAME.json`` and write the report over all that ``out`` holds.

    Args:
        only: names of `EXPERIMENTS`; none means all.
        scale: ``"cpu"``, or ``"smoke"`` to see in a minute that everything works.
        data: a folder with ``mnist/`` and ``cifar10/``, or ``None``.
        out: the run folder; what it has already is not computed again.
        workers: processes at a time; step times are always taken alone.

    Returns ``folder``, ``report`` and ``experiments``: for each its result, without the curves of single runs.

    Raises:
        UserError: an unknown name, fewer workers than one, or a folder of another scale.
        KeyboardInterrupt: with a message that says what is kept.
    """
    chosen = check("experiment", only, EXPERIMENTS, scale, SCALES, workers)

    require_extra("matplotlib", "the report")  # before anything long
    from nestlearn.tasks.optim import report

    results = {}
    for name in chosen:
        results[name] = _experiment(name, scale, data, out, workers)
        command = _command(name, scale, data)
        write_json(out / f"{name}.json", {"command": command, "machine": _machine(), "result": results[name]})
    return {"folder": str(out), "report": str(report.write(out)), "experiments": _brief(results)}


def _experiment(name: str, scale: str, data: str | None, out: Path, workers: int) -> dict[str, Any]:
    from nestlearn.tasks.optim import curvature, orthogonal_tasks, step_time

    if name == "curvature":
        return curvature.run(scale, out, workers)
    if name == "orthogonal":
        return orthogonal_tasks.run(scale, out, workers)
    if name == "step-time":
        return step_time.run(scale, out)
    return _models(name, scale, data, out, workers)


def _models(name: str, scale: str, data: str | None, out: Path, workers: int) -> dict[str, Any]:
    """Section 9.7, ``"vision"`` or ``"language"``: the search on every data set that is there."""
    from nestlearn.tasks.cells import Cell, run_cells
    from nestlearn.tasks.optim import optimizers
    from nestlearn.tasks.optim.search import Effort, search

    if name == "vision":
        from nestlearn.tasks.optim.vision import available, train

        settings = [dataset for dataset in DATASETS if dataset in available(data)]
    else:
        from nestlearn.tasks.optim.language import train

        settings = ["stdlib"]
    absent = [d for d in DATASETS if d not in settings] if name == "vision" else []
    not_run = dict.fromkeys(absent, "no data: give --data DIR with mnist/ and cifar10/")
    missing = {optimizer: optimizers.missing(optimizer) for optimizer in MODEL_OPTIMIZERS[name]}

    def make_cell(setting: str, optimizer: str, lr: float, seed: int) -> Cell:
        own, where = ({"dataset": setting}, {"data": data}) if name == "vision" else ({"data": None}, {})
        arguments = dict(optimizer=optimizer, lr=lr, seed=seed, scale=scale, **own)
        return Cell(f"{name}-{setting}-{optimizer}-lr{lr:g}-seed{seed}", train, arguments, where)

    present = [optimizer for optimizer in MODEL_OPTIMIZERS[name] if missing[optimizer] is None]
    found, seeds = {}, 1
    for setting in settings:
        effort = Effort(POINTS[setting]) if scale == "cpu" else Effort(points=1, extensions=0, seeds=(0,))
        found |= search(name, [setting], present, make_cell, lambda cells: run_cells(cells, out, workers, name), effort)
        seeds = len(effort.seeds)
    not_run |= {optimizer: reason for optimizer, reason in missing.items() if reason is not None}
    return {"settings": found, "not_run": not_run, "seeds": seeds}


def _brief(value: Any) -> Any:
    """A result without what is only drawn."""
    if isinstance(value, dict):
        return {key: _brief(item) for key, item in value.items() if key not in ("runs", "path")}
    return value


def _command(name: str, scale: str, data: str | None) -> str:
    given = ["--data", "DIR"] if data is not None and name == "vision" else []
    return shlex.join(["nestlearn", "bench", "optim", "--only", name, "--scale", scale, *given])


def _machine() -> str:
    """What the times depend on."""
    import torch

    return f"{platform.machine()}, threads: {torch.get_num_threads()}, torch {torch.__version__}"
