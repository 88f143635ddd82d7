"""The five problems of MAD (Poli et al. 2024) that table 4 has: how a sequence is drawn, and what is asked of it.

* compression: random symbols and a last one that asks; all are to be told from the state there alone.
* in-context recall: pairs of a key and a value, fixed inside a sequence; the value of every key that was there before.
* fuzzy recall: the same with keys and values of one to `Problem.motif` symbols; asked are keys of the full number.
* selective copying: symbols among blanks, then a mark, then as many blanks, in place of which the symbols are due.
* memorisation: a key and a blank, in place of which the key's value is due; keys and values are the same for all
  sequences and values are never shown, so that they have to be in the weights.

Recall is trained on every next symbol, the others on what is asked. Choices where the description leaves one: the
positions of selective copying are a subset of all, each as likely as any other; the last key of fuzzy recall is one
that was there, as it is of in-context recall; filler in front of fuzzy recall is not trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nestlearn.errors import UserError, nearest

IGNORE = -100  # the target where nothing is asked
MAP_SEED = 0  # of what is to be memorised


@dataclasses.dataclass(frozen=True)
class Problem:
    """The difficulty of a task.

    Args:
        vocabulary: number of symbols, marks included.
        length: of a sequence, in symbols; of in-context recall one more than the model reads.
        examples: training sequences. There are no others: they are seen again in every epoch.
        copied: symbols to copy.
        motif: the most symbols of a key and of a value in fuzzy recall.

    Raises `UserError` if nothing fits into ``length``.
    """

    vocabulary: int = 16
    length: int = 128
    examples: int = 12_800
    copied: int = 16
    motif: int = 3


class Examples(NamedTuple):
    """Sequences and what is due after each symbol, or `IGNORE`: two (N, T) of int64."""

    tokens: np.ndarray
    targets: np.ndarray


def draw(task: str, problem: Problem, count: int, generator: np.random.Generator, training: bool) -> Examples:
    """``count`` sequences of a task, with the targets of training or those that are asked.

    Raises `UserError` for an unknown task and for a problem too small for it.

    >>> draw("compression", Problem(vocabulary=4, length=5), 2, np.random.default_rng(0), training=False).tokens
    array([[2, 1, 1, 0, 3],
           [0, 0, 0, 0, 3]])
    """
    if task not in TASKS:
        raise UserError(f"unknown task '{task}'; {nearest(task, TASKS)}")
    return TASKS[task](problem, count, generator, training)


def _compression(problem: Problem, count: int, generator: np.random.Generator, training: bool) -> Examples:
    _require(problem.vocabulary >= 3 and problem.length >= 2, problem, "compression")
    tokens = generator.integers(0, problem.vocabulary - 1, (count, problem.length))
    tokens[:, -1] = problem.vocabulary - 1
    return Examples(tokens, tokens.copy())


def _recall(problem: Problem, count: int, generator: np.random.Generator, training: bool) -> Examples:
    _require(problem.vocabulary >= 4 and problem.length >= 4 and problem.length % 2 == 0, problem, "in-context recall")
    kinds = problem.vocabulary // 2
    keys = generator.integers(0, kinds, (count, problem.length // 2))
    for row in keys:  # each key that was there is as likely as any other to be the last
        row[-1] = generator.choice(np.unique(row[:-1]))
    value_of = generator.integers(kinds, problem.vocabulary, (count, kinds))
    values = np.take_along_axis(value_of, keys, axis=1)
    known = np.zeros((count, kinds), dtype=bool)
    asked = np.zeros(keys.shape, dtype=bool)
    rows = np.arange(count)
    for place, key in enumerate(keys.T):
        asked[:, place] = known[rows, key]
        known[rows, key] = True
    tokens = np.stack([keys, values], axis=2).reshape(count, -1)
    due = np.stack([np.zeros_like(asked), asked], axis=2).reshape(count, -1)
    return _next(tokens, np.ones_like(due) if training else due)


def _fuzzy_recall(problem: Problem, count: int, generator: np.random.Generator, training: bool) -> Examples:
    room = problem.length + 1
    _require((problem.vocabulary - 1) // 2 >= problem.motif and room >= 4 * problem.motif, problem, "fuzzy recall")
    tokens = np.full((count, room), problem.vocabulary - 1)  # filled up in front
    due = np.zeros(tokens.shape, dtype=bool)
    for row in range(count):
        sequence, asked = _fuzzy_pairs(problem, room, 1 if training else problem.motif, generator)
        tokens[row, -len(sequence) :] = sequence
        due[row, -len(sequence) :] = True if training else asked
    return _next(tokens, due)


def _fuzzy_pairs(
    problem: Problem, room: int, smallest: int, generator: np.random.Generator
) -> tuple[list[int], list[bool]]:
    """Pairs up to ``room`` symbols, keys of ``smallest`` or more, and which symbols are a value that is known."""
    motif, kinds = problem.motif, (problem.vocabulary - 1) // 2
    key_symbols, value_symbols = np.arange(kinds), np.arange(kinds, problem.vocabulary - 1)
    value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
    sequence: list[int] = []
    asked: list[bool] = []

    def phrase(symbols: np.ndarray, least: int) -> tuple[int, ...]:
        return tuple(generator.permutation(symbols)[: generator.integers(least, motif + 1)].tolist())

    def say(key: tuple[int, ...]) -> None:
        known = key in value_of
        value = value_of.setdefault(key, phrase(value_symbols, 1))
        sequence.extend([*key, *value])
        asked.extend([False] * len(key) + [known] * len(value))

    while len(sequence) + 4 * motif <= room:  # the last pair too has to fit
        say(phrase(key_symbols, smallest))
    keys = list(value_of)
    say(keys[generator.integers(len(keys))])
    return sequence, asked


def _selective_copying(problem: Problem, count: int, generator: np.random.Generator, training: bool) -> Examples:
    copied, blank, mark = problem.copied, problem.vocabulary - 2, problem.vocabulary - 1
    body = problem.length - copied - 1
    _require(problem.vocabulary >= 4 and copied >= 1 and body >= copied, problem, "selective copying")
    symbols = generator.integers(0, blank, (count, copied))
    places = np.sort(generator.permuted(np.tile(np.arange(body), (count, 1)), axis=1)[:, :copied], axis=1)
    tokens = np.full((count, problem.length), blank)
    np.put_along_axis(tokens, places, symbols, axis=1)
    tokens[:, body] = mark
    targets = np.full(tokens.shape, IGNORE)
    targets[:, -copied:] = symbols
    return Examples(tokens, targets)


def _memorisation(problem: Problem, count: int, generator: np.random.Generator, training: bool) -> Examples:
    _require(problem.vocabulary >= 3 and problem.length >= 2 and problem.length % 2 == 0, problem, "memorisation")
    value_of = memory(problem.vocabulary)
    keys = generator.integers(0, len(value_of), (count, problem.length // 2))
    tokens = np.full((count, problem.length), problem.vocabulary - 1)
    tokens[:, ::2] = keys
    targets = np.full(tokens.shape, IGNORE)
    targets[:, 1::2] = value_of[keys]
    return Examples(tokens, targets)


def memory(vocabulary: int) -> np.ndarray:
    """The value of every key of memorisation; no two keys have the same.

    >>> memory(9)
    array([6, 4, 5, 7])
    """
    kinds = (vocabulary - 1) // 2
    return kinds + np.random.default_rng(MAP_SEED).permutation(vocabulary - 1 - kinds)[:kinds]


def _next(tokens: np.ndarray, due: np.ndarray) -> Examples:
    """What is read, and the next symbol where that one is ``due``."""
    return Examples(tokens[:, :-1], np.where(due, tokens, IGNORE)[:, 1:])


def _require(fits: bool, problem: Problem, task: str) -> None:
    if not fits:
        raise UserError(f"{task} does not fit into {problem}: give more symbols or a greater (even) length")


TASKS: dict[str, Callable[[Problem, int, np.random.Generator, bool], Examples]] = {
    "compression": _compression,
    "in-context recall": _recall,
    "fuzzy recall": _fuzzy_recall,
    "selective copying": _selective_copying,
    "memorisation": _memorisation,
}
