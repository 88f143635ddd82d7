"""bAbI facts hidden in long text, as BABILong makes them (Kuratov et al. 2024), at any length and constant memory.

A sample is a stream of exactly so many tokens, then a question. The facts that lead to the question stand in it in
their order, each between two sentences of the background, at places drawn evenly and independently. A stream is given
out in pieces and never exists as a whole: it is the background text from a random sentence on, which begins again at
its end if the stream is longer than that.

Tokens are lower-case words, numbers and punctuation marks: all words of the questions, then the most frequent ones of
the background; others are one unknown word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nestlearn.errors import UserError, nearest

NAMES = {
    "qa1": "single-supporting-fact",
    "qa2": "two-supporting-facts",
    "qa3": "three-supporting-facts",
    "qa4": "two-arg-relations",
    "qa5": "three-arg-relations",
}
UNKNOWN, QUESTION, ANSWER, END = range(4)  # what the first tokens mean
SPECIAL = ("<unknown>", "<question>", "<answer>", "<end>")
WORD = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")
STOPS = (".", "!", "?")


class Question(NamedTuple):
    """A question, the facts of its story up to it, its answer, and the number of the story."""

    facts: tuple[str, ...]
    text: str
    answer: str
    story: int


def read_questions(path: Path) -> list[Question]:
    """The questions of a file of bAbI, in order. Raises `UserError` for a file that is none.

    A line is a number and a fact, or a number, a question, its answer and the facts that it needs; the number 1 begins
    a story.
    """
    found: list[Question] = []
    facts: list[str] = []
    story = -1
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        number, _, text = line.partition(" ")
        if not number.isdigit() or (story < 0 and number != "1"):
            raise UserError(f"{path} line {place} is not of bAbI: it must begin with its number in the story")
        if number == "1":
            facts, story = [], story + 1
        if "\t" in text:
            asked, answer = text.split("\t")[:2]
            found.append(Question(tuple(facts), asked.strip(), answer.strip(), story))
        else:
            facts.append(text.strip())
    return found


def task_file(data: str | Path, task: str, split: str) -> Path:
    """The file of a task's questions: of the 10,000 where they are there, else of the 1,000. Raises `UserError`."""
    if task not in NAMES:
        raise UserError(f"unknown task of bAbI '{task}'; {nearest(task, NAMES)}")
    name = f"{task}_{NAMES[task]}_{split}.txt"
    paths = [Path(data) / "babi" / folder / name for folder in ("en-10k", "en")]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{paths[1]} is not there: give the folder of real data")
    return found[0]


def words(text: str) -> list[str]:
    """The tokens of a text, as strings.

    >>> words("Mary moved to room 12.")
    ['mary', 'moved', 'to', 'room', '12', '.']
    """
    return WORD.findall(text.lower())


