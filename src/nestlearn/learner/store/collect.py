"""What may go, and whether everything else is whole: gc, prune, discard, verify.

Whoever calls has the store's lock to himself; `discard` takes it. What is referenced is written before anything is
removed, and children are removed before their parents, so that a kill at any point leaves a store in which every
snapshot has its history.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nestlearn.errors import UserError
from nestlearn.files import sync_file
from nestlearn.learner.store import objects, references, snapshot
from nestlearn.learner.store.history import History, children, newest_first
from nestlearn.learner.store.locks import LEASES, LOCK, leased, locked
from nestlearn.learner.store.references import Graft, References
from nestlearn.learner.store.snapshot import Snapshot


@dataclass(frozen=True)
class Removed:
    """How many snapshots and objects were removed, and the bytes that their files took."""

    snapshots: int
    objects: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Args:
        snapshots: on the disk.
        unreachable: of these, how many no branch or name reaches; gc removes them.
        objects, bytes: on the disk.
        problems: one line for each damaged or missing file. Empty: the store is whole.
        newest: id of the newest snapshot that can be loaded, None if none can.
    """

    snapshots: int
    unreachable: int
    objects: int
    bytes: int
    problems: tuple[str, ...]
    newest: str | None


def collect(folder: Path, known: References) -> Removed:
    """Remove what neither a branch, nor a name, nor an open store reaches, and what killed processes left."""
    kept = History(folder, known).ancestors(known.targets() | leased(folder))
    gone = [identity for identity in snapshot.listed(folder) if identity not in kept]
    files = [snapshot.path_of(folder, identity) for identity in _children_first(folder, known, gone)]
    if files:
        references.settle(folder)
    freed = _remove(files, folder / snapshot.SNAPSHOTS)
    grafts = {identity: graft for identity, graft in known.grafts.items() if identity in kept}
    if grafts != known.grafts:
        known.grafts = grafts
        references.write(folder, known)
    needed = _objects_of(kept.values())
    loose = [path for path in (folder / objects.OBJECTS).glob("*.safetensors") if path.stem not in needed]
    freed += _remove(loose, folder / objects.OBJECTS)
    for part in (folder, folder / snapshot.SNAPSHOTS, folder / objects.OBJECTS):
        freed += _remove([path for path in part.glob(".*") if path.is_file()], part)  # half-written
    return Removed(len(files), len(loose), freed)


def prune(folder: Path, known: References, at: str | None, keep_last: int) -> Removed:
    """Remove the automatic snapshots in the history of ``at``: those that were saved again by hand at once, and of the
    others all but the newest ``keep_last``.

    Kept are also those with a name, those at the tip of a branch or under an open store, and those where the history
    forks or joins. The next snapshot that is kept becomes the child of the one before, and counts what lay between.
    The history ends at a manifest that cannot be read: whoever learns must not have to repair what is long past.
    """
    history = History(folder, known)
    readable = {identity: found for identity in snapshot.listed(folder) if (found := _try(history, identity))}
    later = children(readable)
    standing = known.targets() | leased(folder)
    automatic = [s for s in newest_first(_behind(readable, at)) if s.automatic]
    own = [s for s in automatic if len(later[s.id]) != 1 or not _same_state(s, readable[later[s.id][0]])]
    standing |= {s.id for s in own[:keep_last]}
    victims = [
        s
        for s in automatic
        if s.id not in standing
        and len(s.parents) <= 1
        and len(later[s.id]) == 1
        and len(readable[later[s.id][0]].parents) == 1
    ]
    grafts = {s.id: Graft(list(s.parents), s.pruned) for s in readable.values()}
    changed = set()
    for victim in victims:
        (child,) = later[victim.id]
        own = grafts.pop(victim.id)
        grafts[child] = Graft(own.parents, grafts[child].pruned + 1 + own.pruned)
        for parent in own.parents:
            later[parent] = [child if x == victim.id else x for x in later[parent]]
        changed.add(child)
        del readable[victim.id]
    if not victims:
        return Removed(0, 0, 0)
    known.grafts = {i: graft for i, graft in grafts.items() if i in changed or i in known.grafts}
    references.write(folder, known)
    references.settle(folder)
    freed = _remove([snapshot.path_of(folder, victim.id) for victim in victims], folder / snapshot.SNAPSHOTS)
    loose = _objects_of(victims) - _objects_of(readable.values())
    paths = [path for path in (objects.path_of(folder, digest) for digest in sorted(loose)) if path.exists()]
    freed += _remove(paths, folder / objects.OBJECTS)
    return Removed(len(victims), len(paths), freed)


