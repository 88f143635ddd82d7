"""How fast: ``nestlearn bench speed`` times ours and every peer on identical work, in the same run.

Nothing is imported here, so that the command line can check names before it loads torch.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestlearn.files import write_json
from nestlearn.tasks.request import check

EXPERIMENTS = ("block", "one-token", "model", "prefill", "decode", "stream", "memory", "muon")
SCALES = ("smoke", "cpu", "full")


def run(only: Sequence[str], scale: str, data: str | None, out: Path, workers: int) -> dict[str, Any]:
    """Time, keep each experiment in ``out/NAME.json`` and write the report over all that ``out`` holds.

    Args:
        only: names of `EXPERIMENTS`; none means all.
        scale: ``"smoke"`` to see in a minute that everything works, ``"cpu"`` for about 15 minutes on two cores, or
            ``"full"``: 10 million tokens streamed, a 25 M model at 8,192 tokens, every peer at every size; hours.
        data: not used: all inputs are random.
        out: the run folder; what it has already is not timed again.
        workers: not used: nothing runs beside what is timed.

    Returns ``folder``, ``report`` and ``experiments``: of each its ``cells`` by name, and with
    them their ``commits``, the ``command``, the ``machine``, and the ``peers`` that were there.

    Raises:
        UserError: an unknown name, or a folder of another scale or other peers.
        KeyboardInterrupt: with a message that says what is kept.
    """
    chosen = check("experiment", only, EXPERIMENTS, scale, SCALES, workers)

    from nestlearn.tasks.cells import finished_cells, run_cells
    from nestlearn.tasks.speed import peers, report
    from nestlearn.tasks.speed.plan import cells

    experiments = {}
    for name in chosen:
        command = shlex.join(["nestlearn", "bench", "speed", "--only", name, "--scale", scale])
        planned = cells(name, scale)
        found = run_cells(planned, out, label=name)
        commits = {cell: record["commit"] for cell, record in finished_cells(planned, out).items()}
        experiments[name] = {
            "command": command,
            "commits": commits,
            "machine": _machine(),
            "peers": peers.installed(),
            "not_run": peers.not_run(),
            "cells": found,
        }
        write_json(out / f"{name}.json", experiments[name])
    return {"folder": str(out), "report": str(report.write(out)), "experiments": experiments}


def _machine() -> str:
    """What the times depend on."""
    import torch

    return f"{platform.machine()}, threads: {torch.get_num_threads()}, torch {torch.__version__}, float32"
