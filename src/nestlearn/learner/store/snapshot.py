"""A snapshot: an immutable JSON manifest, named by the SHA-256 of its bytes, that lists one object for each level."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nestlearn.errors import UserError
from nestlearn.files import parse_json, write_atomic

SNAPSHOTS = "snapshots"
FORMAT = "nestlearn memory snapshot, version 1"
REMEDY = "'nestlearn memory verify' tells what is whole"


@dataclass(frozen=True)
class LevelRecord:
    """One level in a manifest: the SHA-256 that names its object, how many numbers, how many bytes in the file."""

    object: str
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Snapshot:
    """What was learned, at one moment.

    Args:
        id: SHA-256 of the manifest, 64 hexadecimal digits; `short` has the first 12.
        parents: ids of what it was learned from: none for the first, two after a merge. Where `pruned` is not 0 these
            are the nearest ancestors that were kept.
        name: given by the user, or None.
        created: ISO 8601, UTC.
        base: hash of the base model.
        levels: by name, one object each.
        meta: whatever the learner wrote: what was read, tokens, losses, configuration.
        pruned: automatic snapshots that were removed between this one and its parents.
    """

    id: str
    parents: tuple[str, ...]
    name: str | None
    created: str
    base: str
    levels: dict[str, LevelRecord]
    meta: dict[str, Any]
    pruned: int = 0

    @property
    def short(self) -> str:
        return self.id[:12]

    @property
    def bytes(self) -> int:
        """Of all its levels; objects that it shares with others are counted in full."""
        return sum(level.bytes for level in self.levels.values())

    @property
    def automatic(self) -> bool:
        """Whether it may be pruned: its meta says ``auto`` and it has no name."""
        return self.meta.get("auto") is True and self.name is None

    def to_dict(self) -> dict[str, Any]:
        levels = {name: vars(level) for name, level in self.levels.items()}
        return {**vars(self), "parents": list(self.parents), "levels": levels, "bytes": self.bytes}


def path_of(folder: Path, snapshot: str) -> Path:
    return folder / SNAPSHOTS / f"{snapshot}.json"


def write(
    folder: Path, parents: Iterable[str], base: str, levels: dict[str, LevelRecord], meta: dict[str, Any]
) -> Snapshot:
    """Write the manifest; its objects must be on the disk. Returns it as it is read back."""
    value = {
        "format": FORMAT,
        "parents": list(parents),
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        "base": base,
        "levels": {name: vars(level) for name, level in levels.items()},
        "meta": meta,
    }
    text = encode(value)
    snapshot = hashlib.sha256(text).hexdigest()
    write_atomic(path_of(folder, snapshot), lambda path: path.write_bytes(text))
    return _parse(path_of(folder, snapshot), snapshot, text)


def encode(value: Any) -> bytes:
    """JSON with sorted keys. Raises `UserError` for what JSON lacks, NaN and infinity included."""
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"meta must be plain JSON, without NaN and infinity ({error})") from error


def read(folder: Path, snapshot: str) -> Snapshot:
    """The snapshot as its manifest has it: nameless, with the parents it was saved with.

    Raises:
        UserError: the manifest is missing, truncated or changed.
    """
    path = path_of(folder, snapshot)
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {REMEDY}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    if hashlib.sha256(text).hexdigest() != snapshot:
        raise UserError(f"{path} is damaged (truncated or changed): {REMEDY}")
    return _parse(path, snapshot, text)


def _parse(path: Path, snapshot: str, text: bytes) -> Snapshot:
    try:
        value = parse_json(text.decode())
        if value["format"] != FORMAT:
            raise KeyError(FORMAT)
        return Snapshot(
            id=snapshot,
            parents=tuple(value["parents"]),
            name=None,
            created=value["created"],
            base=value["base"],
            levels={name: LevelRecord(**level) for name, level in value["levels"].items()},
            meta=value["meta"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # whole, but not written by this version
        raise UserError(
            f"{path} is no {FORMAT!r}: it is of another version of nestlearn, or of another program"
        ) from error


def listed(folder: Path) -> list[str]:
    """The ids of all snapshots on the disk, reachable or not."""
    return sorted(path.stem for path in (folder / SNAPSHOTS).glob("[0-9a-f]*.json"))
