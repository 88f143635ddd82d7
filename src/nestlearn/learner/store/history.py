"""The graph of snapshots: ancestors, order, common ancestor."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from nestlearn.errors import UserError
from nestlearn.learner.store import snapshot as snapshots
from nestlearn.learner.store.references import References
from nestlearn.learner.store.snapshot import Snapshot


class History:
    """The snapshots of a store as they are now: with their names, and without those that were pruned.

    Args:
        folder: of the store, whose lock is held.
        references: as just read.
    """

    def __init__(self, folder: Path, references: References) -> None:
        self._folder, self._references = folder, references
        self._known: dict[str, Snapshot] = {}

    def snapshot(self, identity: str) -> Snapshot:
        """Raises `UserError` if its manifest is missing or damaged, or of another base model than the store."""
        if identity not in self._known:
            found = snapshots.read(self._folder, identity)
            if found.base != self._references.base:
                kind = f"base model {found.base[:12]}, not {self._references.base[:12]}"
                raise UserError(f"{snapshots.path_of(self._folder, identity)} is a snapshot of another model ({kind})")
            graft = self._references.grafts.get(identity)
            if graft is not None:
                found = replace(found, parents=tuple(graft.parents), pruned=graft.pruned)
            self._known[identity] = replace(found, name=self._references.name_of(identity))
        return self._known[identity]

    def back(self, identity: str, steps: int, ref: str) -> Snapshot:
        """``steps`` first parents before a snapshot. ``ref`` is what the user called it."""
        found = self.snapshot(identity)
        for step in range(steps):
            if not found.parents:
                raise UserError(f"{ref!r} is before the first snapshot: at most ~{step} is allowed here")
            found = self.snapshot(found.parents[0])
        return found

    def ancestors(self, identities: Iterable[str]) -> dict[str, Snapshot]:
        """The snapshots and everything that they were learned from."""
        found: dict[str, Snapshot] = {}
        waiting = list(identities)
        while waiting:
            identity = waiting.pop()
            if identity not in found:
                found[identity] = self.snapshot(identity)
                waiting.extend(found[identity].parents)
        return found

    def common(self, a: str, b: str) -> Snapshot | None:
        """The newest common ancestor, None if both were learned from the base model alone."""
        of_b = self.ancestors([b])
        shared = {identity: snapshot for identity, snapshot in self.ancestors([a]).items() if identity in of_b}
        return next(iter(newest_first(shared)), None)


def children(snapshots: dict[str, Snapshot]) -> dict[str, list[str]]:
    """For each snapshot the ids of those that were learned from it."""
    found: dict[str, list[str]] = {identity: [] for identity in snapshots}
    for identity, snapshot in snapshots.items():
        for parent in snapshot.parents:
            if parent in found:
                found[parent].append(identity)
    return found


def newest_first(snapshots: dict[str, Snapshot]) -> list[Snapshot]:
    """By time, but a child always before its parents, whatever the clocks said."""
    waiting_for = {identity: len(later) for identity, later in children(snapshots).items()}
    ready = [_by_age(snapshots[identity]) for identity, count in waiting_for.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        snapshot = snapshots[heapq.heappop(ready)[1]]
        order.append(snapshot)
        for parent in snapshot.parents:
            if parent in waiting_for:
                waiting_for[parent] -= 1
                if waiting_for[parent] == 0:
                    heapq.heappush(ready, _by_age(snapshots[parent]))
    return order


def _by_age(snapshot: Snapshot) -> tuple[float, str]:
    return -datetime.fromisoformat(snapshot.created).timestamp(), snapshot.id
