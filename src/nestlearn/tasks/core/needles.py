"""Needles in a haystack: the six tasks of RULER (Hsieh et al. 2024) that table 1 has, in symbols of a small vocabulary.

A needle is ``the number for Ba ke is 4 0 7 1 .``: two syllables are its key, digits its value (S-NIAH-3: a uuid of
hexadecimal digits). Needles lie in a haystack at depths drawn evenly, each at the end of a sentence; behind it stands
the question and the beginning of the answer, as in RULER:

    what is the number for Ba Ke ? Ba Ke is          and the model goes on with   4 0 7 1 <end>

* S-NIAH-1: one needle in a few sentences that repeat; S-NIAH-2: in real text; S-NIAH-3: the value is a uuid;
* MK: keys that nobody asks for beside the one that is asked; MQ: all keys are asked, in any order, and the answer is
  ``V1 ; K2 is V2 ; ...``; MV: one key has several values, ``V1 , V2 , ...`` in the order of the text.

Choices of ours: keys are drawn afresh from 1,600 pairs, so that none can be learned by heart, and their syllables occur
in needles and questions alone; all keys and all values of a sample differ; sentences are shorter than RULER's; the
answer restates the later keys. Real text is lower-cased, its rarer words are one symbol, ``<unk>``, and its digits are
symbols like those of the values.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nestlearn.data.corpus import load_corpus
from nestlearn.errors import UserError

END, UNKNOWN, DASH = "<end>", "<unk>", "-"
DIGITS = tuple("0123456789ABCDEF")  # text has none of the letters: it is lower-cased
VALUE_SYMBOLS = (*DIGITS, DASH)
NOISE_TEXT = "the water is cold . the road is long . the night is quiet . on we walk and back again ."
NOISE = NOISE_TEXT.split()
SYLLABLES = tuple(consonant + vowel for consonant in "BDGKLMNR" for vowel in "aeiou")
WORDS = tuple(dict.fromkeys([",", ".", ";", "?", "the", "number", "uuid", "for", "is", "what", *NOISE]))
BASE = (END, UNKNOWN, *VALUE_SYMBOLS, *SYLLABLES, *WORDS)
TOKEN = re.compile(r"<unk>|[a-z]+|[0-9]|[.,;?]")
CHARACTERS = 4_000_000  # of each part of a source that are read

Key = tuple[str, ...]
Value = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """``haystack`` is "noise" or "text", ``kind`` "number" or "uuid"; of what there are `Form.many` and not one: the
    "keys", those that are "asked", the "values" of each."""

    haystack: str
    kind: str
    many: tuple[str, ...] = ()


TASKS = {
    "S-NIAH-1": Task("noise", "number"),
    "S-NIAH-2": Task("text", "number"),
    "S-NIAH-3": Task("text", "uuid"),
    "MK-NIAH": Task("text", "number", ("keys",)),
    "MQ-NIAH": Task("text", "number", ("keys", "asked")),
    "MV-NIAH": Task("text", "number", ("values",)),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """How large needles are. RULER's own are the defaults.

    Args:
        digits: of a number.
        groups: hexadecimal digits of a uuid between its dashes.
        many: needles of MK, MQ and MV.
    """

    digits: int = 7
    groups: Sequence[int] = (8, 4, 4, 4, 12)
    many: int = 4


class Needle(NamedTuple):
    """A key and a value in symbols, and the ``place`` of the needle's first symbol in the prompt."""

    key: Key
    value: Value
    place: int


class Sample(NamedTuple):
    """What is read and what is due, in symbols; where in the prompt the ``question`` begins; all needles in the order
    of the text, and the values that are asked."""

    prompt: list[str]
    question: int
    answer: list[str]
    needles: list[Needle]
    values: list[Value]


