"""Whoever is killed, wherever: the store opens again, whole, with the last complete snapshot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.learner.store import Store
from nestlearn.learner.store.snapshot import listed
from tests.conftest import ROOT

BASE = "b" * 64
CALLS = [(os, "replace"), (os, "fsync"), (os, "unlink"), (os, "chmod"), (os, "mkdir"), (tempfile, "mkstemp")]


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it touches the disk, no ``finally`` either."""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted, but not waited for


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"level-1": {"w": torch.full((2,), value)}, "level-2": {"w": torch.full((2,), value // 2)}}


def build(folder: Path) -> None:
    """main: 0 (named zero), 1, 2, 3, 4 automatic; side: from zero; a tail of six that gc may take."""
    store = Store(folder, BASE)
    for i in range(5):
        store.save(state(i), {"i": i, "auto": i > 0}, name=None if i else "zero")
    store.fork("side", "zero").save(state(8), {"i": 8})
    for i in range(10, 16):
        store.save(state(i), {"i": i, "auto": True})
    store.rollback("head~6")


OPERATIONS: dict[str, Callable[[Store], Any]] = {
    "open": lambda store: Store(store.folder, BASE),
    "save": lambda store: store.save(state(20), {"i": 20}, name="new"),
    "move": lambda store: store.save(state(21), {"i": 21}, name="zero", move=True),
    "rollback": lambda store: store.rollback("side"),
    "fork": lambda store: store.fork("other", "zero"),
    "merge": lambda store: store.merge("main", "side", name="both"),
    "drop": lambda store: store.drop("side"),
    "gc": lambda store: store.gc(),
    "prune": lambda store: store.prune(1),
    "gc of much": lambda store: [store.drop("side"), store.drop("main"), store.gc()],
}


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """From the ``count``-th call on that changes or flushes the disk, every such call dies before it does anything."""
    left, unlink = [count], os.unlink

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if real is unlink and "leases" in Path(args[0]).parts:
                return unlink(*args, **kwargs)  # of a store that Python has just cleared away, not of the operation
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for module, name in CALLS:
        monkeypatch.setattr(module, name, guard(getattr(module, name)))


def everything(store: Store) -> dict[str, Any]:
    """What the references lead to, as values: branch or name to the history of i."""
    return {ref: [s.meta.get("i") for s in store.log(ref)] for ref in {**store.branches, **store.names}}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_call_that_touches_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    build(tmp_path / "template")
    operate, count, seen = OPERATIONS[operation], 0, []
    while True:
        folder = tmp_path / f"memory-{count}"
        shutil.copytree(tmp_path / "template", folder)
        shutil.rmtree(folder / "leases")
        store = Store(folder, BASE)
        before = everything(store)
        with monkeypatch.context() as patch:
            kill_at(patch, count)
            try:
                operate(store)
                died = False
            except Killed:
                died = True
        del store
        again = Store(folder, BASE)
        assert again.verify().problems == ()
        for identity in listed(folder):
            again.log(identity)  # what gc may take has all its history as long as it is there
        seen.append(everything(again))
        for ref in before.keys() & seen[-1].keys():
            assert again.load(ref)[1].meta["i"] == seen[-1][ref][0]
        again.gc()
        assert again.verify().problems == ()
        assert everything(again) == seen[-1]
        assert [path for path in folder.rglob(".*") if path.is_file()] == []
        if not died:
            break
        del again
        if operation not in ("drop", "gc of much"):  # those cannot be done twice
            once_more = Store(folder, BASE)
            if "new" not in once_more.names and "both" not in once_more.names and "other" not in once_more.branches:
                operate(once_more)
                assert once_more.verify().problems == ()
        count += 1
    assert count >= (1 if operation == "open" else 3)
    stages = [state for i, state in enumerate(seen) if i == 0 or state != seen[i - 1]]
    allowed = 3 if operation == "gc of much" else 2  # before, after; the two drops are one each
    assert len(stages) <= allowed


def test_killed_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    while True:
        folder = tmp_path / f"memory-{count}"
        with monkeypatch.context() as patch:
            kill_at(patch, count)
            try:
                Store(folder, BASE).save(state(1), {})
                break
            except Killed:
                pass
        again = Store(folder, BASE)
        again.save(state(2), {})
        assert again.verify().problems == ()
        count += 1
    assert count > 15


def run(code: str, *words: str) -> Any:
    """What a Python process of its own prints as JSON. It may fork, for it has no threads."""
    finished = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


KILLS = """
import json, os, random, signal, sys, time
import torch
from nestlearn.learner.store import Store

folder, base = sys.argv[1], "b" * 64
random.seed(int(sys.argv[2]))
acknowledged, killed_inside = 0, 0
for kill in range(25):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        store = Store(folder, base)
        i = store.get().meta["i"] + 1 if store.head() else 0
        while True:  # about 100 kB a save, a level that stays, automatic ones pruned, a name now and then
            tensors = {"fast": {"w": torch.full((25_000,), float(i))}, "slow": {"w": torch.full((9,), float(i // 9))}}
            store.save(tensors, {"i": i, "auto": i % 10 != 0}, name=None if i % 10 else f"n-{i}")
            os.write(writer, i.to_bytes(8, "little"))
            if i % 3 == 0:
                store.prune(2)
            if i % 7 == 0:
                store.gc()
            i += 1
    os.close(writer)
    first = os.read(reader, 8)
    time.sleep(random.random() * 0.15)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = first
    while more := os.read(reader, 1 << 16):
        told = more
    last = int.from_bytes(told[-8:], "little")
    os.close(reader)
    killed_inside += any(name.startswith(".") for _, _, names in os.walk(folder) for name in names)
    store = Store(folder, base)
    report = store.verify()
    assert report.problems == (), report
    tensors, head = store.load()
    i = head.meta["i"]
    assert last <= i <= last + 1, (last, i)  # what was acknowledged is there, and at most the one that was being saved
    assert tensors["fast"]["w"].eq(i).all() and tensors["slow"]["w"].eq(i // 9).all()
    assert set(store.names) == {f"n-{k}" for k in range(0, i + 1, 10)}
    assert set(store.branches) == {"main"}, store.branches
    acknowledged = last
store.gc()
left = [name for _, _, names in os.walk(folder) for name in names if name.startswith(".")]
print(json.dumps({"saves": acknowledged, "killed_inside": killed_inside, "left": left}))
"""


def test_sigkill_at_random_moments_of_a_save_loop(tmp_path: Path) -> None:
    found = run(KILLS, str(tmp_path / "memory"), "7")
    assert found["saves"] > 25  # one before each kill at the least
    assert found["killed_inside"] > 0  # the kills did hit saves
    assert found["left"] == []


CROWD = """
import json, os, random, sys
import torch
from nestlearn.learner.store import Store

folder, base, workers, saves = sys.argv[1], "b" * 64, 4, 12
os.fsync = lambda descriptor: None
Store(folder, base).save({"a": {"w": torch.zeros(9)}}, {"who": -1}, name="root")
pipes, children = [], []
for who in range(workers + 1):
    reader, writer = os.pipe()
    pipes.append(reader)
    child = os.fork()
    if child:
        os.close(writer)
        children.append(child)
        continue
    random.seed(who)
    store = Store(folder, base)
    if who == workers:  # one more process cleans up all the while, and moves branches under the others' feet
        for i in range(3 * saves):
            store = Store(folder, base)
            store.gc(), store.prune(0)
            if i % 5 == 0:
                store.rollback("root")
        os._exit(0)
    for i in range(saves):
        parent = store.head()
        made = store.save({"a": {"w": torch.full((9,), 100.0 * who + i)}}, {"who": who, "i": i}, name=f"w{who}-{i}")
        assert made.parents == (parent.id,), "a snapshot without what it was learned from"
        os.write(writer, f"{made.id} ".encode())
        if random.random() < 0.3:
            store = Store(folder, base, branch=store.branch)
            if store.head() != made:
                store = Store(folder, base)
    os._exit(0)
told = []
for reader in pipes:
    text = b""
    while more := os.read(reader, 1 << 16):
        text += more
    told += text.decode().split()
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
store = Store(folder, base)
store.gc()
report = store.verify()
lost = []
for identity in told:
    tensors, found = store.load(identity)
    if tensors["a"]["w"][0] != 100.0 * found.meta["who"] + found.meta["i"]:
        lost.append(identity)
print(json.dumps({"codes": codes, "told": len(set(told)), "names": len(store.names), "lost": lost,
                  "problems": report.problems, "branches": len(store.branches)}))
"""


def test_processes_at_once_never_lose_a_snapshot(tmp_path: Path) -> None:
    found = run(CROWD, str(tmp_path / "memory"))
    assert found["codes"] == [0] * 5
    assert (found["told"], found["names"], found["lost"], found["problems"]) == (48, 49, [], [])
    assert found["branches"] > 1  # they did meet


LONE = """
import json, os, sys
import torch
from nestlearn.learner.store import Store

folder, base = sys.argv[1], "b" * 64
os.fsync = lambda descriptor: None
Store(folder, base).save({}, {"i": "root"}, name="root")
told = []
for who in range(4):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        store = Store(folder, base)
        for i in range(15):
            os.write(writer, f"{store.save({'a': {'w': torch.tensor([who, i])}}, {}).id} ".encode())
        os._exit(0)
    os.close(writer)
    told.append((child, reader))
made = []
for child, reader in told:
    text = b""
    while more := os.read(reader, 1 << 16):
        text += more
    made.append(text.decode().split())
    os.waitpid(child, 0)
store = Store(folder, base)
removed = store.gc()
logs = {branch: [s.id for s in store.log(branch)] for branch in store.branches}
whole = [any(log[:15] == line[::-1] for log in logs.values()) for line in made]
print(json.dumps({"whole": whole, "removed": removed.snapshots, "problems": store.verify().problems}))
"""


def test_nameless_snapshots_of_processes_at_once_are_reached_by_branches(tmp_path: Path) -> None:
    """Four processes that began together: each one's line of fifteen is on a branch, whole and in order."""
    assert run(LONE, str(tmp_path / "memory")) == {"whole": [True] * 4, "removed": 0, "problems": []}
