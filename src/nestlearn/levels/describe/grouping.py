"""Equal components under one name: ``layers.0-29.mlp.{gate,up,down}_proj`` (x90)."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import product, takewhile
from typing import TypeVar

T = TypeVar("T")
NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)")


def group(items: Sequence[T], path: Callable[[T], str], same: Callable[[T], Hashable]) -> list[tuple[str, list[T]]]:
    """Items that are the ``same`` and whose paths differ in numbers or in the last name, with a path for all of them.

    Groups come in the order of their first items. A group holds every combination of the numbers that its path shows.

    >>> names = ["a.0.q_proj", "a.0.k_proj", "a.1.q_proj", "a.1.k_proj", "b.0.q_proj"]
    >>> [(name, len(found)) for name, found in group(names, str, lambda _: None)]
    [('a.0-1.{q,k}_proj', 4), ('b.0.q_proj', 1)]
    """
    patterns: dict[Hashable, dict[tuple[int, ...], list[T]]] = {}
    for item in items:
        pieces = NUMBER.split(path(item))
        numbers = tuple(int(n) for n in pieces[1::2])
        patterns.setdefault((same(item), tuple(pieces[::2])), {}).setdefault(numbers, []).append(item)
    siblings: dict[Hashable, list[tuple[str, list[T]]]] = {}
    for (key, texts), found in patterns.items():  # type: ignore[misc]
        for block in _blocks(list(found)):
            name = _interleave(texts, [ranges(numbers) for numbers in block])
            parent, _, leaf = name.rpartition(".")
            inside = [item for numbers in product(*block) for item in found[numbers]]
            siblings.setdefault((key, parent), []).append((leaf, inside))
    position = {id(item): i for i, item in enumerate(items)}
    groups = []
    for (_, parent), members in siblings.items():  # type: ignore[misc]
        leaf = braces([name for name, _ in members])
        inside = sorted((item for _, found in members for item in found), key=lambda item: position[id(item)])
        groups.append((f"{parent}.{leaf}" if parent else leaf, inside))
    return sorted(groups, key=lambda found: position[id(found[1][0])])


def _blocks(tuples: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Tuples of numbers as products of sets, each tuple in exactly one: the last position is joined first."""
    blocks: list[tuple[tuple[int, ...], ...]] = [tuple((n,) for n in numbers) for numbers in sorted(tuples)]
    for position in reversed(range(len(blocks[0]))):
        joined: dict[Hashable, list[int]] = {}
        for block in blocks:
            joined.setdefault((block[:position], block[position + 1 :]), []).extend(block[position])
        blocks = [(*before, tuple(sorted(numbers)), *after) for (before, after), numbers in joined.items()]  # type: ignore[misc]
    return blocks


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in short.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def braces(names: Sequence[str]) -> str:
    """Names with what they share in front and at the end said once.

    >>> braces(["q_proj", "k_proj"]), braces(["norm"]), braces(["weight", "bias"])
    ('{q,k}_proj', 'norm', '{weight,bias}')
    """
    names = list(dict.fromkeys(names))
    if len(names) == 1:
        return names[0]
    front = _cut(names[0][: alike(names)])
    rest = [name[len(front) :][::-1] for name in names]
    back = _cut(rest[0][: alike(rest)])[::-1]
    middle = [name[len(back) :][::-1] for name in rest]
    return f"{front}{{{','.join(middle)}}}{back}"


def alike(sequences: Iterable[Sequence[object]]) -> int:
    """How many elements the sequences begin with that are the same in all of them.

    >>> alike(["mean", "meat"])
    3
    """
    return sum(1 for _ in takewhile(lambda elements: len(set(elements)) == 1, zip(*sequences)))  # noqa: B905


def _cut(shared: str) -> str:
    """The part of it that ends at a boundary between words."""
    return shared[: max(shared.rfind("_"), shared.rfind("."), -1) + 1]


def _interleave(texts: Sequence[str], numbers: Sequence[str]) -> str:
    return "".join(text + number for text, number in zip(texts, [*numbers, ""], strict=True))