def discard(folder: Path) -> None:
    """Remove a store in which nothing was ever saved, unless another process has it open; the folder stays."""
    folders, files = (objects.OBJECTS, snapshot.SNAPSHOTS, LEASES), (references.FILE, references.PREVIOUS, LOCK)
    with locked(folder):
        leased(folder)  # which removes those of the dead
        others = [path for path in (folder / LEASES).glob("*") if not path.name.startswith(f"{os.getpid()}-")]
        strange = {path.name for path in folder.iterdir()} - {*folders, *files}
        if others or strange or snapshot.listed(folder):
            return
        for name in folders:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in files:
            (folder / name).unlink(missing_ok=True)


def verify(folder: Path, known: References) -> Report:
    """Read every file of the store and follow every reference."""
    problems: dict[str, None] = {}  # in order, each once
    history = History(folder, known)
    reached, waiting = set(), sorted(known.targets())
    while waiting:
        identity = waiting.pop()
        if identity not in reached:
            reached.add(identity)
            found = _try(history, identity, problems)
            waiting.extend(found.parents if found else ())
    on_disk = snapshot.listed(folder)
    whole = [found for identity in on_disk if (found := _try(history, identity, problems))]
    damaged = set()
    for digest in sorted(_objects_of(whole)):
        try:
            objects.check(folder, digest)
        except UserError as error:
            damaged.add(digest)
            users = sorted(s.name or s.short for s in whole if digest in _objects_of([s]))
            problems[f"{error} [in {', '.join(users)}]"] = None
    files = list((folder / objects.OBJECTS).glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    loadable = {found.id: found for found in whole if not damaged & _objects_of([found])}
    newest = next((found.id for found in newest_first(loadable)), None)
    return Report(len(on_disk), len({*on_disk} - reached), len(files), size, tuple(problems), newest)


def _behind(readable: dict[str, Snapshot], at: str | None) -> dict[str, Snapshot]:
    """A snapshot and its ancestors, of those that are readable."""
    found: dict[str, Snapshot] = {}
    waiting = [at]
    while waiting:
        here = readable.get(waiting.pop() or "")
        if here is not None and here.id not in found:
            found[here.id] = here
            waiting.extend(here.parents)
    return found


def _same_state(a: Snapshot, b: Snapshot) -> bool:
    """Whether two snapshots hold the same, but for who saved them."""
    return a.levels == b.levels and {**a.meta, "auto": None} == {**b.meta, "auto": None}


def _try(history: History, identity: str, problems: dict[str, None] | None = None) -> Snapshot | None:
    try:
        return history.snapshot(identity)
    except UserError as error:
        if problems is not None:
            problems[str(error)] = None
        return None


def _children_first(folder: Path, known: References, identities: Iterable[str]) -> list[str]:
    """Damaged ones before all others: they can have no history."""
    history = History(folder, known)
    whole = {identity: _try(history, identity) for identity in identities}
    order = newest_first({identity: found for identity, found in whole.items() if found})
    return [*(identity for identity, found in whole.items() if not found), *(found.id for found in order)]


def _objects_of(snapshots: Iterable[Snapshot]) -> set[str]:
    return {level.object for found in snapshots for level in found.levels.values()}


def _remove(paths: Iterable[Path], folder: Path) -> int:
    """Remove files of a folder, durably; returns their bytes."""
    freed = 0
    for path in paths:
        freed += path.stat().st_size
        path.unlink()
    sync_file(folder)
    return freed
