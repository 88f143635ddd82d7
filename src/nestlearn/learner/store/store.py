"""`Store`: save, load, log, diff, rollback, fork, merge, gc, prune, verify.

Every open store stands on one snapshot, the newest of its branch when it was opened, and its own last one from then on;
``head`` means that one. A save makes a child of it. The branch follows if its newest snapshot is still the one that the
store stands on; if another process has moved it since, a new branch ``main-2`` begins there instead, so that neither
loses anything, and ``store.branch`` tells so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestlearn.errors import UserError, nearest
from nestlearn.learner.store import collect, objects, references, snapshot
from nestlearn.learner.store.history import History, newest_first
from nestlearn.learner.store.locks import LEASES, LOCK, Lease, locked
from nestlearn.learner.store.references import FILE, HEAD, MAIN, PREVIOUS, References
from nestlearn.learner.store.snapshot import LevelRecord, Snapshot

if TYPE_CHECKING:
    from torch import Tensor

    from nestlearn.learner.store.compare import Diff

    Tensors = Mapping[str, Tensor]

OWN = {FILE, PREVIOUS, LOCK, LEASES, objects.OBJECTS, snapshot.SNAPSHOTS}


class Store:
    """A folder of snapshots of what learners on one base model have learned.

    A reference ``ref`` is a name, a branch (its newest snapshot), an id or at least 4 first digits of one, or ``head``;
    after it ``~`` or ``~N`` goes back one or N parents.

    Args:
        folder: made if it is not there and ``base`` is given.
        base: hash of the base model. None opens a store whatever its model, to look after it.
        branch: on which this store saves.

    Raises:
        UserError: no store is there and no base given, the store is that of another base model or damaged, something
            else is in the folder, or there is no such branch.

    >>> import tempfile, torch
    >>> store = Store(tempfile.mkdtemp(), base="c0ffee")
    >>> first = store.save({"level-1": {"w": torch.zeros(2)}}, {"tokens": 512}, name="first")
    >>> store.load("first")[0]
    {'level-1': {'w': tensor([0., 0.])}}
    """

    def __init__(self, folder: str | os.PathLike[str], base: str | None = None, branch: str = MAIN) -> None:
        self.folder = Path(folder)
        self._check_folder(base)
        with locked(self.folder):
            known = self._open(base)
            if branch != MAIN and branch not in known.branches:
                raise UserError(f"{self.folder} has no branch {branch!r}; {nearest(branch, {MAIN, *known.branches})}")
            self.base, self.branch = known.base, branch
            self._lease = Lease(self.folder)
            self._stand(known.branches.get(branch))

    def save(
        self,
        tensors_by_level: Mapping[str, Tensors],
        meta: Mapping[str, Any],
        name: str | None = None,
        parent: str | None = None,
        move: bool = False,
    ) -> Snapshot:
        """Keep a state. It is on the disk when this returns; killed before, the store is as it was.

        Args:
            tensors_by_level: of any shape, on any device. A level whose tensors are those of an earlier snapshot takes
                no space. A group with a dot in its name (``level-1.rule``) is kept, but not compared or averaged.
            meta: plain JSON. ``{"auto": True}`` without a name allows `prune` to remove the snapshot.
            name: for the snapshot, free unless it is to ``move`` there from an earlier one.
            parent: what it was learned from, by default ``head``.

        Raises:
            UserError: the name is no name or is taken, a tensor holds NaN or infinity, meta is no JSON.
        """
        if name is not None:
            references.check_name(name, "name")
        snapshot.encode(dict(meta))
        files = {level: objects.serialise(level, tensors) for level, tensors in tensors_by_level.items()}
        digests = {level: objects.digest_of(buffers) for level, buffers in files.items()}  # before others must wait
        with locked(self.folder):
            known = references.read(self.folder)
            if name is not None:
                references.check_free(known, name, move)
            parents = () if (before := self._parent(known, parent)) is None else (before,)
            levels = {}
            for level, buffers in files.items():
                size = objects.write(self.folder, digests[level], buffers)
                numbers = sum(tensor.numel() for tensor in tensors_by_level[level].values())
                levels[level] = LevelRecord(digests[level], numbers, size)
            return self._commit(known, parents, levels, dict(meta), name)

    def load(self, ref: str = HEAD) -> tuple[dict[str, dict[str, Tensor]], Snapshot]:
        """The tensors of each level, on the CPU, and the snapshot. ``head`` does not move.

        The tensors are mapped from the files; they may be written to, which never reaches the files.

        Raises:
            UserError: there is no such snapshot, or one of its files is missing, truncated or changed; it is named.
        """
        with locked(self.folder, shared=True):
            found = self._resolve(references.read(self.folder), ref)
            return {level: objects.read(self.folder, x.object) for level, x in found.levels.items()}, found

    def get(self, ref: str = HEAD) -> Snapshot:
        """A snapshot without its tensors."""
        with locked(self.folder, shared=True):
            return self._resolve(references.read(self.folder), ref)

    def head(self, branch: str | None = None) -> Snapshot | None:
        """What this store stands on, or the newest snapshot of a branch as it is now. None if there is none yet."""
        if branch is None:
            return None if self._at is None else self.get(HEAD)
        known = self.branches
        if branch not in known and branch != MAIN:
            raise UserError(f"{self.folder} has no branch {branch!r}; {nearest(branch, {MAIN, *known})}")
        return self.get(branch) if branch in known else None

    @property
    def branches(self) -> dict[str, str]:
        """Every branch and the id of its newest snapshot."""
        return self._references().branches

    @property
    def names(self) -> dict[str, str]:
        """Every name and the id of the snapshot that bears it."""
        return self._references().names

    def log(self, ref: str = HEAD) -> list[Snapshot]:
        """The snapshot and all that it was learned from, newest first. Empty for ``head`` of a new store."""
        with locked(self.folder, shared=True):
            known = references.read(self.folder)
            if ref == HEAD and self._at is None:
                return []
            return newest_first(History(self.folder, known).ancestors([self._resolve(known, ref).id]))

    def diff(
        self,
        a: str,
        b: str,
        measures: Mapping[str, tuple[float, float]] | None = None,
        start: Tensors | None = None,
    ) -> Diff:
        """How far each level moved from a to b, and which of its tensors most.

        Args:
            measures: numbers from outside that belong in the result, such as the loss on a text with a and with b.
            start: by name, what a tensor was before it was learned, for those that only one of the snapshots has.
        """
        from nestlearn.learner.store.compare import Diff, compare

        with locked(self.folder, shared=True):
            known = references.read(self.folder)
            old, new = self._resolve(known, a), self._resolve(known, b)
            return Diff(old, new, compare(self.folder, old, new, start), dict(measures or {}))

    def rollback(self, ref: str) -> Snapshot:
        """Go back, or anywhere else: the branch and ``head`` are at ``ref`` from now on.

        What was saved since stays, and can be had by its id or name, until `gc` removes what has no name.
        """
        with locked(self.folder):
            known = references.read(self.folder)
            found = self._resolve(known, ref)
            self._move_branch(known, [self._at] if self._at else [], found.id)
            return found

    def fork(self, branch: str, ref: str = HEAD) -> Store:
        """A new branch that begins at ``ref``, opened as a store of its own. This one stays where it is."""
        references.check_name(branch, "branch")
        with locked(self.folder):
            known = references.read(self.folder)
            references.check_free(known, branch)
            known.branches[branch] = self._resolve(known, ref).id
            references.write(self.folder, known)
        return Store(self.folder, self.base, branch)

    def drop(self, name: str) -> None:
        """Take a name or a branch away. Its snapshots stay until `gc`, if nothing else reaches them."""
        with locked(self.folder):
            known = references.read(self.folder)
            if known.names.pop(name, None) is None and known.branches.pop(name, None) is None:
                raise UserError(f"no name or branch {name!r}; {nearest(name, {*known.names, *known.branches})}")
            references.write(self.folder, known)

    def merge(
        self,
        a: str,
        b: str,
        weight: float = 0.5,
        name: str | None = None,
        move: bool = False,
        start: Tensors | None = None,
    ) -> Snapshot:
        """Save the average of what a and b learned since their common ancestor, level by level, as a child of both.

        Whatever is no weight (groups with a dot in their names, integers, meta) is that of a.

        Args:
            weight: share of b, 0 to 1; a has the rest.
            name, move: as in `save`.
            start: as in `diff`.

        Raises:
            UserError: weight is no share, a tensor was learned in one of them only and is not in ``start``, or differs
                in shape.
        """
        from nestlearn.learner.store import compare

        if not 0 <= weight <= 1:
            raise UserError(f"weight {weight} is no share of the second snapshot: 0 to 1 is allowed")
        if name is not None:
            references.check_name(name, "name")
        with locked(self.folder):
            known = references.read(self.folder)
            if name is not None:
                references.check_free(known, name, move)
            first, second = self._resolve(known, a), self._resolve(known, b)
            ancestor = History(self.folder, known).common(first.id, second.id)
            levels = dict(first.levels)
            for level, tensors in compare.average(self.folder, first, second, weight, start):
                buffers = objects.serialise(level, tensors)
                digest = objects.digest_of(buffers)
                size = objects.write(self.folder, digest, buffers)
                levels[level] = LevelRecord(digest, sum(tensor.numel() for tensor in tensors.values()), size)
            for record in first.levels.values():
                objects.check(self.folder, record.object)
            meta = {key: value for key, value in first.meta.items() if key != "auto"}
            meta["merged"] = {"with": second.id, "ancestor": ancestor.id if ancestor else None, "weight": weight}
            return self._commit(known, dict.fromkeys([first.id, second.id]), levels, meta, name)

    def gc(self) -> collect.Removed:
        """Remove every snapshot that no branch, name or open store reaches, and what killed processes left behind.

        Raises:
            UserError: a manifest that is reached is damaged; nothing is removed then.
        """
        with locked(self.folder):
            return collect.collect(self.folder, references.read(self.folder))

    def prune(self, keep_last: int) -> collect.Removed:
        """Remove automatic snapshots before ``head``, all but the newest ``keep_last``.

        Those with a name, at the tip of a branch, under an open store, or where the history forks or joins are kept.
        """
        if keep_last < 0:
            raise UserError(f"keep_last={keep_last} is no number of snapshots: 0 or more is allowed")
        with locked(self.folder):
            return collect.prune(self.folder, references.read(self.folder), self._at, keep_last)

    def verify(self) -> collect.Report:
        """Read every file and follow every reference; what is wrong is in the report, one line for each file."""
        with locked(self.folder, shared=True):
            return collect.verify(self.folder, references.read(self.folder))

    def _check_folder(self, base: str | None) -> None:
        """Make the folder, unless it is the wrong one."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: give the folder of a memory store")
        found = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        if base is None and not found & {FILE, PREVIOUS, snapshot.SNAPSHOTS}:
            raise UserError(f"{self.folder} holds no memory store: check the path")
        strange = sorted(name for name in found - OWN if not name.startswith("."))
        if strange and FILE not in found:
            raise UserError(f"{self.folder} holds something else ({strange[0]}): give an empty or a new folder")
        if base is not None:
            for part in (objects.OBJECTS, snapshot.SNAPSHOTS, LEASES):
                (self.folder / part).mkdir(parents=True, exist_ok=True)

    def _open(self, base: str | None) -> References:
        if not (self.folder / FILE).exists():
            if base is None and not snapshot.listed(self.folder):
                raise UserError(f"{self.folder} holds no memory store yet: learn something first")
            return references.create(self.folder, base or "")
        known = references.read(self.folder)
        if base is not None and base != known.base:
            raise UserError(
                f"{self.folder} is the memory of base model {known.base[:12]}, not of {base[:12]}: "
                "open it with its own model, or give another folder"
            )
        return known

    def _references(self) -> References:
        with locked(self.folder, shared=True):
            return references.read(self.folder)

    def _stand(self, identity: str | None) -> None:
        self._lease.stand_on(identity)
        self._at = identity

    def _parent(self, known: References, ref: str | None) -> str | None:
        return self._at if ref is None else self._resolve(known, ref).id

    def _resolve(self, known: References, ref: str) -> Snapshot:
        """Under the lock."""
        start, back = references.split(ref)
        if start.lower() == HEAD:
            if self._at is None:
                raise UserError(f"branch {self.branch!r} of {self.folder} has no snapshot yet: save one first")
            identity = self._at
        else:
            identity = known.branches.get(start) or known.names.get(start)
            identity = identity or references.by_prefix(self.folder, start)
        if identity is None:
            raise UserError(f"no snapshot {start!r}; {nearest(start, {HEAD, *known.names, *known.branches})}")
        return History(self.folder, known).back(identity, back, ref)

    def _commit(
        self,
        known: References,
        parents: Iterable[str],
        levels: dict[str, LevelRecord],
        meta: dict[str, Any],
        name: str | None,
    ) -> Snapshot:
        """The manifest, then, at once, the branch and the name."""
        parents = tuple(parents)
        made = snapshot.write(self.folder, parents, self.base, levels, meta)
        if name is not None:
            known.names[name] = made.id
        self._move_branch(known, parents, made.id)
        return History(self.folder, known).snapshot(made.id)

    def _move_branch(self, known: References, expected: Iterable[str], identity: str) -> None:
        """Move the branch if it is where it is expected, else begin a new one. One write makes all of it true."""
        tip = known.branches.get(self.branch)
        branch = self.branch
        if (tip is not None and tip not in expected) or branch in known.names:
            branch = known.free_branch(branch)
        known.branches[branch] = identity
        references.write(self.folder, known)
        self.branch = branch
        self._stand(identity)
