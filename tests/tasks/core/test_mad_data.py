"""The problems of MAD: against cases made by hand and against what the benchmark says of every sequence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.tasks.core.mad_data import IGNORE, TASKS, Problem, draw, memory


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pairs_of(sequence: list[int], keys: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Keys, values and where each value begins, of rows of key symbols (below ``keys``) and value symbols."""
    found: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
    place = 0
    while place < len(sequence):
        begin = place
        while place < len(sequence) and sequence[place] < keys:
            place += 1
        middle = place
        while place < len(sequence) and sequence[place] >= keys:
            place += 1
        found.append((tuple(sequence[begin:middle]), tuple(sequence[middle:place]), middle))
    return found


def test_one_sequence_of_each_by_hand() -> None:
    """What is asked in the sequences of seed 0 (of fuzzy recall: of seed 3), read off by the rules of the task."""
    N = IGNORE
    problem = Problem(vocabulary=10, length=12, copied=3)
    cases = {
        # 9 asks for all, itself included
        "compression": ([7, 5, 4, 2, 2, 0, 0, 0, 1, 7, 5, 9], [7, 5, 4, 2, 2, 0, 0, 0, 1, 7, 5, 9]),
        # 4:9, 3:8, 2:9, 1:5 are new; then 1 twice, and its last value is not read
        "in-context recall": ([4, 9, 3, 8, 2, 9, 1, 5, 1, 5, 1], [N, N, N, N, N, N, N, N, 5, N, 5]),
        # 8 is the blank, 9 the mark
        "selective copying": ([8, 8, 6, 8, 5, 4, 8, 8, 9, 8, 8, 8], [N, N, N, N, N, N, N, N, N, 6, 5, 4]),
        # the map of 10 symbols is 0:6, 1:8, 2:7, 3:4, and 9 is the blank
        "memorisation": ([3, 9, 2, 9, 2, 9, 1, 9, 1, 9, 0, 9], [N, 4, N, 7, N, 7, N, 8, N, 8, N, 6]),
    }
    for task, (tokens, targets) in cases.items():
        found = draw(task, problem, 1, rng(), training=False)
        assert found.tokens[0].tolist() == tokens, task
        assert found.targets[0].tolist() == targets, task
    found = draw("fuzzy recall", Problem(vocabulary=8, length=20, motif=2), 1, rng(3), training=False)
    # filler 7, then 21:53, 21:53, 10:63, 21:53, 21:5(3): the first and 10 are new
    assert found.tokens[0].tolist() == [7, 2, 1, 5, 3, 2, 1, 5, 3, 1, 0, 6, 3, 2, 1, 5, 3, 2, 1, 5]
    assert found.targets[0].tolist() == [N, N, N, N, N, N, 5, 3, N, N, N, N, N, N, 5, 3, N, N, 5, 3]


def test_memorisation_asks_for_what_no_sequence_shows() -> None:
    value_of = memory(9)
    assert value_of.tolist() == [6, 4, 5, 7]  # of keys 0 to 3; 8 is the blank
    found = draw("memorisation", Problem(vocabulary=9, length=8), 50, rng(3), training=False)
    assert (found.tokens[:, 1::2] == 8).all()
    assert (found.targets[:, ::2] == IGNORE).all()
    assert (found.targets[:, 1::2] == value_of[found.tokens[:, ::2]]).all()
    assert set(found.tokens[:, ::2].ravel()) == {0, 1, 2, 3}
    assert np.array_equal(memory(9), value_of)
    assert len(set(memory(256))) == 127


