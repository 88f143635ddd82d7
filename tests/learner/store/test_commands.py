"""``nestlearn memory``: what it prints, as text and as JSON, and with which exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn import cli
from nestlearn.files import write_atomic
from nestlearn.learner.store import Store

COMMANDS = ["log", "show", "diff", "rollback", "fork", "merge", "drop", "gc", "verify"]


class Shell:
    """Runs ``nestlearn memory WORDS`` in this process, on the store in ``folder``."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._capsys, self._monkeypatch = folder, capsys, monkeypatch

    def __call__(self, command: str, *words: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["nestlearn", "memory", command, str(self.folder), *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        out, err = self._capsys.readouterr()
        return stop.value.code, out, err

    def json(self, command: str, *words: str) -> Any:
        code, out, err = self(command, *words, "--json")
        assert (code, err, out.count("\n")) == (0, "", 1)
        return json.loads(out)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A store with before, two automatic ones of which one was pruned, after, and a branch ``side`` from before."""
    monkeypatch.setenv("COLUMNS", "140")
    store = Store(tmp_path / "memory", base="b" * 64)
    for i in range(4):
        tensors = {"level-1": {"up [0]": torch.tensor([3.0, 4.0 + i])}, "level-2": {"up": torch.ones(2)}}
        name = {0: "before", 3: "after"}.get(i)
        store.save(tensors, {"tokens": 51200 * i, "loss": 3.5 - i / 4, "auto": name is None}, name=name)
    store.prune(1)
    store.fork("side", "before").save({"level-1": {"up [0]": torch.tensor([3.0, 12.0])}}, {})
    return Shell(store.folder, capsys, monkeypatch)


def test_log(shell: Shell) -> None:
    code, out, err = shell("log")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.lstrip()[12:16].startswith("   2")]
    assert [row[3:5] for row in rows] == [["153,600", "2.7500"], ["102,400", "3.0000"], ["0", "3.5000"]]
    assert "after, branch main" in out
    assert "1 pruned before it" in out
    assert "other branches: side" in out
    found = shell.json("log")
    assert [s["name"] for s in found["snapshots"]] == ["after", None, "before"]
    assert [s["pruned"] for s in found["snapshots"]] == [0, 1, 0]
    assert found["branches"].keys() == {"main", "side"}
    assert [s["name"] for s in shell.json("log", "head~1")["snapshots"]] == [None, "before"]
    assert [s["name"] for s in shell.json("log", "--branch", "side")["snapshots"]] == [None, "before"]


def test_show(shell: Shell) -> None:
    code, out, _ = shell("show", "after")
    found = shell.json("show", "after")
    assert code == 0
    assert f"snapshot  {found['id']}" in out
    assert found["levels"]["level-1"]["object"][:12] in out
    assert '"tokens": 153600' in out
    assert found["meta"] == {"tokens": 153600, "loss": 2.75, "auto": False}


def test_diff(shell: Shell) -> None:
    code, out, _ = shell("diff", "before", "after")
    assert code == 0
    assert "from before to after" in out
    assert ["level-1", "2", "3", "60.000%"] in [line.split() for line in out.splitlines()]
    assert ["up", "[0]", "3", "60.000%"] in [line.split() for line in out.splitlines()]
    assert ["level-2", "2", "0", "0.000%"] in [line.split() for line in out.splitlines()]
    level = shell.json("diff", "before", "after")["levels"][0]
    assert (level["moved"], level["relative"], level["blocks"][0]["name"]) == (3.0, 0.6, "up [0]")
    assert "in one of them only: up" in shell("diff", "after", "side")[1]


def test_rollback_says_how_to_go_back(shell: Shell) -> None:
    code, out, _ = shell("rollback", "before")
    assert code == 0
    first, back = out.strip().split("; back with: ")
    assert first.endswith("(before)")
    assert first.startswith("main is at ")
    assert shell.json("log")["snapshots"][0]["name"] == "before"
    assert back.split()[:3] == ["nestlearn", "memory", "rollback"]
    moved = shell.json("rollback", back.split()[-1])
    assert moved["branch"] == "main"
    assert shell.json("log")["snapshots"][0]["name"] == "after"


def test_fork_merge_drop_gc(shell: Shell) -> None:
    assert "other begins at" in shell("fork", "other", "before")[1]
    assert shell.json("fork", "third")["at"] == shell.json("show", "after")["id"]
    code, _, err = shell("merge", "before", "side")
    assert (code, "cannot merge 'level-2'" in err) == (2, True)
    code, out, _ = shell("merge", "main", "other", "--weight", "1", "--name", "both")
    assert (code, "main is at" in out) == (0, True)
    merged = shell.json("show", "both")
    assert len(merged["parents"]) == 2
    assert shell.json("diff", "both", "before")["levels"][0]["moved"] == 0
    code, _, err = shell("merge", "main", "other", "--name", "both")
    assert (code, "is taken" in err) == (2, True)
    assert shell.json("merge", "main", "other", "--name", "both", "--move")["name"] == "both"
    assert "merged with" in shell("log")[1]
    assert shell("drop", "side")[:2] == (0, "dropped side\n")
    assert shell.json("drop", "other") == {"dropped": "other"}
    assert shell.json("gc")["snapshots"] == 1
    assert shell("gc")[1] == "removed 0 snapshots and 0 objects: 0.0 MB\n"


@pytest.mark.parametrize("writes", [0, 1])
def test_gc_on_a_full_disk_keeps_the_store(shell: Shell, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    left = writes

    def full(path: Path, write: Callable[[Path], object]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomic(path, write)

    shell("drop", "side")
    before = shell.json("log")
    with monkeypatch.context() as patch:
        patch.setattr("nestlearn.learner.store.references.write_atomic", full)
        patch.setattr("nestlearn.files.write_atomic", full)
        code, out, err = shell("gc")
    if writes == 0:
        assert (code, out) == (2, "")
        assert err == (
            f"error: cannot use the store {shell.folder} (No space left on device): what was kept is as it was; "
            "free some space\n"
        )
    assert shell.json("log") == before
    assert shell.json("verify")["problems"] == []
    assert shell.json("gc")["snapshots"] == (1 if code else 0)


def test_verify_names_what_is_damaged(shell: Shell) -> None:
    code, out, err = shell("verify")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "everything is whole"
    path = shell.folder / "objects" / f"{shell.json('show', 'after')['levels']['level-1']['object']}.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    code, out, err = shell("verify")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{path} is damaged (truncated or changed)" in out
    assert "[in after]" in out
    assert f"problems: 1): back to the newest whole snapshot with: nestlearn memory rollback {shell.folder} " in err
    code, out, err = shell("verify", "--json")
    assert (code, len(json.loads(out)["problems"])) == (2, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "afetr"], "no snapshot 'afetr'; did you mean 'after'?"),
        (["rollback", "head~9"], "at most ~2 is allowed here"),
        (["log", "--branch", "sied"], "has no branch 'sied'; did you mean 'side'?"),
        (["fork", "head"], "choose another branch"),
        (["drop", "x"], "no name or branch 'x'"),
        (["diff", "before"], "Missing argument 'B'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(shell: Shell, words: list[str], message: str) -> None:
    code, out, err = shell(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_a_store_stays_as_it_is(shell: Shell, tmp_path: Path) -> None:
    shell.folder = tmp_path / "nowhere"
    code, _, err = shell("log")
    assert (code, err) == (2, f"error: {shell.folder} holds no memory store: check the path\n")
    assert not shell.folder.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(sys, "argv", ["nestlearn", "memory", command, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert "--json" in out
    assert f"Example: nestlearn memory {command}" in out


def test_help_and_log_need_no_torch(shell: Shell) -> None:
    code = (
        "import sys; from nestlearn import cli; sys.argv = ['nestlearn', 'memory', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    for words in (["diff", "--help"], ["log", str(shell.folder)], ["gc", str(shell.folder)]):
        finished = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
