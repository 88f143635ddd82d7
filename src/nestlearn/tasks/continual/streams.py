"""A stream of domains that conflict: a grammar in LaTeX, Python, requests with their intents, another language.

Of each domain some passages are read, others between them are held out, and questions are asked about what was read.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from nestlearn.data.stdlib_corpus import stdlib_documents

FILES = ["kalamang/grammar_tex", "clinc150/data_full.json", "teanu/examples.csv"]  # of the data folder
EVERY = 5  # one passage in so many is held out
CHOICES = 4  # of a question
LETTERS, BEFORE = 5, 8  # of the word that a question asks for, and words before it


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, the endings to choose from and which one is right."""

    prompt: str
    choices: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Domain:
    """One part of the stream.

    Args:
        name: in the report.
        read: the text to learn.
        held_out: passages that stand between those of ``read``.
        questions: about what was read; the text is not in the context when they are asked.
    """

    name: str
    read: str
    held_out: str
    questions: list[Question]


def load_domains(
    data: str, tokenizer: PreTrainedTokenizerBase, tokens: int, held_out: int, questions: int, seed: int
) -> list[Domain]:
    """The stream in the order in which it is read.

    Args:
        data: the folder of real data.
        tokenizer: counts tokens.
        tokens: to read of each domain, or a passage more; fewer where there is no more.
        held_out: tokens of each domain that are held out, likewise.
        questions: of each domain, at most.
        seed: draws where in each source the passages begin, and the questions.
    """
    generator = np.random.default_rng(seed)
    folder = Path(data)
    sources = {
        "grammar": (_paragraphs(path.read_text(encoding="utf-8") for path in _chapters(folder, generator)), "\n\n"),
        "code": (_paragraphs(_modules(generator)), "\n\n"),
        "intents": (_requests(folder, generator), "\n"),
        "teanu": (_sentences(folder, generator), "\n"),
    }
    found = []
    for name, (passages, between) in sources.items():
        read, held = _deal(passages, between, tokenizer, tokens, held_out)
        ask = _endings if name in ("intents", "teanu") else _words
        asked = ask(read, questions, generator)
        found.append(Domain(name, between.join(read) + between, between.join(held) + between, asked))
    return found


def _deal(
    passages: Iterable[str], between: str, tokenizer: PreTrainedTokenizerBase, tokens: int, held_out: int
) -> tuple[list[str], list[str]]:
    """Passages to read and held out, until there are enough of either."""
    parts: tuple[list[str], list[str]] = [], []
    counts = [0, 0]
    wanted = tokens, held_out
    for place, passage in enumerate(passages):
        which = int(place % EVERY == EVERY - 1)
        if counts[which] < wanted[which]:
            parts[which].append(passage)
            counts[which] += len(tokenizer(passage + between, add_special_tokens=False)["input_ids"])
        if counts[0] >= tokens and counts[1] >= held_out:
            break
    return parts


def _paragraphs(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for part in text.split("\n\n"):
            if len(part) >= 80:
                yield part.strip("\n")


def _chapters(folder: Path, generator: np.random.Generator) -> list[Path]:
    chapters = sorted((folder / FILES[0]).glob("[01]*.tex"))
    return [chapters[i] for i in generator.permutation(len(chapters))]


def _modules(generator: np.random.Generator) -> Iterable[str]:
    documents = stdlib_documents()
    return (documents[i][1] for i in generator.permutation(len(documents)))


def _requests(folder: Path, generator: np.random.Generator) -> Iterable[str]:
    pairs = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))["train"]
    return (f"Request: {pairs[i][0]}\nIntent: {pairs[i][1]}\n" for i in generator.permutation(len(pairs)))


def _sentences(folder: Path, generator: np.random.Generator) -> Iterable[str]:
    with (folder / FILES[2]).open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["Primary_Text"] and row["Translated_Text"]]
    begin = int(generator.integers(len(rows)))
    rows = rows[begin:] + rows[:begin]
    return (f"Teanu: {row['Primary_Text']}\nEnglish: {row['Translated_Text']}\n" for row in rows)


def _endings(read: Sequence[str], count: int, generator: np.random.Generator) -> list[Question]:
    """Which of the endings that were read, the text behind the last colon, belongs to a passage."""
    pairs = [passage.rstrip("\n").rpartition(": ") for passage in read]
    endings = sorted({ending for _, _, ending in pairs})
    asked = [pairs[i] for i in generator.permutation(len(pairs))[:count]]
    return [_question(f"{head}:", f" {end}\n", [f" {e}\n" for e in endings], generator) for head, _, end in asked]


def _words(read: Sequence[str], count: int, generator: np.random.Generator) -> list[Question]:
    """Which word stood behind the beginning of a passage, among words that were read."""
    pattern = rf"(?<=[ (]){'[A-Za-z]' * LETTERS}[a-z]*\b"
    words = sorted({word for passage in read for word in re.findall(pattern, passage)})
    asked = []
    for i in generator.permutation(len(read)):
        places = [m for m in re.finditer(pattern, read[i]) if len(read[i][: m.start()].split()) >= BEFORE]
        if places and len(asked) < count:
            place = places[int(generator.integers(len(places)))]
            asked.append((read[i][: place.start()], place.group()))
    found = []
    for head, word in asked:
        space = " " if head.endswith(" ") else ""
        others = [f"{space}{other}" for other in words]
        found.append(_question(head.removesuffix(" "), f"{space}{word}", others, generator))
    return found


def _question(prompt: str, right: str, endings: Sequence[str], generator: np.random.Generator) -> Question:
    wrong = [ending for ending in endings if ending != right]
    picked = [wrong[i] for i in generator.permutation(len(wrong))[: CHOICES - 1]]
    gold = int(generator.integers(len(picked) + 1))
    return Question(prompt, (*picked[:gold], right, *picked[gold:]), gold)