@given(seed=st.integers(0, 99), vocabulary=st.integers(4, 20), pairs=st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_recall_asks_for_the_value_of_every_key_that_was_there(seed: int, vocabulary: int, pairs: int) -> None:
    problem = Problem(vocabulary=vocabulary, length=2 * pairs)
    found = draw("in-context recall", problem, 3, rng(seed), training=False)
    trained = draw("in-context recall", problem, 3, rng(seed), training=True)
    assert found.tokens.shape == (3, 2 * pairs - 1)
    assert np.array_equal(found.tokens, trained.tokens)
    assert np.array_equal(trained.targets[:, :-1], trained.tokens[:, 1:])
    for tokens, targets, following in zip(found.tokens, found.targets, trained.targets, strict=True):
        value_of: dict[int, int] = {}
        for place in range(0, len(tokens), 2):
            key, value = tokens[place], following[place]
            assert 0 <= key < vocabulary // 2 <= value < vocabulary
            assert targets[place] == (value if key in value_of else IGNORE)
            assert value_of.setdefault(key, value) == value
        assert targets[-1] != IGNORE
        assert (targets[1::2] == IGNORE).all()


@given(seed=st.integers(0, 99), vocabulary=st.integers(7, 20), motif=st.integers(1, 3), extra=st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_fuzzy_recall_asks_for_every_symbol_of_a_value_that_is_known(
    seed: int, vocabulary: int, motif: int, extra: int
) -> None:
    problem = Problem(vocabulary=vocabulary, length=4 * motif + extra, motif=motif)
    kinds, filler = (vocabulary - 1) // 2, vocabulary - 1
    for training in (True, False):
        found = draw("fuzzy recall", problem, 2, rng(seed), training)
        assert found.tokens.shape == (2, problem.length)
        for tokens, targets in zip(found.tokens, found.targets, strict=True):
            assert targets[-1] != IGNORE
            sequence = [*(token for token in tokens.tolist() if token != filler), int(targets[-1])]
            offset = problem.length + 1 - len(sequence)
            assert (tokens[:offset] == filler).all()
            if training:
                assert (targets[: max(0, offset - 1)] == IGNORE).all()
                assert targets[max(0, offset - 1) :].tolist() == sequence[0 if offset else 1 :]
                continue
            asked = [IGNORE] * (problem.length + 1)
            value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
            pairs = pairs_of(sequence, kinds)
            for key, value, place in pairs:
                assert len(key) == motif == len(set(key))
                assert 1 <= len(value) <= motif
                assert len(set(value)) == len(value)
                if key in value_of:
                    asked[offset + place : offset + place + len(value)] = value
                assert value_of.setdefault(key, value) == value
            assert targets.tolist() == asked[1:]
            assert pairs[-1][0] in {key for key, _, _ in pairs[:-1]}


def test_fuzzy_training_has_keys_of_every_size() -> None:
    problem = Problem(vocabulary=16, length=64)
    tokens = draw("fuzzy recall", problem, 20, rng(), training=True).tokens
    sequences = [[t for t in row.tolist() if t != 15] for row in tokens]
    sizes = {len(key) for sequence in sequences for key, _, _ in pairs_of(sequence, 7)[:-1]}
    assert sizes == {1, 2, 3}


@given(seed=st.integers(0, 99), vocabulary=st.integers(4, 20), copied=st.integers(1, 9), blanks=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_copying_keeps_the_order_of_what_is_no_blank(seed: int, vocabulary: int, copied: int, blanks: int) -> None:
    problem = Problem(vocabulary=vocabulary, length=2 * copied + blanks + 1, copied=copied)
    for tokens, targets in zip(*draw("selective copying", problem, 3, rng(seed), training=True), strict=True):
        body = copied + blanks
        symbols = [t for t in tokens[:body].tolist() if t != vocabulary - 2]
        assert all(symbol < vocabulary - 2 for symbol in symbols)
        assert tokens[body:].tolist() == [vocabulary - 1] + [vocabulary - 2] * copied
        assert targets.tolist() == [IGNORE] * (body + 1) + symbols
        assert len(symbols) == copied


def test_places_to_copy_from_are_drawn_evenly() -> None:
    problem = Problem(vocabulary=16, length=16, copied=5)
    tokens = draw("selective copying", problem, 4000, rng(), training=True).tokens
    share = (tokens[:, :10] != 14).mean(0)
    assert np.abs(share - 0.5).max() < 0.03


@pytest.mark.parametrize("task", TASKS)
def test_sequences_follow_the_seed_and_what_does_not_fit_is_one_line(task: str) -> None:
    problem = Problem(vocabulary=16, length=32, copied=4)
    one, same, other = (draw(task, problem, 4, rng(seed), training=True).tokens for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    with pytest.raises(UserError, match=f"{task} does not fit into Problem"):
        draw(task, Problem(length=1), 4, rng(), training=True)
    with pytest.raises(UserError, match="unknown task 'recall'"):
        draw("recall", problem, 4, rng(), training=True)
