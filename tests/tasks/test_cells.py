"""Cells: computed once, kept at once, resumed after anything, in this process or in others."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nestlearn.errors import UserError
from nestlearn.tasks.cells import Cell, commit, diverged, finished_cells, run_cells

ROOT = Path(__file__).parents[2]


def square(value: float, log: str) -> dict[str, Any]:
    """Leaves a line in the file ``log`` each time that it runs."""
    with open(log, "a") as file:
        file.write(f"{value:g}\n")
    return {"square": value * value, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}


def strange() -> dict[str, Any]:
    return {"loss": float("nan"), "curve": [(1, float("inf")), (2, 0.5)], "diverged": True}


def explode() -> dict[str, Any]:
    from nestlearn.optim import NotFiniteGradient  # here, so that the processes of the other tests start quickly

    raise NotFiniteGradient("the gradient of 'w' is not finite")


def fail(kind: str) -> dict[str, Any]:
    if kind == "user":
        raise UserError("no such thing: give another")
    if kind == "bug":
        raise RuntimeError("a bug")
    os._exit(3)


def sleep(seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {}


def squares(folder: Path, values: range, **other: Any) -> list[Cell]:
    return [Cell(f"square-{v}", square, {"value": v, "log": str(folder / "log"), **other}) for v in values]


def test_a_finished_cell_is_never_run_again(tmp_path: Path) -> None:
    first = run_cells(squares(tmp_path, range(2)), tmp_path)
    again = run_cells(squares(tmp_path, range(3))[::-1], tmp_path)
    assert list(again) == ["square-2", "square-1", "square-0"]
    assert {name: again[name] for name in first} == first
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2"]
    kept = json.loads((tmp_path / "cells" / "square-2.json").read_text())
    assert kept["arguments"]["value"] == 2
    assert kept["function"].endswith("test_cells.square")
    assert kept["result"]["square"] == 4
    assert kept["seconds"] >= 0


def test_what_is_kept_can_be_read_without_running(tmp_path: Path) -> None:
    run_cells(squares(tmp_path, range(1)), tmp_path)
    kept = finished_cells(squares(tmp_path, range(2)), tmp_path)
    assert list(kept) == ["square-0"]
    assert kept["square-0"]["result"]["square"] == 0
    assert kept["square-0"]["commit"] == commit()
    assert (tmp_path / "log").read_text() == "0\n"


def test_the_commit_is_this_repository_s() -> None:
    words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    asked = subprocess.run(words, capture_output=True, text=True)
    if asked.returncode != 0:
        pytest.skip("not a git repository")
    found = commit()
    assert found is not None
    assert asked.stdout.startswith(found.removesuffix("-dirty"))


def test_the_bar_counts_what_comes_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cells(squares(tmp_path, range(2)), tmp_path, label="squares", later=6)
    assert "squares:  25%" in capsys.readouterr().err


def test_where_things_are_is_handed_on_and_not_kept(tmp_path: Path) -> None:
    there, elsewhere = (Cell("square-3", square, {"value": 3}, {"log": str(tmp_path / log)}) for log in "ab")
    assert run_cells([there], tmp_path) == run_cells([elsewhere], tmp_path)
    assert (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()  # finished already
    assert str(tmp_path) not in (tmp_path / "cells" / "square-3.json").read_text()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell("square-1", square, {"value": 3, "log": "x"}), "was made with value=1, now value=3"),
        (Cell("square-1", square, {"value": 1, "log": "x", "new": 1}), "was made with new=None, now new=1"),
        (Cell("square-1", square, {"value": 1}), "is of another version of this experiment"),
        (Cell("square-1", sleep, {"value": 1, "log": "x"}), "cells.square'"),
    ],
)
def test_other_arguments_are_one_line(tmp_path: Path, cell: Cell, message: str) -> None:
    same = Cell("square-1", square, {"value": 1, "log": "x"})
    (tmp_path / "cells").mkdir()
    kept = {"function": f"{square.__module__}.square", "arguments": dict(same.arguments), "result": {}}
    (tmp_path / "cells" / "square-1.json").write_text(json.dumps(kept))
    assert run_cells([same], tmp_path) == {"square-1": {}}
    with pytest.raises(UserError, match="another folder") as error:
        run_cells([cell], tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    cells = squares(tmp_path, range(1))
    run_cells(cells, tmp_path)
    (tmp_path / "cells" / "square-0.json").write_text("{")
    with pytest.raises(UserError, match="delete it, and that cell is run again"):
        run_cells(cells, tmp_path)


def test_what_is_not_finite_is_null_and_divergence_is_a_result(tmp_path: Path) -> None:
    results = run_cells([Cell("strange", strange, {}), Cell("explode", explode, {})], tmp_path)
    assert results["strange"] == {"loss": None, "curve": [[1, None], [2, 0.5]], "diverged": True}
    assert results["explode"] == {"diverged": True}
    assert all(diverged(result, "loss") for result in results.values())
    assert "NaN" not in (tmp_path / "cells" / "strange.json").read_text()
    assert run_cells([Cell("strange", strange, {})], tmp_path) == {"strange": results["strange"]}


def test_processes_have_one_thread_and_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    results = run_cells(squares(tmp_path, range(4)), tmp_path, workers=2)
    assert [result["square"] for result in results.values()] == [0, 1, 4, 9]
    assert {result["threads"] for result in results.values()} == {"1"}
    assert os.getpid() not in {result["pid"] for result in results.values()}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert multiprocessing.active_children() == []
    assert run_cells(squares(tmp_path, range(4)), tmp_path) == results


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("user", UserError, "no such thing"),
        ("bug", RuntimeError, "the cell fail failed"),
        ("death", UserError, "the process of cell fail was killed"),
    ],
)
def test_failures_keep_what_is_finished(tmp_path: Path, kind: str, error: type[Exception], message: str) -> None:
    run_cells(squares(tmp_path, range(1)), tmp_path)
    cells = [
        *squares(tmp_path, range(1)),
        Cell("fail", fail, {"kind": kind}),
        Cell("sleep", sleep, {"seconds": 10_000}),
    ]
    with pytest.raises(error, match=message) as found:  # and does not wait for the sleeper
        run_cells(cells, tmp_path, workers=2)
    assert "\n" not in str(found.value)
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["square-0.json"]


def _start(folder: Path, workers: int) -> subprocess.Popen[str]:
    """A process that runs two quick cells and two that never end, once the quick ones are there."""
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.tasks.test_cells import Cell, sleep, squares, run_cells\n"
        f"folder = Path({str(folder)!r})\n"
        "cells = [*squares(folder, range(2)), *(Cell(f's{i}', sleep, {'seconds': 1000}) for i in range(2))]\n"
        f"try: run_cells(cells, folder, {workers}, 'sums')\n"
        "except KeyboardInterrupt as stop: sys.exit(str(stop))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if all((folder / "cells" / f"square-{i}.json").exists() for i in range(2)):
            return process
        time.sleep(0.1)
    raise AssertionError("the cells did not start")


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_finished_cells_and_ends_the_processes(tmp_path: Path, workers: int) -> None:
    process = _start(tmp_path, workers)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    line = err.rstrip().split("\n")[-1]
    assert line == f"interrupted: 2 of 4 cells of sums are finished and kept in {tmp_path}; the same command goes on"
    assert "Traceback" not in err
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_processes_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    process = _start(tmp_path, 2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert len(list((tmp_path / "cells").iterdir())) == 2
