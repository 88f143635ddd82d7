"""Data sets whose classes arrive in groups: CLINC150, Banking77, DBpedia (figure 6).

A class is named in words, and an example is read as ``Text: ... / Label: words of the class``.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FILES = {  # what a data set needs of the data folder
    "clinc150": ["clinc150/data_full.json"],
    "banking77": ["banking77/train.csv", "banking77/test.csv"],
    "dbpedia": ["dbpedia_hier/val.csv", "dbpedia_hier/test.csv", "dbpedia_hier/labels_inferred.json"],
}
PROMPT = "Text: {}\nLabel:"
WORDS = 24  # of a text, at most: articles of DBpedia are longer than the requests of the other two


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and the number of its class."""

    text: str
    label: int

    @property
    def prompt(self) -> str:
        """What the model reads before the class."""
        return PROMPT.format(self.text)


@dataclasses.dataclass(frozen=True)
class Groups:
    """A class-incremental problem.

    Args:
        labels: the words of every class, in the order of arrival.
        groups: numbers of the classes that arrive together.
        train, validation, test: examples of each group.
    """

    labels: list[str]
    groups: list[list[int]]
    train: list[list[Example]]
    validation: list[list[Example]]
    test: list[list[Example]]


def load_groups(
    data: str, name: str, classes: int, groups: int, train: int, validation: int, test: int, seed: int
) -> Groups:
    """A subsample of a data set, its classes dealt into groups.

    Args:
        data: the folder of real data.
        name: of `FILES`.
        classes: how many, drawn by ``seed`` among those with enough examples; at most all of these.
        groups: in how many groups they arrive; the first ones are larger where it does not divide evenly.
        train, validation, test: examples of a class. Validation examples are never training examples.
        seed: draws classes, their order and the examples.
    """
    learn, held = _read(data, name)
    need = train + validation
    able = sorted(label for label in learn if len(learn[label]) >= need and len(held.get(label, ())) >= test)
    generator = np.random.default_rng(seed)
    chosen = [able[i] for i in generator.permutation(len(able))[:classes]]
    parts = [part.tolist() for part in np.array_split(np.arange(len(chosen)), groups)]
    drawn: dict[str, list[list[Example]]] = {"train": [], "validation": [], "test": []}
    for part in parts:
        for kind in drawn:
            drawn[kind].append([])
        for number in part:
            texts = learn[chosen[number]]
            order = generator.permutation(len(texts))[:need]
            others = held[chosen[number]]
            picked = {
                "train": [texts[i] for i in order[:train]],
                "validation": [texts[i] for i in order[train:]],
                "test": [others[i] for i in generator.permutation(len(others))[:test]],
            }
            for kind, items in picked.items():
                drawn[kind][-1] += [Example(text, number) for text in items]
    return Groups([words(label) for label in chosen], parts, drawn["train"], drawn["validation"], drawn["test"])


def words(label: str) -> str:
    """The name of a class as words.

    >>> words("pay_bill"), words("GridironFootballPlayer"), words("Refund_not_showing_up"), words("what_is_your_name?")
    ('pay bill', 'gridiron football player', 'refund not showing up', 'what is your name')
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    return " ".join(re.findall(r"[a-z0-9]+", spaced.lower()))


@functools.lru_cache(maxsize=1)
def _read(data: str, name: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts by class to learn from, and held out."""
    folder = Path(data)
    if name == "clinc150":
        found = json.loads((folder / FILES[name][0]).read_text(encoding="utf-8"))
        return _by_class(found["train"] + found["val"]), _by_class(found["test"])
    if name == "banking77":
        return tuple(_by_class(_rows(folder / file)[1:]) for file in FILES[name])  # type: ignore[return-value]
    names = json.loads((folder / FILES[name][2]).read_text(encoding="utf-8"))["l2"]
    parts = [_by_class([(row[2], names[row[1]]) for row in _rows(folder / file)]) for file in FILES[name][:2]]
    return parts[0], parts[1]


def _rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.reader(lines))


def _by_class(pairs: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text, label in pairs:
        found.setdefault(label, []).append(" ".join(text.split()[:WORDS]))
    return found
