"""The paper's evidence, sections 9.2 to 9.6, at any scale: ``nestlearn eval --suite core``.

A task is a module in `TASKS` with three names:

* ``TITLE``: of its section in the report, with the number of the paper's table;
* ``plan(scale, data) -> Plan``: what to run (`nestlearn.tasks.core.plan`). ``scale`` is of `SCALES`, ``data`` the
  folder of real data or ``None``. A row that cannot be run, for want of data or of a block type, has a ``reason``;
  the plan itself never fails for that;
* ``section(found, folder) -> str``: Markdown from `nestlearn.tasks.core.plan.outcomes`, which may miss any number. It
  may draw figures into ``folder`` and name them as ``![what it shows](file.png)``.

The suite does the rest: resuming, processes, the equal search, the recipe, command, commit and runs behind every
number. Models come by name from `nestlearn.tasks.core.models`, the paper's numbers from `nestlearn.tasks.core.paper`,
tables and sentences on order from `nestlearn.tasks.core.report`.

Nothing is imported here, so that the command line can check names before it loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nestlearn.errors import UserError, nearest
from nestlearn.files import read_json, write_json

TASKS = {  # in the order of the report
    "formal": "nestlearn.tasks.core.formal",
    "mad": "nestlearn.tasks.core.mad",
    "niah": "nestlearn.tasks.core.niah",
    "babilong": "nestlearn.tasks.core.babilong",
    "language": "nestlearn.tasks.core.language",
    "ablation": "nestlearn.tasks.core.ablation",
    "forgetting": "nestlearn.tasks.core.forgetting",
}
SCALES = ("smoke", "cpu", "gpu")


def run(only: Sequence[str], scale: str, data: str | None, out: Path, workers: int) -> dict[str, Any]:
    """Run tasks, keep every cell in ``out/cells`` and write ``out/report`` over all that ``out`` holds.

    Args:
        only: names of `TASKS`; none means all.
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
    for name in only:
        if name not in TASKS:
            raise UserError(f"unknown task '{name}'; {nearest(name, TASKS)}")
    if scale not in SCALES:
        raise UserError(f"unknown scale '{scale}'; {nearest(scale, SCALES)}")
    if workers < 1:
        raise UserError(f"--workers is the number of processes, 1 or more, got {workers}")
    chosen = [name for name in TASKS if name in only or not only]

    from nestlearn.data.text_files import require_extra

    require_extra("matplotlib", "the report")  # before anything long
    if scale == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise UserError("no GPU is there for --scale gpu: give --scale cpu")
    _claim(out, scale)
    from nestlearn.tasks.core.plan import Plan, carry_out, outcomes
    from nestlearn.tasks.core.report import provenance, write

    found = {}

    def keep(name: str, plan: Plan) -> None:
        found[name] = outcomes(plan, out)
        order = [[setting, list(models)] for setting, models in found[name].items()]  # files are sorted by name
        kept = {**provenance(name, scale, data), "recipe": plan.recipe(), "found": found[name], "order": order}
        write_json(out / "tasks" / f"{name}.json", kept)

    try:
        for name in chosen:
            plan = import_module(TASKS[name]).plan(scale, data)
            try:
                carry_out(plan, out, workers)
            finally:
                keep(name, plan)
    finally:
        paths = write(out)
    return {"folder": str(out), **paths, "tasks": {name: _brief(value) for name, value in found.items()}}


def _claim(out: Path, scale: str) -> None:
    """Note the scale in a new folder; refuse one of another scale."""
    path = out / "suite.json"
    if not path.exists():
        write_json(path, {"suite": "core", "scale": scale})
        return
    old = read_json(path, "give another folder").get("scale")
    if old != scale:
        raise UserError(f"{out} holds results of scale '{old}', now '{scale}': give another folder")


def _brief(value: Any) -> Any:
    """A result without single runs."""
    if isinstance(value, dict):
        return {key: _brief(item) for key, item in value.items() if key != "runs"}
    return value
