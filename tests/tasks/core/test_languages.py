"""Formal languages: words and targets against hand-made cases and against recognisers that know only the definition."""

import itertools
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from nestlearn.tasks.core.languages import LANGUAGES, collate, fixed_words, sample


def balanced(word: str, pair: str) -> bool:
    kept = "".join(symbol for symbol in word if symbol in pair)
    while pair in kept:
        kept = kept.replace(pair, "")
    return not kept


RECOGNISERS: dict[str, Callable[[str], bool]] = {
    "(aa)*": lambda word: re.fullmatch("(aa)*", word) is not None,
    "(abab)*": lambda word: re.fullmatch("(abab)*", word) is not None,
    "a^n b^n": lambda word: word == "a" * (len(word) // 2) + "b" * (len(word) // 2),
    "a^n b^n c^n": lambda word: word == "".join(symbol * (len(word) // 3) for symbol in "abc"),
    "Shuffle-2": lambda word: balanced(word, "()") and balanced(word, "[]"),
}
# The longest word whose targets are checked, and the length up to which all words are listed to find what may follow.
LENGTHS = {"(aa)*": (8, 10), "(abab)*": (8, 12), "a^n b^n": (6, 10), "a^n b^n c^n": (6, 9), "Shuffle-2": (4, 8)}


def numbers(name: str, word: str) -> np.ndarray:
    return np.array([LANGUAGES[name].symbols.index(symbol) for symbol in word])


@pytest.mark.parametrize("name", RECOGNISERS)
def test_targets_are_what_may_follow_in_any_word_of_the_language(name: str) -> None:
    symbols, (checked, listed) = LANGUAGES[name].symbols, LENGTHS[name]
    words = set()
    for length in range(listed + 1):
        words |= {w for w in map("".join, itertools.product(symbols, repeat=length)) if RECOGNISERS[name](w)}
    beginnings = {word[:end] for word in words for end in range(len(word) + 1)}
    some = [word for word in words if 0 < len(word) <= checked]
    assert len(some) >= 2
    for word in some:
        targets = LANGUAGES[name].label(numbers(name, word))
        for place in range(1, len(word) + 1):
            allowed = [word[:place] + symbol in beginnings for symbol in symbols] + [word[:place] in words]
            assert targets[place - 1].tolist() == allowed, (word, place)


@pytest.mark.parametrize("name", RECOGNISERS)
def test_words_are_of_the_language_and_of_their_bin(name: str) -> None:
    language = LANGUAGES[name]
    generator = np.random.default_rng(0)
    for bin, low, high in ((0, 1, 10), (1, 11, 20)):
        for word in sample(language, language.sizes(10, bin), 100, generator):
            assert RECOGNISERS[name](language.spelled(word))
            assert low <= len(word) / language.length <= high
    shortest = min(language.sizes(10, 0))
    assert min(len(w) for w in sample(language, language.sizes(10, 0), 200, generator)) == shortest * language.length


def test_bins_are_those_that_the_task_states() -> None:
    bounds = {
        n: [(s[0], s[-1]) for s in (language.sizes(50, 0), language.sizes(50, 1))] for n, language in LANGUAGES.items()
    }
    assert bounds == {
        "Parity": [(2, 50), (51, 100)],
        "(aa)*": [(2, 50), (52, 100)],
        "(abab)*": [(4, 48), (52, 100)],
        "a^n b^n": [(1, 50), (51, 100)],
        "a^n b^n c^n": [(1, 50), (51, 100)],
        "Shuffle-2": [(2, 50), (52, 100)],
    }


def test_parity() -> None:
    language = LANGUAGES["Parity"]
    assert language.label(np.array([1, 0, 1, 1, 0]))[:, 0].tolist() == [True, True, False, True, True]
    drawn = np.concatenate(sample(language, [50], 200, np.random.default_rng(0)))
    assert abs(drawn.mean() - 0.5) < 0.02


def test_targets_by_hand() -> None:
    targets = LANGUAGES["Shuffle-2"].label(numbers("Shuffle-2", "([)]"))
    assert targets.astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]]
    targets = LANGUAGES["a^n b^n c^n"].label(numbers("a^n b^n c^n", "abc"))
    assert targets.astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_brackets_mix_and_every_balanced_word_is_as_likely() -> None:
    language = LANGUAGES["Shuffle-2"]
    words = Counter(language.spelled(word) for word in sample(language, [6], 8000, np.random.default_rng(0)))
    single = {word: count for word, count in words.items() if set(word) <= set("()")}
    assert set(single) == {"()()()", "(())()", "()(())", "(()())", "((()))"}  # the five of Catalan
    assert max(single.values()) < 1.25 * min(single.values())
    assert any(re.search(r"\(\[\)", word) for word in words)  # crossed, which no context-free shuffle gives


def test_a_batch_is_filled_up_at_the_end() -> None:
    language = LANGUAGES["a^n b^n"]
    tokens, targets, real = collate(language, [numbers("a^n b^n", "ab"), numbers("a^n b^n", "aabb")])
    assert tokens.tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]
    assert real.tolist() == [[True, True, False, False], [True] * 4]
    assert not targets[0, 2:].any()


def test_test_words_are_fixed_and_of_unary_languages_all() -> None:
    spelled = [LANGUAGES["(aa)*"].spelled(word) for word in fixed_words(LANGUAGES["(aa)*"], 50, 1, 500, 0)]
    assert spelled == ["a" * length for length in range(52, 101, 2)]
    once, again, other = (fixed_words(LANGUAGES["Parity"], 50, 0, 20, seed) for seed in (1, 1, 2))
    assert [word.tolist() for word in once] == [word.tolist() for word in again]
    assert [word.tolist() for word in once] != [word.tolist() for word in other]
