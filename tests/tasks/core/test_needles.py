"""Needles: samples against cases made by hand and against a reader that knows only the sentences."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.tasks.core.needles import (
    BASE,
    DIGITS,
    END,
    NOISE,
    SYLLABLES,
    TASKS,
    UNKNOWN,
    WORDS,
    Form,
    Library,
    Sample,
    draw,
    fullest,
    read_library,
    share_found,
)

FORM = Form(digits=4, groups=(4, 2), many=3)
WRITTEN = "in 1 9 8 4 the <unk> was long . it had 2 parts , the number of which is known . and then"
TEXT = WRITTEN.split()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def spelled(sample: Sample) -> str:
    return " ".join(sample.prompt) + " | " + " ".join(sample.answer)


def test_a_needle_in_noise_by_hand() -> None:
    sentences = ["the water is cold .", "the road is long .", "the night is quiet ."]
    begins = set()
    for seed in range(20):
        sample = draw("S-NIAH-1", 38, [], Form(digits=3), rng(seed))
        key, value, place = sample.needles[0]
        needle = f"the number for {' '.join(key)} is {' '.join(value)} ."
        parts = [*sentences, "on we"]  # 17 words of hay, and no end of a sentence but these and the last
        parts.insert({0: 0, 5: 1, 10: 2, 15: 3, 17: 4}[place], needle)
        question = f"what is the number for {' '.join(key)} ? {' '.join(key)} is"
        assert spelled(sample) == f"{' '.join(parts)} {question} | {' '.join(value)} <end>"
        assert sample.prompt[sample.question :] == question.split()
        begins.add(place)
    assert len(begins) > 3


def test_answers_of_many_by_hand() -> None:
    """Without any hay a prompt is its needles and its question."""
    length = {"MK-NIAH": 3 * 11 + 11, "MQ-NIAH": 3 * 11 + 17, "MV-NIAH": 3 * 11 + 11}
    for task in length:
        sample = draw(task, length[task], TEXT, FORM, rng(1))
        said = " ".join(f"the number for {' '.join(n.key)} is {' '.join(n.value)} ." for n in sample.needles)
        value_of = {" ".join(n.key): " ".join(n.value) for n in sample.needles}
        values = [" ".join(n.value) for n in sample.needles]
        rest = spelled(sample).removeprefix(said + " what is the number for ")
        asked = rest.split(" ?")[0].split(" , ")
        if task == "MQ-NIAH":
            assert sorted(asked) == sorted(value_of)
            first, *later = (f"{key} is {value_of[key]}" for key in asked)
            assert rest == f"{' , '.join(asked)} ? {first.replace(' is ', ' is | ')} ; {' ; '.join(later)} <end>"
        else:
            (key,) = asked
            answer = value_of[key] if task == "MK-NIAH" else " , ".join(values)
            assert rest == f"{key} ? {key} is | {answer} <end>"


@given(task=st.sampled_from(list(TASKS)), seed=st.integers(0, 999), extra=st.integers(0, 80), many=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_the_answer_is_in_the_context_where_it_is_said_to_be(task: str, seed: int, extra: int, many: int) -> None:
    form = Form(digits=2, groups=(3, 2), many=many)
    length = 60 + 14 * many + extra
    sample = draw(task, length, TEXT, form, rng(seed))
    assert len(sample.prompt) == length
    assert sample.answer[-1] == END
    kind = "uuid" if task == "S-NIAH-3" else "number"
    rest = list(sample.prompt)
    for key, value, place in reversed(sample.needles):
        needle = ["the", kind, "for", *key, "is", *value, "."]
        assert sample.prompt[place : place + len(needle)] == needle
        del rest[place : place + len(needle)]
    hay, question = rest[: -(length - sample.question)], sample.prompt[sample.question :]
    if task == "S-NIAH-1":
        assert hay == (NOISE * length)[: len(hay)]
    else:
        start = next(n for n in range(len(TEXT)) if (TEXT[n:] + TEXT * length)[: len(hay)] == hay)
        assert start < len(TEXT)
    assert not set(hay) & set(SYLLABLES)
    keys = {needle.key for needle in sample.needles}
    values = [needle.value for needle in sample.needles]
    assert len(keys) == (many if "keys" in TASKS[task].many else 1)
    assert len(values) == (many if TASKS[task].many else 1)
    assert len(set(values)) == len(values)
    asked = [key for key in keys if any(tuple(question[n : n + 2]) == key for n in range(len(question)))]
    assert len(asked) == (many if "asked" in TASKS[task].many else 1)
    assert Counter(sample.values) == Counter(n.value for n in sample.needles if n.key in asked)
    assert tuple(question[-3:-1]) in asked
    assert share_found(sample.answer, sample.values) == 1
    for n in sample.needles:
        if n.key not in asked:  # a distractor
            assert share_found(n.value, sample.values) == 0


def test_every_depth_is_as_likely_as_any_other() -> None:
    depths = np.array([draw("S-NIAH-1", 500, [], FORM, rng(seed)).needles[0].place / 478 for seed in range(2000)])
    counts, _ = np.histogram(depths, bins=10, range=(0, 1.0001))
    assert counts.min() > 140
    assert counts.max() < 260
    first = [draw("MK-NIAH", 500, TEXT, FORM, rng(s)) for s in range(300)]
    asked = [next(n.place for n in sample.needles if n.value in sample.values) for sample in first]
    assert np.mean(asked) == pytest.approx(228, abs=25)  # the needle that is asked may stand anywhere among the others


def test_numbers_and_uuids_have_their_form() -> None:
    samples = [draw("S-NIAH-2", 100, TEXT, Form(), rng(seed)) for seed in range(50)]
    numbers = {sample.values[0] for sample in samples}
    assert len(numbers) == 50
    assert all(len(n) == 7 and n[0] != "0" and set(n) <= set(DIGITS[:10]) for n in numbers)
    uuid = "".join(draw("S-NIAH-3", 100, TEXT, Form(), rng()).values[0])
    assert [len(part) for part in uuid.split("-")] == [8, 4, 4, 4, 12]
    assert set(uuid) <= {*DIGITS, "-"}


def test_a_prompt_is_filled_and_what_does_not_fit_is_one_line() -> None:
    full = fullest("MV-NIAH", 100, FORM)
    draw("MV-NIAH", 100, TEXT, full, rng())
    with pytest.raises(UserError, match="MV-NIAH needs 99 symbols, got length 98: give more"):
        draw("MV-NIAH", 98, TEXT, Form(digits=4, many=8), rng())
    assert full.many == 8  # 8 * 11 + 11 = 99
    with pytest.raises(UserError, match="S-NIAH-1 needs"):
        fullest("S-NIAH-1", 5, FORM)


def test_a_value_counts_only_whole_before_the_end_and_once() -> None:
    due = [("1", "2"), ("3", "4")]
    cases = {
        "1 2 , 3 4 <end>": 1.0,
        "3 4 ; Ba Be is 1 2": 1.0,
        "1 2 <end> 3 4": 0.5,
        "1 2 , 1 2 <end>": 0.5,
        "1 2 3 4 <end>": 0.0,
        "0 1 2 , 3 <end>": 0.0,
        "<end>": 0.0,
    }
    for said, share in cases.items():
        assert share_found(said.split(), due) == share, said


def check(library: Library, words: int) -> None:
    assert len(library.number) == len(set(library.number)) == len(BASE) + words
    assert sorted(library.number.values()) == list(range(len(library.number)))
    for part in (library.train, library.validation, library.test):
        assert len(part) > 10_000
        assert set(part) <= set(library.number)
        assert not set(part) & {*SYLLABLES, END, *"ABCDEF"}
    counts = Counter(library.train)
    extra = list(library.number)[len(BASE) :]
    assert [counts[word] for word in extra] == sorted((counts[word] for word in extra), reverse=True)
    assert counts["the"] > 0
    assert counts[UNKNOWN] < 0.6 * len(library.train)


def test_text_without_data_is_of_the_standard_library() -> None:
    check(read_library(None, 100), 100)


def test_text_of_wikitext(shared_data: Path, tmp_path: Path) -> None:
    library = read_library(str(shared_data), 50)
    check(library, 50)
    raw = (shared_data / "wikitext2" / "valid.txt").read_text().lower().split()
    kept = {*list(library.number)[len(BASE) :], *WORDS}
    assert library.validation.count("of") == raw.count("of")
    assert {"of", "and", "the"} <= kept
    with pytest.raises(UserError, match="has no folder wikitext2: give another --data"):
        read_library(str(tmp_path), 50)
