"""An experiment as cells: single runs that are computed once, in any order, and kept.

A cell is a name, a function and its arguments. Its result is one JSON file; a cell that has one is never run again.
So an experiment that is killed at any moment goes on where it was, by the same call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nestlearn.errors import UserError
from nestlearn.files import finite, read_json, write_json

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    ``name`` is that of its file, unique in the experiment. ``function`` stands in a module, so that another process
    finds it, and gives a dictionary that JSON can hold; ``arguments`` are its keyword arguments, of JSON's types.
    ``where`` are further ones that say where things are, as the path of a data set: they may change from one call to
    the next, and no file has them.
    """

    name: str
    function: Callable[..., Result]
    arguments: Mapping[str, Any]
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run_cells(
    cells: Sequence[Cell], folder: Path, workers: int = 1, label: str = "cells", later: int = 0
) -> dict[str, Result]:
    """The result of every cell by name; those without a file ``folder/cells/NAME.json`` are run first.

    With more than one worker each cell runs in a process of its own with one thread, otherwise here. A function that
    raises `NotFiniteGradient` gives ``{"diverged": true}``. Numbers that are not finite become null. The bar counts
    ``later`` cells in, which are to come in another call.

    Raises:
        UserError: a finished cell has other arguments than now, its file is damaged, or a process was killed.
        RuntimeError: a function failed in a process; its traceback is on stderr.
        KeyboardInterrupt: with a message that says what is kept. Finished cells always are.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> run_cells([Cell("two", dict, {"value": 2})], folder)
    {'two': {'value': 2}}
    """
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names), "two cells of one name"
    results = {name: record["result"] for name, record in finished_cells(cells, folder).items()}
    waiting = [cell for cell in cells if cell.name not in results]
    run = _run_here(waiting, folder) if workers == 1 else _run_beside(waiting, folder, workers)
    with tqdm(total=len(cells) + later, initial=len(results), desc=label, unit="cell", disable=not waiting) as bar:
        try:
            with contextlib.closing(run):
                for name, result in run:
                    results[name] = result
                    bar.update()
        except KeyboardInterrupt as stop:
            kept = f"{len(results)} of {len(cells)} cells of {label} are finished and kept in {folder}"
            raise KeyboardInterrupt(f"interrupted: {kept}; the same command goes on") from stop
    return {name: results[name] for name in names}


def finished_cells(cells: Sequence[Cell], folder: Path) -> dict[str, dict[str, Any]]:
    """What is kept of those cells that are finished, by name: ``result``, ``seconds`` and ``commit``.

    Raises `UserError` like `run_cells`.
    """
    return {cell.name: _finished(cell, folder) for cell in cells if _path(cell, folder).exists()}


def diverged(result: Result, key: str) -> bool:
    """Whether a result has no number ``key``: it counts as worse than any.

    >>> diverged({"diverged": True}, "loss"), diverged({"loss": None}, "loss"), diverged({"loss": 2.0}, "loss")
    (True, True, False)
    """
    return bool(result.get("diverged")) or result.get(key) is None


