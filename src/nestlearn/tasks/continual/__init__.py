"""A pretrained model that keeps learning, section 9.1 and beyond: ``nestlearn eval --suite continual``.

What a task is and what the suite does for it stands in `nestlearn.tasks.suite`. The model is SmolLM2-135M-Instruct
(``nestlearn pull smollm2``), and at scale smoke a tiny one with random weights.

Nothing is imported here, so that the command line can check names before it loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.tasks.suite import Suite, run_suite

TASKS = {  # in the order of the report
    "class-incremental": "nestlearn.tasks.continual.class_incremental",
    "knowledge": "nestlearn.tasks.continual.knowledge",
    "speed": "nestlearn.tasks.continual.speed",
}
HEAD = (
    "Every row of a table had the same search: as many learning rates (or numbers of demonstrations) at the first "
    "seed, the best on validation data, which then runs with all seeds. `±` is the standard deviation over the seeds."
)


def run(only: Sequence[str], scale: str, data: str | None, out: Path, workers: int) -> dict[str, Any]:
    """Run tasks of `TASKS`, see `nestlearn.tasks.suite.run_suite`."""
    return run_suite(Suite("continual", "A model that keeps learning", HEAD, TASKS), only, scale, data, out, workers)
