"""A small folder of data in the formats of the real one, in words of our own."""

import csv
import io
import json
from pathlib import Path

import numpy as np

from nestlearn.tasks.continual.classes import Example

LABELS = ["red", "blue"]
EXAMPLES = [Example("a rose", 0), Example("the sky", 1), Example("blood", 0), Example("the sea", 1)]
CLASSES = ("pay_bill", "playMusic", "weather", "setAlarm", "translate")
SUBJECTS = ("the river", "a small boat", "the old clock", "every second stone", "nobody", "the wind")
VERBS = ("turned", "waited", "fell", "sang", "stood still", "went on")
TEX = "\\section{A part} The morpheme \\textit{%s} follows the %s, before every second particle of a sentence (%d)."


def sentence(generator: np.random.Generator) -> str:
    return f"{generator.choice(SUBJECTS)} {generator.choice(VERBS)} {generator.integers(100)} times"


def _csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def write(folder: Path) -> Path:
    """Fill a folder, and give it back."""
    generator = np.random.default_rng(0)

    def pairs(count: int) -> list[list[str]]:
        return [[f"{label} {n}: {sentence(generator)}", label] for label in CLASSES for n in range(count)]

    numbers = {label: str(n) for n, label in enumerate(CLASSES)}
    articles = {name: _csv([["1", numbers[label], text] for text, label in pairs(8)]) for name in ("val", "test")}
    paragraphs = [TEX % (w, v, n) for n, (w, v) in enumerate((s, v) for s in SUBJECTS for v in VERBS)]
    teanu = [[f"ka {n} {sentence(generator)[::-1]}", sentence(generator)] for n in range(40)]
    prose = " ".join(f"{sentence(generator)} ." for _ in range(400))
    lambada = [{"context": f"Once {sentence(generator)} and saw the", "continuation": "boat"} for _ in range(4)]
    arc = [{"query": "Question: What turns?", "choices": ["a wheel", "a stone", "a word"], "gold": 0}] * 3
    asked = [{"question": f"who {sentence(generator)}", "answer": ["nobody"]} for _ in range(3)]
    texts = {
        "clinc150/data_full.json": json.dumps({"train": pairs(8), "val": pairs(3), "test": pairs(4)}),
        "banking77/train.csv": _csv([["text", "category"], *pairs(9)]),
        "banking77/test.csv": _csv([["text", "category"], *pairs(4)]),
        "dbpedia_hier/val.csv": articles["val"],
        "dbpedia_hier/test.csv": articles["test"],
        "dbpedia_hier/labels_inferred.json": json.dumps({"l2": {n: label for label, n in numbers.items()}}),
        "kalamang/grammar_tex/01Intro.tex": "\n\n".join(paragraphs),
        "teanu/examples.csv": _csv([["Primary_Text", "Translated_Text"], *teanu]),
        "wikitext2/train.txt": prose,
        "wikitext2/test.txt": prose,
    }
    lines = {
        "lambada/lambada_openai.jsonl": lambada,
        "commonsense/arc_easy.jsonl": arc,
        "nq_open/NQ-open.dev.jsonl": asked,
    }
    texts |= {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in lines.items()}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
