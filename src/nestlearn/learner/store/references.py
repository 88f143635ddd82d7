"""``store.json``: the one file of a store that changes. Branches, names, and what pruning cut out of the history.

It is replaced as a whole, so that whoever is killed leaves all references as they were before or after. Its previous
version stays beside it, for whoever damages the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestlearn.errors import UserError
from nestlearn.files import read_json, write_atomic, write_json
from nestlearn.learner.store.snapshot import encode, listed

FILE, PREVIOUS = "store.json", "store.previous.json"
FORMAT = "nestlearn memory store, version 1"
MAIN, HEAD = "main", "head"
REMEDY = f"copy {PREVIOUS} over it, which is one save older"


@dataclass(frozen=True)
class Graft:
    """The parents of a snapshot since those between were pruned, and how many there were."""

    parents: list[str]
    pruned: int


@dataclass
class References:
    """Args:
    base: hash of the base model of every snapshot.
    branches: name to the id of its newest snapshot.
    names: name to the id of the snapshot that bears it.
    grafts: id of a snapshot to its parents in place of those in its manifest.
    """

    base: str
    branches: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    grafts: dict[str, Graft] = field(default_factory=dict)

    def name_of(self, snapshot: str) -> str | None:
        return next((name for name, target in self.names.items() if target == snapshot), None)

    def targets(self) -> set[str]:
        """What a branch or a name points at."""
        return {*self.branches.values(), *self.names.values()}

    def free_branch(self, branch: str) -> str:
        """``branch-2``, ``branch-3``, ...: the first that is not taken."""
        number = 2
        while f"{branch}-{number}" in {*self.branches, *self.names}:
            number += 1
        return f"{branch}-{number}"


def create(folder: Path, base: str) -> References:
    """A new store. Raises `UserError` if something else is in the folder, or a store that has lost its file."""
    if listed(folder):
        raise UserError(f"{folder / FILE} is missing though there are snapshots: {REMEDY}")
    references = References(base)
    write(folder, references)
    return references


def read(folder: Path) -> References:
    """Raises `UserError` if the file is damaged or of another version."""
    path = folder / FILE
    value = read_json(path, REMEDY)
    digest = value.pop("sha256", None)
    if digest != _digest(value):
        raise UserError(f"{path} is damaged (truncated or changed): {REMEDY}")
    if value.pop("format", None) != FORMAT:
        raise UserError(f"{path} is no {FORMAT!r}: it is of another version of nestlearn")
    grafts = {snapshot: Graft(**graft) for snapshot, graft in value.pop("grafts").items()}
    return References(**value, grafts=grafts)


def write(folder: Path, references: References) -> None:
    settle(folder)
    value = {"format": FORMAT, **asdict(references)}
    write_json(folder / FILE, {**value, "sha256": _digest(value)})


def settle(folder: Path) -> None:
    """Let the previous version be what the file holds now, as before something is removed that only it still names."""
    path = folder / FILE
    if path.exists():
        now = path.read_bytes()
        write_atomic(folder / PREVIOUS, lambda beside: beside.write_bytes(now))


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(encode(value)).hexdigest()


def check_name(name: str, kind: str) -> None:
    """Raises `UserError` unless ``name`` can be told from an id, a place in the history and an option.

    >>> check_name("after-manual", "name")
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        rule = "1 to 100 letters, digits and . _ - are allowed, with no dot or hyphen at the front"
        raise UserError(f"{name!r} is no {kind} for a snapshot: {rule}")
    if name.lower() == HEAD:
        raise UserError(f"{name!r} always means the newest snapshot: choose another {kind}")
    if name.lower() == MAIN and kind != "branch":
        raise UserError(f"{name!r} always means the branch of that name: choose another {kind}")
    if re.fullmatch(r"[0-9a-f]{4,64}", name):
        raise UserError(f"{name!r} looks like the id of a snapshot: add a letter after f, or a hyphen")


def check_free(references: References, name: str, move: bool = False) -> None:
    """Raises `UserError` if the name is that of a branch or, unless it is to ``move``, of a snapshot."""
    if name in references.branches:
        raise UserError(f"{name!r} is a branch: choose another name")
    if name in references.names and not move:
        target = references.names[name][:12]
        raise UserError(f"the name {name!r} is taken by {target}: choose another, or drop it first")


def split(ref: str) -> tuple[str, int]:
    """A reference as what it starts at and how many parents to go back.

    >>> split("head~2"), split("manual~"), split("main")
    (('head', 2), ('manual', 1), ('main', 0))
    """
    start, tilde, back = ref.partition("~")
    if not tilde:
        return start, 0
    if back and not re.fullmatch(r"[0-9]{1,9}", back):
        raise UserError(f"{ref!r} is no snapshot: after ~ comes the number of parents to go back, as in head~2")
    return start, int(back or 1)


def by_prefix(folder: Path, prefix: str) -> str | None:
    """The id that begins with these 4 to 64 digits, None if there is none. Raises `UserError` if there are several."""
    if not re.fullmatch(r"[0-9a-f]{4,64}", prefix):
        return None
    found = [snapshot for snapshot in listed(folder) if snapshot.startswith(prefix)]
    if len(found) > 1:
        raise UserError(f"{prefix!r} begins {len(found)} ids: give more digits ({_shorten(found)})")
    return found[0] if found else None


def _shorten(snapshots: Iterable[str]) -> str:
    return ", ".join(snapshot[:12] for snapshot in snapshots)
