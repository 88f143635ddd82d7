"""The paper's evidence, sections 9.2 to 9.6, at any scale: ``nestlearn eval --suite core``.

What a task is and what the suite does for it stands in `nestlearn.tasks.suite`. Models come by name from
`nestlearn.tasks.core.models`, the paper's numbers from `nestlearn.tasks.core.paper`, tables and sentences on order from
`nestlearn.tasks.report`.

Nothing is imported here, so that the command line can check names before it loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.tasks.suite import SCALES, Suite, run_suite

__all__ = ["SCALES", "TASKS", "run"]

TASKS = {  # in the order of the report
    "formal": "nestlearn.tasks.core.formal",
    "mad": "nestlearn.tasks.core.mad",
    "niah": "nestlearn.tasks.core.niah",
    "babilong": "nestlearn.tasks.core.babilong",
    "language": "nestlearn.tasks.core.language",
    "ablation": "nestlearn.tasks.core.ablation",
    "forgetting": "nestlearn.tasks.core.forgetting",
}
HEAD = (
    "Every row of a table had the same search: the learning rates of its recipe at the first seed, the best on "
    "validation data, which then runs with all seeds. `±` is the standard deviation over the seeds; in italics stands "
    "the paper's number, of models and data far larger than these unless the scale is the paper's own."
)


def run(only: Sequence[str], scale: str, data: str | None, out: Path, workers: int) -> dict[str, Any]:
    """Run tasks of `TASKS`, see `nestlearn.tasks.suite.run_suite`."""
    return run_suite(Suite("core", "Hope against the paper", HEAD, TASKS), only, scale, data, out, workers)
