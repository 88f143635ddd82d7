"""Everything that a store can do, in any order, against a model of it in plain dicts."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nestlearn.errors import UserError
from nestlearn.learner.store import Store

INDEX = st.integers(0, 10**6)
VALUES = st.tuples(st.integers(0, 3), st.integers(0, 3))


@dataclass
class Known:
    """A snapshot in the model. ``number`` counts saves; ``parents`` and ``pruned`` change when others are pruned."""

    number: int
    values: tuple[float, ...]
    parents: list[str]
    auto: bool
    pruned: int = 0
    merged: bool = False


class StoreMachine(RuleBasedStateMachine):
    """Two stores are open on one folder; every rule takes one of them, and snapshots from all that exist."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.saves = 0
        self.known: dict[str, Known] = {}
        self.branches: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.open: list[Store] = []
        self.at: list[str | None] = [None, None]
        self.on = ["main", "main"]

    @initialize()
    def begin(self) -> None:
        self.open = [Store(self.folder, base="b" * 64) for _ in range(2)]

    def teardown(self) -> None:
        self.open.clear()
        shutil.rmtree(self.folder)

    def pick(self, index: int) -> str:
        in_order = sorted(self.known, key=lambda identity: self.known[identity].number)  # an id differs from run to run
        return in_order[index % len(in_order)]

    def moved(self, which: int, identity: str, expected: list[str | None]) -> None:
        branch, tip = self.on[which], self.branches.get(self.on[which])
        if tip is not None and tip not in expected:
            branch = next(b for n in range(2, 99) if (b := f"{branch}-{n}") not in {*self.branches, *self.names})
        self.branches[branch] = identity
        self.at[which], self.on[which] = identity, branch
        assert self.open[which].branch == branch

    def made(
        self, identity: str, values: tuple[float, float], parents: list[str], auto: bool, name: str | None
    ) -> None:
        self.saves += 1
        self.known[identity] = Known(self.saves, values, parents, auto)
        if name is not None:
            self.names[name] = identity

    @rule(which=st.integers(0, 1), values=VALUES, auto=st.booleans(), name=st.sampled_from([None, None, "x", "y"]))
    def save(self, which: int, values: tuple[int, int], auto: bool, name: str | None) -> None:
        tensors = {f"l{i}": {"w": torch.tensor([float(v)])} for i, v in enumerate(values)}
        made = self.open[which].save(tensors, {"auto": auto}, name=name, move=True)
        parents = [x for x in [self.at[which]] if x]
        self.made(made.id, tuple(map(float, values)), parents, auto, name)
        self.moved(which, made.id, [self.at[which]])

    @precondition(lambda self: self.names)
    @rule(which=st.integers(0, 1))
    def save_under_a_taken_name(self, which: int) -> None:
        with pytest.raises(UserError, match="is taken"):
            self.open[which].save({}, {}, name=min(self.names))

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 1), index=INDEX)
    def rollback(self, which: int, index: int) -> None:
        target = self.pick(index)
        self.open[which].rollback(target)
        self.moved(which, target, [self.at[which]])

    @precondition(lambda self: self.known and len(self.branches) < 6)
    @rule(which=st.integers(0, 1), index=INDEX, stay=st.booleans())
    def fork(self, which: int, index: int, stay: bool) -> None:
        name = next(b for n in range(99) if (b := f"side-{n}") not in {*self.branches, *self.names})
        target = self.pick(index)
        other = self.open[which].fork(name, target)
        self.branches[name] = target
        if not stay:
            self.open[which], self.at[which], self.on[which] = other, target, name

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 1), a=INDEX, b=INDEX, weight=st.sampled_from([0.0, 0.5, 1.0]))
    def merge(self, which: int, a: int, b: int, weight: float) -> None:
        first, second = self.pick(a), self.pick(b)
        made = self.open[which].merge(first, second, weight)
        x, y = self.known[first].values, self.known[second].values
        values = (x[0] + weight * (y[0] - x[0]), x[1] + weight * (y[1] - x[1]))
        self.made(made.id, values, list(dict.fromkeys([first, second])), False, None)
        self.known[made.id].merged = True
        self.moved(which, made.id, [first, second])

    @precondition(lambda self: self.branches)
    @rule(which=st.integers(0, 1), index=INDEX)
    def drop(self, which: int, index: int) -> None:
        name = sorted({*self.branches, *self.names})[index % len({*self.branches, *self.names})]
        self.open[which].drop(name)
        if self.names.pop(name, None) is None:
            del self.branches[name]

    @precondition(lambda self: self.branches)
    @rule(which=st.integers(0, 1), index=INDEX)
    def reopen(self, which: int, index: int) -> None:
        branch = sorted(self.branches)[index % len(self.branches)]
        self.open[which] = Store(self.folder, base="b" * 64, branch=branch)
        self.at[which], self.on[which] = self.branches[branch], branch

    @rule(which=st.integers(0, 1))
    def gc(self, which: int) -> None:
        kept = self.ancestors({*self.branches.values(), *self.names.values(), *self.at} - {None})
        gone = set(self.known) - kept
        assert self.open[which].gc().snapshots == len(gone)
        for identity in gone:
            del self.known[identity]

    @rule(which=st.integers(0, 1), keep=st.integers(0, 2))
    def prune(self, which: int, keep: int) -> None:
        history = self.ancestors({self.at[which]} - {None})
        standing = {*self.branches.values(), *self.names.values(), *self.at}
        automatic = [i for i in history if self.known[i].auto and i not in self.names.values()]
        automatic.sort(key=lambda identity: -self.known[identity].number)
        later = {i: [j for j, k in self.known.items() if i in k.parents] for i in self.known}
        line = {i for i in self.known if len(self.known[i].parents) <= 1}
        again = []  # the same state was saved right after
        for i in automatic:
            children = [self.known[j] for j in later[i]]
            if len(children) == 1 and not children[0].merged and children[0].values == self.known[i].values:
                again.append(i)
        gone = [
            i
            for i in [*again, *[i for i in automatic if i not in again][keep:]]
            if i not in standing and i in line and len(later[i]) == 1 and later[i][0] in line
        ]
        assert self.open[which].prune(keep).snapshots == len(gone)
        for identity in sorted(gone, key=lambda i: self.known[i].number):  # oldest first: its child is still there
            old = self.known.pop(identity)
            (child,) = [k for k in self.known.values() if identity in k.parents]
            child.parents, child.pruned = old.parents, child.pruned + 1 + old.pruned

    def ancestors(self, found: set[str]) -> set[str]:
        while more := {p for i in found for p in self.known[i].parents} - found:
            found = found | more
        return found

    @invariant()
    def references_are_right(self) -> None:
        for store, at in zip(self.open, self.at, strict=True):
            assert (store.branches, store.names) == (self.branches, self.names)
            head = store.head()
            assert (head.id if head else None) == at

    @invariant()
    def every_snapshot_is_there_and_right(self) -> None:
        for identity, known in self.known.items():
            tensors, snapshot = self.open[0].load(identity)
            assert (tensors["l0"]["w"].item(), tensors["l1"]["w"].item()) == known.values
            assert (list(snapshot.parents), snapshot.pruned) == (known.parents, known.pruned)
            assert self.names.get(snapshot.name or "") == (identity if snapshot.name else None)

    @invariant()
    def the_log_is_the_history(self) -> None:
        for store, at in zip(self.open, self.at, strict=True):
            want = sorted(self.ancestors({at} - {None}), key=lambda identity: -self.known[identity].number)
            assert [snapshot.id for snapshot in store.log()] == want

    @invariant()
    def everything_is_whole(self) -> None:
        if self.open:
            report = self.open[0].verify()
            assert report.problems == ()
            assert report.snapshots == len(self.known)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of which nothing is seen here


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