class Vocabulary:
    """Words by number: `SPECIAL`, then all of ``needed``, then the most frequent ones of ``text``, at most ``size``.

    >>> vocabulary = Vocabulary(["Where is Mary?"], "is is a a a b", 9)
    >>> vocabulary.encode("A b is here").tolist()
    [8, 0, 5, 0]
    """

    def __init__(self, needed: Iterable[str], text: str, size: int) -> None:
        first = dict.fromkeys(word for line in needed for word in words(line))
        frequent = (word for word, _ in Counter(words(text)).most_common() if word not in first)
        chosen = [*SPECIAL, *first]
        chosen += [word for word, _ in zip(frequent, range(size - len(chosen)), strict=False)]
        self.words = chosen
        self.numbers = {word: number for number, word in enumerate(chosen)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, (T,)."""
        return np.array([self.numbers.get(word, UNKNOWN) for word in words(text)], np.int32)


class Background:
    """A text as tokens (T,), and where its sentences begin."""

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.encode(text)
        if not len(self.tokens):
            raise UserError("the background text is empty: give one with words")
        stops = [vocabulary.numbers[stop] for stop in STOPS if stop in vocabulary.numbers]
        after = np.flatnonzero(np.isin(self.tokens, stops)) + 1
        self.starts = np.concatenate([[0], after[after < len(self.tokens)]])

    def slice(self, begin: int, count: int) -> np.ndarray:
        """``count`` tokens from token ``begin`` on of the text repeated without end."""
        return self.tokens[np.arange(begin, begin + count) % len(self.tokens)]

    def sentence(self, number: int) -> int:
        """Where a sentence begins in the text repeated without end.

        Its number may go on beyond the last one.
        """
        cycles, place = divmod(number, len(self.starts))
        return cycles * len(self.tokens) + int(self.starts[place])

    def last_sentence(self, token: int) -> int:
        """The number of the last sentence that begins at ``token`` or before, in the text repeated without end."""
        cycles, place = divmod(token, len(self.tokens))
        return cycles * len(self.starts) + int(np.searchsorted(self.starts, place, side="right")) - 1


class Sample(NamedTuple):
    """A stream of ``length`` tokens and what is asked about it.

    ``begin``: the background's token that it begins with; ``places``: how many background tokens stand before each of
    the ``facts``; ``question`` and ``answer`` hold their marks.
    """

    length: int
    begin: int
    places: tuple[int, ...]
    facts: tuple[np.ndarray, ...]
    question: np.ndarray
    answer: np.ndarray


class Example(NamedTuple):
    """Tokens (T,), and which of them (T,) a model is to predict."""

    tokens: np.ndarray
    counts: np.ndarray


class Teller:
    """Makes samples of questions that fit.

    Args:
        questions: to be hidden.
        background: the text to hide them in.
        vocabulary: of both.
    """

    def __init__(self, questions: Sequence[Question], background: Background, vocabulary: Vocabulary) -> None:
        self.background = background
        self.questions = [
            (tuple(map(vocabulary.encode, q.facts)), vocabulary.encode(q.text), vocabulary.encode(q.answer))
            for q in questions
        ]
        self.sizes = np.array([sum(map(len, facts)) for facts, _, _ in self.questions])
        groups = [list(group) for _, group in groupby(range(len(questions)), lambda n: questions[n].story)]
        self.stories = [self._told(group) for group in groups]

    def draw(self, length: int, generator: np.random.Generator) -> Sample:
        """A random question whose facts fit into ``length`` tokens. Raises `UserError` if none does."""
        fitting = np.flatnonzero(self.sizes <= length)
        if not len(fitting):
            raise UserError(f"no question's facts fit into {length} tokens: the shortest has {self.sizes.min()}")
        return self.hide(int(generator.choice(fitting)), length, generator)

    def hide(self, number: int, length: int, generator: np.random.Generator) -> Sample:
        """The question of that number, its facts hidden in a stream of ``length`` tokens."""
        facts, question, answer = self.questions[number]
        room = length - int(self.sizes[number])
        text = self.background
        first = int(generator.integers(len(text.starts)))
        begin = text.sentence(first)
        between = text.last_sentence(begin + room) - first  # sentences after the first that begin in the stream
        drawn = np.sort(generator.integers(between + 1, size=len(facts)))
        places = tuple(text.sentence(first + int(k)) - begin for k in drawn)
        return Sample(
            length,
            begin,
            places,
            facts,
            np.concatenate([[QUESTION], question, [ANSWER]]).astype(np.int32),
            np.concatenate([answer, [END]]).astype(np.int32),
        )

    def example(self, length: int, only_answer: bool, generator: np.random.Generator) -> Example:
        """What is trained on: a sample of `draw`, or with length 0 a random story and all its questions.

        ``only_answer``: whether only answers count.
        """
        if length:
            return self.told(self.draw(length, generator), only_answer)
        tokens, counts = self.stories[int(generator.integers(len(self.stories)))]
        return Example(tokens, counts if only_answer else counts | (np.arange(len(tokens)) > 0))

    def told(self, sample: Sample, only_answer: bool) -> Example:
        """A whole sample: stream, question and answer."""
        tokens = np.concatenate([*self.pieces(sample, sample.length), sample.question, sample.answer])
        first = len(tokens) - len(sample.answer) if only_answer else 1
        return Example(tokens, np.arange(len(tokens)) >= first)

    def _told(self, numbers: Sequence[int]) -> Example:
        """A story without background: its facts, and each of its questions where it is asked."""
        parts, known = [], 0
        for number in numbers:
            facts, question, answer = self.questions[number]
            parts += [(fact, False) for fact in facts[known:]]
            parts += [(np.array([QUESTION]), False), (question, False), (np.array([ANSWER]), False)]
            parts += [(answer, True), (np.array([END]), True)]
            known = len(facts)
        tokens = np.concatenate([part for part, _ in parts]).astype(np.int32)
        return Example(tokens, np.concatenate([np.full(len(part), counted) for part, counted in parts]))

    def parts(self, sample: Sample, most: int) -> Iterator[np.ndarray]:
        """The stream in parts of at most ``most`` tokens, as they come."""
        read = 0
        room = sample.length - sum(map(len, sample.facts))
        for place, fact in [*zip(sample.places, sample.facts, strict=True), (room, np.empty(0, np.int32))]:
            while read < place:
                count = min(most, place - read)
                yield self.background.slice(sample.begin + read, count)
                read += count
            if len(fact):
                yield fact

    def pieces(self, sample: Sample, size: int) -> Iterator[np.ndarray]:
        """The stream in pieces of exactly ``size`` tokens, the last one shorter if it has to be."""
        kept = np.empty(0, np.int32)
        for part in self.parts(sample, size):
            kept = np.concatenate([kept, part])
            while len(kept) >= size:
                yield kept[:size]
                kept = kept[size:]
        if len(kept):
            yield kept

    def batches(self, samples: Sequence[Sample], size: int) -> Iterator[np.ndarray]:
        """The pieces of several streams of one length side by side, (B, size)."""
        for rows in zip(*(self.pieces(sample, size) for sample in samples), strict=True):
            yield np.stack(rows)
