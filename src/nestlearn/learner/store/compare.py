"""Two snapshots against each other: how far each level moved, and the average of what they learned.

A level's weights are in a group without a dot in its name (``level-1``). What belongs to them but is no weight, such as
the slots of a rule, is in a group with one (``level-1.rule``): it is not compared, and a merge takes it from the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.learner.store import objects
from nestlearn.learner.store.snapshot import Snapshot

Tensors = Mapping[str, Tensor]
LARGEST = 5  # blocks that are listed for each level


@dataclass(frozen=True)
class Moved:
    """A tensor or a level between two snapshots.

    Args:
        name: of the tensor or level.
        moved: ||b - a||, Frobenius.
        relative: ||b - a|| / ||a||; None where a is zero and b is not.
    """

    name: str
    moved: float
    relative: float | None


@dataclass(frozen=True)
class LevelDiff(Moved):
    """Args:
    numbers: compared.
    blocks: the tensors that moved most, relative to their own norm.
    unknown: tensors that only one snapshot has, whose start is not known; they are not part of ``moved``.
    """

    numbers: int
    blocks: tuple[Moved, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Diff:
    """Args:
    a, b: the snapshots.
    levels: in the order of their names.
    measures: numbers from outside, such as the loss on a probe text: name to (with a, with b).
    """

    a: Snapshot
    b: Snapshot
    levels: tuple[LevelDiff, ...]
    measures: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        return {"a": self.a.id, "b": self.b.id, "levels": [asdict(x) for x in self.levels], "measures": self.measures}


def is_weights(group: str) -> bool:
    """Whether a group of tensors holds a level's weights.

    >>> is_weights("level-1"), is_weights("level-1.rule")
    (True, False)
    """
    return "." not in group


def compare(folder: Path, a: Snapshot, b: Snapshot, start: Tensors | None) -> tuple[LevelDiff, ...]:
    """Level by level, so that no more than one level of each is in memory. ``start`` is as in `Store.diff`."""
    return tuple(_compare_level(level, *_pairs(folder, a, b, level, start)) for level in _levels(a, b))


def _compare_level(level: str, pairs: dict[str, tuple[Tensor, Tensor]], unknown: tuple[str, ...]) -> LevelDiff:
    blocks, moved, before, numbers = [], 0.0, 0.0, 0
    for name, (old, new) in pairs.items():
        if not old.is_floating_point():
            continue
        step, norm = _norm(new.float() - old.float()), _norm(old.float())
        blocks.append(_moved(name, step, norm))
        moved, before, numbers = math.hypot(moved, step), math.hypot(before, norm), numbers + old.numel()
    still = [block for block in blocks if block.moved > 0]
    still.sort(key=lambda block: (-(math.inf if block.relative is None else block.relative), block.name))
    whole = _moved(level, moved, before)
    return LevelDiff(**vars(whole), numbers=numbers, blocks=tuple(still[:LARGEST]), unknown=unknown)


def _moved(name: str, moved: float, norm: float) -> Moved:
    return Moved(name, moved, moved / norm if norm else (None if moved else 0.0))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def average(
    folder: Path, a: Snapshot, b: Snapshot, weight: float, start: Tensors | None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The levels that differ, with the weights ``c + (1 - weight) (a - c) + weight (b - c)``, c the common ancestor.

    As the shares add up to one, c drops out, and this is ``a + weight (b - a)``. Integers are taken from a.
    """
    for level in _levels(a, b):
        if _same(a, b, level):
            continue
        pairs, unknown = _pairs(folder, a, b, level, start)
        if unknown:
            many = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UserError(
                f"cannot merge {level!r}: {unknown[0]}{many} was learned in one of {a.short} and {b.short} only, and a "
                "store does not know what it was before: merge through the learner, which has the base model"
            )
        yield level, {name: _average(level, name, x, y, weight) for name, (x, y) in pairs.items()}


def _average(level: str, name: str, x: Tensor, y: Tensor, weight: float) -> Tensor:
    if x.shape != y.shape:
        raise UserError(f"cannot merge {level!r}: {name} is {tuple(x.shape)} in one and {tuple(y.shape)} in the other")
    return torch.lerp(x.float(), y.float(), weight).to(x.dtype) if x.is_floating_point() else x


def _levels(a: Snapshot, b: Snapshot) -> list[str]:
    return sorted(level for level in {*a.levels, *b.levels} if is_weights(level))


def _same(a: Snapshot, b: Snapshot, level: str) -> bool:
    return level in a.levels and a.levels[level] == b.levels.get(level)


def _pairs(
    folder: Path, a: Snapshot, b: Snapshot, level: str, start: Tensors | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """Each tensor of a level in both snapshots, and the names of those that one lacks, in ``start`` as well."""
    read = [objects.read(folder, x.levels[level].object) if level in x.levels else {} for x in (a, b)]
    pairs, unknown = {}, []
    for name in sorted({*read[0], *read[1]}):
        old, new = (tensors.get(name, (start or {}).get(name)) for tensors in read)
        if old is None or new is None:
            unknown.append(name)
        else:
            pairs[name] = (old.cpu(), new.cpu())
    return pairs, tuple(unknown)