def _path(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _description(cell: Cell) -> dict[str, Any]:
    """What a file says about the cell that made it."""
    function = f"{cell.function.__module__}.{cell.function.__qualname__}"
    return {"function": function, "arguments": json.loads(json.dumps(dict(cell.arguments), allow_nan=False))}


def _finished(cell: Cell, folder: Path) -> dict[str, Any]:
    """The cell's file, if it is of this very cell."""
    path = _path(cell, folder)
    found = read_json(path, "delete it, and that cell is run again")
    now = _description(cell)
    for key, value in {**now["arguments"], "function": now["function"]}.items():
        place = found if key == "function" else found.get("arguments", {})
        if place.get(key) != value:
            raise UserError(f"{path} was made with {key}={place.get(key)!r}, now {key}={value!r}: give another folder")
    if not isinstance(found.get("result"), dict) or set(found["arguments"]) != set(now["arguments"]):
        raise UserError(f"{path} is of another version of this experiment: give another folder")
    return found


@functools.cache
def commit() -> str | None:
    """The commit of this package's code, with ``-dirty`` after changes; ``None`` outside a repository of its own.

    Asked once a process, before its first cell: code that is edited later is not what runs.
    """
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        tracked = subprocess.run([*words[:3], "ls-files", "--error-unmatch", __file__], capture_output=True)
        found = subprocess.run(words, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return found.stdout.strip() or None if tracked.returncode == 0 else None


def _finish(cell: Cell, folder: Path) -> tuple[str, Result]:
    """Run a cell and write its file. The process that computes it writes it, so that it outlives its parent."""
    code = commit()
    begin = time.perf_counter()
    try:
        result = finite(cell.function(**cell.arguments, **cell.where))
    except RuntimeError as error:
        from nestlearn.optim import NotFiniteGradient  # loads torch, which not every cell needs

        if not isinstance(error, NotFiniteGradient):
            raise
        result = {"diverged": True}
    result = json.loads(json.dumps(result, allow_nan=False))  # fresh and read again are one
    seconds = round(time.perf_counter() - begin, 3)
    write_json(_path(cell, folder), {**_description(cell), "commit": code, "seconds": seconds, "result": result})
    return cell.name, result


def _run_here(cells: Sequence[Cell], folder: Path) -> Generator[tuple[str, Result], None, None]:
    for cell in cells:
        yield _finish(cell, folder)


def _run_beside(cells: Sequence[Cell], folder: Path, workers: int) -> Generator[tuple[str, Result], None, None]:
    """Run cells in processes; leaving early ends the processes at once.

    Each process has a pipe of its own. A pool has queues and locks that all share: the one of Python 3.11 may hang for
    ever when a process is killed.
    """
    waiting = list(reversed(cells))
    context = multiprocessing.get_context("spawn")
    crew: dict[Connection, tuple[BaseProcess, str]] = {}  # with the name of its cell
    with _environment("OMP_NUM_THREADS", "1"):  # read when a process loads torch: it cannot be set there
        try:
            for _ in range(min(workers, len(cells))):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there, folder))
                process.start()
                there.close()  # so that its death closes the pipe
                crew[here] = process, _hand(here, waiting.pop())
            while crew:
                for connection in multiprocessing.connection.wait(list(crew)):
                    assert isinstance(connection, Connection)
                    process, name = crew[connection]
                    answer = _answer(connection, process, name, folder)
                    if waiting:
                        crew[connection] = process, _hand(connection, waiting.pop())
                    else:
                        del crew[connection]
                        connection.close()  # it ends by itself
                        process.join()
                    yield answer
        finally:
            for connection, (process, _) in crew.items():
                process.kill()
                process.join()
                connection.close()


def _hand(connection: Connection, cell: Cell) -> str:
    """Give a process its next cell; the cell's name. That the process is dead shows when it is to answer."""
    with contextlib.suppress(BrokenPipeError):
        connection.send(cell)
    return cell.name


def _answer(connection: Connection, process: BaseProcess, name: str, folder: Path) -> tuple[str, Result]:
    """What a process says of its cell."""
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        if process.exitcode == 1:  # as Python ends after an exception
            raise RuntimeError(f"the cell {name} failed; its traceback stands above") from error
        raise UserError(
            f"the process of cell {name} was killed, perhaps for want of memory (finished cells are kept in {folder}): "
            "run again with fewer workers"
        ) from error
    if isinstance(answer, UserError):
        raise answer
    return answer


def _work(connection: Connection, folder: Path) -> None:
    """The life of a process: cells come in, results go out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # do not outlive a killed parent

    threading.Thread(target=follow, daemon=True).start()
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        try:
            answer = _finish(cell, folder)
        except UserError as error:
            answer = error
        connection.send(answer)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old
