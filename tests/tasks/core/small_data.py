"""A small folder of data in the formats of the real one, in sentences of our own."""

import json
from pathlib import Path
from typing import Any

import numpy as np

PEOPLE, PLACES = ("Ada", "Ben", "Cleo"), ("kitchen", "garden", "office", "cellar")
SUBJECTS = ("The river", "A small boat", "The old clock", "Every second stone", "Nobody", "The wind")
VERBS = ("turned", "waited", "fell", "sang", "stood still", "went on")
ENDS = ("in the morning", "behind the hill", "for 12 days", "without a sound", "again")


def prose(sentences: int, seed: int) -> str:
    """Sentences that end in a full stop."""
    generator = np.random.default_rng(seed)
    return " ".join(
        f"{generator.choice(SUBJECTS)} {generator.choice(VERBS)} {generator.choice(ENDS)} ." for _ in range(sentences)
    )


def stories(count: int, seed: int) -> str:
    """Stories of two moves and a question, twice, as bAbI writes them."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        at: dict[str, tuple[str, int]] = {}
        for start in (1, 4):
            for number in (start, start + 1):
                person, place = str(generator.choice(PEOPLE)), str(generator.choice(PLACES))
                at[person] = place, number
                lines.append(f"{number} {person} went to the {place}.")
            place, number = at[person]
            lines.append(f"{start + 2} Where is {person}? \t{place}\t{number}")
    return "\n".join(lines) + "\n"


CHOICES: dict[str, list[dict[str, Any]]] = {
    "lambada/lambada_openai.jsonl": [
        {"context": "The boat went on and on, for it was a small", "continuation": "boat"},
        {"context": "Nobody waited for the old", "continuation": "clock"},
        {"context": "It was the wind that sang, only the", "continuation": "wind"},
    ],
    "commonsense/piqa.jsonl": [
        {"query": "Question: How do you stop a clock?\n", "choices": ["Hold it.", "Sing to it."], "gold": 0},
        {"query": "Question: a boat\n", "choices": ["it falls in the morning", "it floats"], "gold": 1},
    ],
    "hellaswag/hellaswag_val.jsonl": [
        {"ctx": "A boat comes in. It", "label": 2, "endings": ["sings.", "is a clock that fell.", "stops.", "is 12."]},
        {"ctx": "The wind", "label": 0, "endings": ["turned.", "stood.", "waited in the kitchen.", "is old."]},
    ],
    "commonsense/winogrande.jsonl": [
        {
            "context_options": ["The clock fell on the stone as the clock", "The clock fell on the stone as the stone"],
            "continuation": "was loose.",
            "gold": 0,
        },
        {"context_options": ["Ada saw Ben so Ada", "Ada saw Ben so Ben"], "continuation": "was seen.", "gold": 1},
    ],
    "commonsense/arc_easy.jsonl": [
        {"query": "Question: What turns?", "choices": ["a wheel", "a stone", "a word", "a wall"], "gold": 0}
    ],
    "commonsense/arc_challenge.jsonl": [
        {"query": "Question: What waits longest?", "choices": ["wind", "an old stone", "a boat"], "gold": 1},
        {"query": "Question: What is still?", "choices": ["the river in the morning", "a wall"], "gold": 1},
    ],
    "commonsense/siqa.jsonl": [
        {
            "query": "Context: Ada waited.\nQuestion: Why?\nChoices:\nA. for Ben\nB. for 12\nAnswer:",
            "choices": ["A", "B"],
            "gold": 0,
        }
    ],
    "commonsense/boolq.jsonl": [
        {"query": "Passage: The clock fell.\nQuestion: did the clock fall?", "choices": ["no", "yes"], "gold": 1}
    ],
}


def write(folder: Path) -> Path:
    """Fill a folder, and give it back."""
    texts = {
        "wikitext2/train.txt": prose(400, 0),
        "wikitext2/valid.txt": prose(60, 1),
        "wikitext2/test.txt": prose(120, 2),
        "babi/en-10k/qa1_single-supporting-fact_train.txt": stories(40, 3),
        "babi/en/qa1_single-supporting-fact_test.txt": stories(20, 4),
    }
    texts |= {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in CHOICES.items()}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
