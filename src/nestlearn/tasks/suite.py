"""A suite of tasks: run, resumed, and reported in one folder.

A task is a module with three names:

* ``TITLE``: of its section in the report, with the number of the paper's table or figure;
* ``plan(scale, data) -> Plan``: what to run (`nestlearn.tasks.plan`). ``scale`` is of `SCALES`, ``data`` the
  folder of real data or ``None``. A row that cannot be run, for want of data or of a block type, has a ``reason``;
  the plan itself never fails for that;
* ``section(found, folder) -> str``: Markdown from `nestlearn.tasks.plan.outcomes`, which may miss any number. It
  may draw figures into ``folder`` and name them as ``![what it shows](file.png)``.

The suite does the rest: resuming, processes, the equal search, the recipe, command, commit and runs behind every
number. Nothing that loads torch is imported here before it is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nestlearn.errors import UserError, require_extra
from nestlearn.files import read_json, write_json
from nestlearn.tasks.request import check

SCALES = ("smoke", "cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that share a report.

    Args:
        name: after ``nestlearn eval --suite``.
        title: of the report; the scale is added.
        head: the paragraph below it.
        tasks: name to module, in the order of the report.
    """

    name: str
    title: str
    head: str
    tasks: Mapping[str, str]


def run_suite(
    suite: Suite, only: Sequence[str], scale: str, data: str | None, out: Path, workers: int
) -> dict[str, Any]:
    """Run tasks, keep every cell in ``out/cells`` and write ``out/report`` over all that ``out`` holds.

    Args:
        suite: its tasks, and what the report is called.
        only: names of tasks; none means all.
        scale: ``"smoke"`` to see in a minute or two that everything works, ``"cpu"``, or ``"gpu"``.
        data: the folder of real data, or ``None``; what needs it is then not run.
        out: the run folder; what it has already is not computed again.
        workers: processes at a time.

    Returns ``folder``, ``report`` and ``html`` (paths), and ``tasks``: of each what `outcomes` gives, without the
    single runs.

    Raises:
        UserError: an unknown name, fewer workers than one, a folder of another scale, or no GPU for its scale.
        KeyboardInterrupt: with a message that says what is kept; the report is then written too.
    """
    chosen = check("task", only, suite.tasks, scale, SCALES, workers)

    require_extra("matplotlib", "the report")  # before anything long
    if scale == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise UserError("no GPU is there for --scale gpu: give --scale cpu")
    _claim(out, suite.name, scale)
    from nestlearn.tasks.plan import Plan, carry_out, outcomes
    from nestlearn.tasks.report import provenance, write

    found = {}

    def keep(name: str, plan: Plan) -> None:
        found[name] = outcomes(plan, out)
        order = [[setting, list(models)] for setting, models in found[name].items()]  # files are sorted by name
        kept = {**provenance(suite, name, scale, data), "recipe": plan.recipe(), "found": found[name], "order": order}
        write_json(out / "tasks" / f"{name}.json", kept)

    try:
        for name in chosen:
            plan = import_module(suite.tasks[name]).plan(scale, data)
            try:
                carry_out(plan, out, workers)
            finally:
                keep(name, plan)
    finally:
        paths = write(suite, out)
    return {"folder": str(out), **paths, "tasks": {name: _brief(value) for name, value in found.items()}}


def _claim(out: Path, suite: str, scale: str) -> None:
    """Note suite and scale in a new folder; refuse one of another suite or scale."""
    path = out / "suite.json"
    now = {"suite": suite, "scale": scale}
    if not path.exists():
        write_json(path, now)
        return
    old = read_json(path, "give another folder")
    for key, value in now.items():
        if old.get(key) != value:
            raise UserError(f"{out} holds results of {key} '{old.get(key)}', now '{value}': give another folder")


def _brief(value: Any) -> Any:
    """A result without single runs."""
    if isinstance(value, dict):
        return {key: _brief(item) for key, item in value.items() if key != "runs"}
    return value
