"""The formal languages of table 5: how a word is drawn, and what a model has to say at every position of it.

After Bhattamishra et al. 2020 and Irie et al. 2023: the model reads a word symbol by symbol and after each names the
set of symbols that may come next, the end of the word among them. Of Parity it says instead whether the ones so far
are odd. Words are of the language; there is no symbol for the start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Word = np.ndarray  # of symbol numbers, (T,)
Targets = np.ndarray  # of booleans, (T, outputs)


@dataclasses.dataclass(frozen=True)
class Language:
    """A language by size, the number that grows with the length of a word.

    ``draw`` gives a word of a size, ``label`` its targets: one output a symbol and one for the end, or a single one.
    ``length`` is the length of a word of size 1, and sizes are multiples of ``step``. A ``unary`` language has one
    word of each size.
    """

    symbols: str
    outputs: int
    draw: Callable[[int, np.random.Generator], Word]
    label: Callable[[Word], Targets]
    length: int = 1
    step: int = 1
    smallest: int = 1
    unary: bool = False

    def sizes(self, longest: int, bin: int) -> list[int]:
        """The sizes of bin 0, up to ``longest``, or of bin 1, above it up to twice as much.

        >>> LANGUAGES["(aa)*"].sizes(50, 1)[:2], LANGUAGES["(abab)*"].sizes(50, 0)[-1]
        ([52, 54], 48)
        """
        low, high = (self.smallest, longest) if bin == 0 else (longest + 1, 2 * longest)
        return [size for size in range(low, high + 1) if size % self.step == 0]

    def word(self, size: int, generator: np.random.Generator) -> Word:
        """A word of ``size``; there is one of every size that `sizes` gives."""
        word = self.draw(size, generator)
        assert len(word) == size * self.length
        return word

    def spelled(self, word: Word) -> str:
        """A word in letters.

        >>> LANGUAGES["a^n b^n"].spelled(np.array([0, 0, 1, 1]))
        'aabb'
        """
        return "".join(self.symbols[number] for number in word)


class Batch(NamedTuple):
    """Words filled up at the end: ``tokens`` (B, T), ``targets`` (B, T, outputs), and which positions are ``real``."""

    tokens: np.ndarray
    targets: np.ndarray
    real: np.ndarray


def collate(language: Language, words: Sequence[Word]) -> Batch:
    """Words with their targets as one batch; the filler is symbol 0, and causal models never see it in time."""
    B, T = len(words), max(len(word) for word in words)
    tokens = np.zeros((B, T), dtype=np.int64)
    targets = np.zeros((B, T, language.outputs), dtype=bool)
    real = np.zeros((B, T), dtype=bool)
    for row, word in enumerate(words):
        tokens[row, : len(word)] = word
        targets[row, : len(word)] = language.label(word)
        real[row, : len(word)] = True
    return Batch(tokens, targets, real)


def sample(language: Language, sizes: Sequence[int], count: int, generator: np.random.Generator) -> list[Word]:
    """``count`` words, each of a size drawn evenly from ``sizes``."""
    return [language.word(int(size), generator) for size in generator.choice(np.array(sizes), count)]


def fixed_words(language: Language, longest: int, bin: int, count: int, seed: int) -> list[Word]:
    """The fixed words of a bin: all if there is one of a size, else ``count`` drawn by ``seed``."""
    sizes = language.sizes(longest, bin)
    generator = np.random.default_rng([seed, bin])
    if language.unary:
        return [language.word(size, generator) for size in sizes]
    return sample(language, sizes, count, generator)


def _bits(size: int, generator: np.random.Generator) -> Word:
    return generator.integers(0, 2, size)


def _odd_ones(word: Word) -> Targets:
    return (np.cumsum(word) % 2 == 1)[:, None]


def _repeat(period: Sequence[int]) -> Callable[[int, np.random.Generator], Word]:
    return lambda size, generator: np.tile(np.array(period), size // len(period))


def _blocks(symbols: int) -> Callable[[int, np.random.Generator], Word]:
    return lambda size, generator: np.repeat(np.arange(symbols), size)


def _next_in(period: Sequence[int]) -> Callable[[Word], Targets]:
    """After ``period`` repeated: its next symbol, and the end when it is complete."""

    def label(word: Word) -> Targets:
        place = np.arange(1, len(word) + 1) % len(period)
        targets = np.zeros((len(word), max(period) + 2), dtype=bool)
        targets[np.arange(len(word)), np.array(period)[place]] = True
        targets[:, -1] = place == 0
        return targets

    return label


def _next_in_blocks(symbols: int) -> Callable[[Word], Targets]:
    """While the first symbol repeats, it or the second; then the block that is due, and the end after the last."""

    def label(word: Word) -> Targets:
        size = len(word) // symbols
        targets = np.zeros((len(word), symbols + 1), dtype=bool)
        place = np.arange(1, len(word) + 1)
        targets[place - 1, place // size] = True  # of the end too: it is the number after the last symbol's
        targets[:size, :2] = True
        return targets

    return label


def _two_dycks(size: int, generator: np.random.Generator) -> Word:
    """Symbols 0, 1 open and close the first kind of bracket, 2 and 3 the second; they mix freely."""
    pairs = int(generator.integers(0, size // 2 + 1))
    kinds = generator.permutation(np.repeat([0, 2], [2 * pairs, size - 2 * pairs]))
    word = np.zeros(size, dtype=np.int64)
    word[kinds == 0] = _dyck(pairs, generator)
    word[kinds == 2] = 2 + _dyck(size // 2 - pairs, generator)
    return word


def _dyck(pairs: int, generator: np.random.Generator) -> Word:
    """Each balanced word of ``pairs`` brackets is as likely as any other (cycle lemma)."""
    steps = generator.permutation(np.repeat([1, -1], [pairs + 1, pairs]))
    start = len(steps) - int(np.argmin(np.cumsum(steps)[::-1]))  # after the last minimum
    turned = np.roll(steps, -start)
    return (turned[1:] < 0).astype(np.int64)


def _next_bracket(word: Word) -> Targets:
    first = np.cumsum((word == 0).astype(int) - (word == 1))
    second = np.cumsum((word == 2).astype(int) - (word == 3))
    always = np.ones(len(word), dtype=bool)
    return np.stack([always, first > 0, always, second > 0, (first == 0) & (second == 0)], axis=1)


LANGUAGES = {
    "Parity": Language("01", 1, _bits, _odd_ones, smallest=2),
    "(aa)*": Language("a", 2, _repeat([0, 0]), _next_in([0, 0]), step=2, unary=True),
    "(abab)*": Language("ab", 3, _repeat([0, 1, 0, 1]), _next_in([0, 1, 0, 1]), step=4, unary=True),
    "a^n b^n": Language("ab", 3, _blocks(2), _next_in_blocks(2), length=2, unary=True),
    "a^n b^n c^n": Language("abc", 4, _blocks(3), _next_in_blocks(3), length=3, unary=True),
    "Shuffle-2": Language("()[]", 5, _two_dycks, _next_bracket, step=2, smallest=2),
}
