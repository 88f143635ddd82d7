"""Facts hidden in text: the files of bAbI, and streams against what they are made of."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.tasks.core.babi import (
    ANSWER,
    END,
    QUESTION,
    Background,
    Question,
    Sample,
    Teller,
    Vocabulary,
    read_questions,
    task_file,
)
from tests.tasks.core import small_data

FILE = """1 Ada went to the kitchen.
2 Ben took the lamp.
3 Where is Ada? \tkitchen\t1
4 Ada went to the garden.
5 Where is Ada? \tgarden\t4
1 Ben is here.
2 Who is here?\tBen\t1
"""


def test_a_file_of_babi_as_questions_with_the_facts_before_them(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text(FILE)
    first = ("Ada went to the kitchen.", "Ben took the lamp.")
    assert read_questions(tmp_path / "file.txt") == [
        Question(first, "Where is Ada?", "kitchen", 0),
        Question((*first, "Ada went to the garden."), "Where is Ada?", "garden", 0),
        Question(("Ben is here.",), "Who is here?", "Ben", 1),
    ]
    for text in ("no number", "2 begins in the middle.\n"):
        (tmp_path / "file.txt").write_text(text)
        with pytest.raises(UserError, match=r"line 1 is not of bAbI"):
            read_questions(tmp_path / "file.txt")


def test_the_larger_training_file_is_taken_and_a_missing_one_is_a_line(tmp_path: Path) -> None:
    small_data.write(tmp_path)
    assert task_file(tmp_path, "qa1", "train").parent.name == "en-10k"
    assert task_file(tmp_path, "qa1", "test").parent.name == "en"
    with pytest.raises(UserError, match="is not there: give the folder of real data"):
        task_file(tmp_path, "qa2", "train")
    with pytest.raises(UserError, match="unknown task of bAbI 'qa6'"):
        task_file(tmp_path, "qa6", "train")


def test_real_files_have_their_thousand_questions(shared_data: Path) -> None:
    for task in ("qa1", "qa2", "qa3", "qa4", "qa5"):
        questions = read_questions(task_file(shared_data, task, "test"))
        assert len(questions) == 1000
        assert all(len(q.answer.split()) == 1 for q in questions)
    assert len(read_questions(task_file(shared_data, "qa1", "train"))) == 10_000


TEXT = "one two . three . four five six ! seven eight . nine"


def teller(facts: tuple[str, ...] = ("a b .", "c .", "d e f .")) -> Teller:
    questions = [Question(facts[:count], "q ?", f"x{count}", 0) for count in range(1, len(facts) + 1)]
    vocabulary = Vocabulary([*facts, "q ?", "x 1 2 3"], TEXT, 100)
    return Teller(questions, Background(TEXT, vocabulary), vocabulary)


@given(token=st.integers(0, 60))
def test_sentences_of_a_text_that_repeats(token: int) -> None:
    background = teller().background
    assert [background.sentence(k) for k in range(7)] == [0, 3, 5, 9, 12, 13, 16]
    number = background.last_sentence(token)
    assert background.sentence(number) <= token < background.sentence(number + 1)
    assert np.array_equal(background.slice(token, 30), np.tile(background.tokens, 10)[token : token + 30])


@settings(max_examples=200)
@given(length=st.integers(9, 80), size=st.integers(1, 90), seed=st.integers(0, 1000), number=st.integers(0, 2))
def test_a_stream_has_its_length_and_its_facts_in_order_between_sentences(
    length: int, size: int, seed: int, number: int
) -> None:
    told = teller()
    sample = told.hide(number, length, np.random.default_rng(seed))
    pieces = list(told.pieces(sample, size))
    assert {len(piece) for piece in pieces[:-1]} <= {size}
    stream = np.concatenate(pieces).tolist()
    assert len(stream) == length
    # Taking the facts out again, from the last on, leaves the background.
    ends, moved = [], 0
    for place, fact in zip(sample.places, sample.facts, strict=True):
        begin = place + moved
        assert stream[begin : begin + len(fact)] == fact.tolist()
        ends.append((begin, begin + len(fact)))
        moved += len(fact)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
    rest = [token for n, token in enumerate(stream) if not any(begin <= n < end for begin, end in ends)]
    assert rest == told.background.slice(sample.begin, length - moved).tolist()
    starts = {told.background.sentence(k) for k in range(200)}
    assert {sample.begin + place for place in sample.places} | {sample.begin} <= starts
    assert sample.question.tolist()[::3] == [QUESTION, ANSWER]
    assert sample.answer.tolist()[-1] == END


def test_facts_stand_evenly_at_all_places_that_fit() -> None:
    told, generator = teller(("a .",)), np.random.default_rng(0)
    drawn = [told.hide(0, 2 + 13, generator) for _ in range(3000)]
    from_first = [sample.places[0] for sample in drawn if sample.begin == 0]
    counts = {place: from_first.count(place) for place in sorted(set(from_first))}
    assert list(counts) == [0, 3, 5, 9, 12, 13]  # 13: after the last word of the text, where it begins again
    assert all(abs(count - len(from_first) / 6) < 5 * np.sqrt(len(from_first) / 6) for count in counts.values())


def test_questions_that_do_not_fit_are_not_drawn() -> None:
    told, generator = teller(), np.random.default_rng(0)
    assert {len(told.draw(5, generator).facts) for _ in range(50)} == {1, 2}
    with pytest.raises(UserError, match="no question's facts fit into 2 tokens: the shortest has 3"):
        told.draw(2, generator)


def test_training_examples_count_what_they_should() -> None:
    told, generator = teller(("a .", "b .")), np.random.default_rng(0)
    story = told.example(0, True, generator)
    words = [*Vocabulary(["a .", "b .", "q ?", "x 1 2 3"], TEXT, 100).words]
    numbers = {word: number for number, word in enumerate(words)}
    first, second = "a . <question> q ? <answer> x 1 <end>", "b . <question> q ? <answer> x 2 <end>"
    expected = f"{first} {second}".split()
    assert story.tokens.tolist() == [numbers[word] for word in expected]
    assert np.flatnonzero(story.counts).tolist() == [6, 7, 8, 15, 16, 17]
    assert np.flatnonzero(~told.example(0, False, generator).counts).tolist() == [0]
    sample = told.hide(1, 20, generator)
    whole = told.told(sample, True)
    assert len(whole.tokens) == 20 + 4 + 3
    assert np.flatnonzero(whole.counts).tolist() == [24, 25, 26]
    assert told.told(sample, False).counts.sum() == 26


def test_ten_million_tokens_are_never_there_at_once() -> None:
    told = teller()
    sample = told.hide(2, 10_000_000, np.random.default_rng(0))
    tracemalloc.start()
    total = sum(len(piece) for piece in told.pieces(sample, 65_536))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 10_000_000
    assert peak < 8 * 2**20


def test_streams_side_by_side() -> None:
    told, generator = teller(), np.random.default_rng(0)
    samples: list[Sample] = [told.draw(50, generator) for _ in range(3)]
    read = np.concatenate(list(told.batches(samples, 16)), axis=1)
    assert read.shape == (3, 50)
    for row, sample in zip(read, samples, strict=True):
        assert np.array_equal(row, np.concatenate(list(told.pieces(sample, 7))))