def draw(task: str, length: int, text: Sequence[str], form: Form, generator: np.random.Generator) -> Sample:
    """A sample of a task whose prompt has ``length`` symbols; its haystack is a window of ``text``, which is a circle.

    Raises `UserError` if the needles do not fit into ``length``.

    >>> sample = draw("S-NIAH-1", 24, [], Form(digits=2), np.random.default_rng(0))
    >>> " ".join(sample.prompt[:13]), " ".join(sample.prompt[13:])
    ('the number for Nu Ma is 5 2 . the water is cold', 'what is the number for Nu Ma ? Nu Ma is')
    """
    rules = TASKS[task]
    keys, values, asked = (form.many if what in rules.many else 1 for what in ("keys", "values", "asked"))
    key_of = _different(lambda: tuple(str(s) for s in generator.choice(SYLLABLES, 2)), keys)
    value_of = _different(lambda: _value(rules.kind, form, generator), keys * values)
    pairs = [(key_of[n // values], value) for n, value in enumerate(value_of)]
    pairs = [pairs[n] for n in generator.permutation(len(pairs))]
    wanted = [key_of[n] for n in generator.permutation(keys)[:asked]]
    said = [["the", rules.kind, "for", *key, "is", *value, "."] for key, value in pairs]
    question = ["what", "is", "the", rules.kind, "for", *_joined(wanted, ","), "?", *wanted[0], "is"]
    room = length - len(question) - sum(map(len, said))
    if room < 0:
        raise UserError(f"{task} needs {length - room} symbols, got length {length}: give more")
    if rules.haystack == "noise":
        hay = [NOISE[n % len(NOISE)] for n in range(room)]
    else:
        start = int(generator.integers(len(text)))
        hay = [text[(start + n) % len(text)] for n in range(room)]

    prompt: list[str] = []
    needles: list[Needle] = []
    done = 0
    for depth, (key, value), needle in zip(_depths(hay, len(pairs), generator), pairs, said, strict=True):
        prompt += hay[done:depth]
        needles.append(Needle(key, value, len(prompt)))
        prompt += needle
        done = depth
    prompt += [*hay[done:], *question]
    assert len(prompt) == length
    answers = [_joined([n.value for n in needles if n.key == key], ",") for key in wanted]
    answer = answers[0] + [
        s for key, more in zip(wanted[1:], answers[1:], strict=True) for s in (";", *key, "is", *more)
    ]
    due = [n.value for key in wanted for n in needles if n.key == key]
    return Sample(prompt, length - len(question), [*answer, END], needles, due)


def fullest(task: str, length: int, form: Form) -> Form:
    """``form`` with as many needles as a prompt of ``length`` holds in a task.

    Raises `UserError` if not even one fits.

    >>> fullest("MQ-NIAH", 128, Form(digits=4)).many, fullest("MV-NIAH", 128, Form(digits=4)).many
    (8, 10)
    """
    best, many = None, 1
    while True:
        more = dataclasses.replace(form, many=many)
        try:
            draw(task, length, [UNKNOWN], more, np.random.default_rng(0))
        except UserError:
            if best is None:
                raise
            return best
        best, many = more, many + 1


def share_found(said: Iterable[str], values: Sequence[Value]) -> float:
    """The share of ``values`` that stand in what a model said before the end, each whole and with nothing around it.

    Their order is free, as in RULER; unlike there, a value inside a longer row of digits does not count.

    >>> share_found("1 2 , 3 4 5 <end> 7 7".split(), [("1", "2"), ("3", "4"), ("7", "7")])
    0.3333333333333333
    """
    runs: list[list[str]] = [[]]
    for symbol in said:
        if symbol == END:
            break
        if symbol in VALUE_SYMBOLS:
            runs[-1].append(symbol)
        else:
            runs.append([])
    there = Counter(map(tuple, runs))
    return sum((there & Counter(values)).values()) / len(values)


class Library(NamedTuple):
    """Real text in symbols by split, and the number of every symbol."""

    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str]
    number: Mapping[str, int]


@functools.lru_cache(maxsize=1)
def read_library(data: str | None, words: int) -> Library:
    """WikiText-2 in the folder ``data``, or without one the sources of Python's standard library.

    ``words``: the vocabulary has so many of the most frequent words of the training text that are not in `BASE`.

    Raises `UserError` if ``data`` has no WikiText-2.
    """
    reason = missing_text(data)
    if reason is not None:
        raise UserError(f"{reason}: give another --data, or none for the standard library's sources")
    corpus = load_corpus("stdlib" if data is None else Path(data) / "wikitext2")
    validation, test = corpus.validation, corpus.test
    if not test:
        validation, test = validation[::2], validation[1::2]
    parts = [TOKEN.findall("\n".join(documents)[:CHARACTERS].lower()) for documents in (corpus.train, validation, test)]
    counts = Counter(parts[0])
    common = sorted((word for word in counts if word not in BASE), key=lambda word: (-counts[word], word))[:words]
    known = {*common, *WORDS, *DIGITS, UNKNOWN}
    train, validation, test = ([token if token in known else UNKNOWN for token in part] for part in parts)
    return Library(train, validation, test, {symbol: n for n, symbol in enumerate([*BASE, *common])})


def missing_text(data: str | None) -> str | None:
    """Why ``data`` cannot be read, in one line; ``None`` if it can."""
    return f"{data} has no folder wikitext2" if data is not None and not (Path(data) / "wikitext2").is_dir() else None


def _different(make: Callable[[], tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """``count`` of what ``make`` gives, no two alike."""
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def _value(kind: str, form: Form, generator: np.random.Generator) -> Value:
    if kind == "number":
        return tuple(str(n) for n in (generator.integers(1, 10), *generator.integers(0, 10, form.digits - 1)))
    return tuple(_joined([[DIGITS[n] for n in generator.integers(0, 16, size)] for size in form.groups], DASH))


def _joined(parts: Iterable[Iterable[str]], between: str) -> list[str]:
    """All parts in a row with a symbol between any two."""
    joined: list[str] = []
    for n, part in enumerate(parts):
        joined += [between, *part] if n else part
    return joined


def _depths(hay: Sequence[str], count: int, generator: np.random.Generator) -> list[int]:
    """Sorted places in the haystack, each the beginning or the end of a sentence nearest to one drawn evenly."""
    ends = np.array([0, *(n + 1 for n, symbol in enumerate(hay) if symbol == "."), len(hay)])
    drawn = np.sort(generator.random(count)) * len(hay)
    return [int(ends[np.abs(ends - depth).argmin()]) for depth in drawn]
