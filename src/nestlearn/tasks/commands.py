"""``nestlearn bench``, and the suites of ``nestlearn eval``. Heavy imports are inside."""

from __future__ import annotations

import os
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from nestlearn.errors import UserError, nearest
from nestlearn.json_option import Json, print_json
from nestlearn.tasks import EVALUATIONS, SUITES


def bench(
    suite: Annotated[
        str, typer.Argument(help="optim: the paper's experiments on optimizers; speed: ours and peers, timed.")
    ],
    only: Annotated[
        str | None,
        typer.Option(
            help="Some of curvature, orthogonal, vision, language, step-time; or of block, one-token, model, prefill, "
            "decode, stream, memory, muon.",
            metavar="NAME,NAME",
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="cpu, or smoke to see in a minute that everything works; speed also has full: hours.")
    ] = "cpu",
    data: Annotated[
        str | None, typer.Option(help="A folder with mnist/ and cifar10/. By default NESTLEARN_DATA.", metavar="DIR")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; it goes on where it was. By default runs/bench-SUITE[-smoke].")
    ] = None,
    workers: Annotated[int, typer.Option(help="Runs at a time, each in a process with one thread.")] = 2,
    as_json: Json = False,
) -> None:
    """Run the paper's experiments on optimizers, or time ours beside every peer, and write a report.

    Finished runs are kept at once, so after Ctrl-C or a crash the same command goes on. The folder holds report.md with
    every table, the figures, and the result of each run in cells/.

    Example: nestlearn bench optim --only curvature --scale smoke
    """
    result = _run_suite(SUITES, "bench", suite, scale, data, only, out, workers)
    if as_json:
        print_json(result)
    else:
        print(Path(result["report"]).read_text(encoding="utf-8"))
        print(f"report: {result['report']}")


def evaluate_suite(
    suite: str, scale: str, data: str | None, only: str | None, out: Path | None, workers: int, as_json: bool
) -> None:
    """``nestlearn eval --suite``: run what is left of it, and say where the report is and what was not run.

    Raises `UserError` if nothing could be run and nothing was kept before.
    """
    result = _run_suite(EVALUATIONS, "eval", suite, scale, data, only, out, workers)
    lines, some = _not_run(result["tasks"])
    if not some:
        raise UserError(f"nothing could be run: {'; '.join(lines)}")
    for line in lines:
        print(line, file=sys.stderr)
    if as_json:
        print_json(result)
    else:
        print(f"report: {result['report']}\n        {result['html']}")


def _not_run(tasks: dict[str, Any]) -> tuple[list[str], bool]:
    """A line for every task and reason why rows of it have no result; and whether any row of any task has one."""
    lines, some = [], False
    for name, settings in tasks.items():
        outcomes = [outcome for models in settings.values() for outcome in models.values()]
        reasons = Counter(outcome["reason"] for outcome in outcomes if outcome["state"] == "not run")
        some = some or reasons.total() < len(outcomes)
        lines += [f"{name}: {count} of {len(outcomes)} rows not run ({reason})" for reason, count in reasons.items()]
    return lines, some


def _run_suite(
    suites: dict[str, str],
    command: str,
    suite: str,
    scale: str,
    data: str | None,
    only: str | None,
    out: Path | None,
    workers: int,
) -> dict[str, Any]:
    """What the module of a suite makes of the options."""
    if suite not in suites:
        raise UserError(f"unknown suite '{suite}'; {nearest(suite, suites)}")
    names = [] if only is None else [name.strip() for name in only.split(",")]
    folder = data or os.environ.get("NESTLEARN_DATA") or None
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"no folder {folder!r} of data: give one with --data, or in NESTLEARN_DATA")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder with --out")
    usual = Path("runs") / "-".join([command, suite, *([] if scale == "cpu" else [scale])])
    try:
        return import_module(suites[suite]).run(names, scale, folder, out or usual, workers)
    except KeyboardInterrupt as stop:  # without a message while the imports go on
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from stop
