"""What was learned of a text is left alone by later ones, and comes back with the state to the bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from nestlearn import ContinualLearner
from nestlearn.convert import Level, LevelsConfig
from nestlearn.errors import UserError
from nestlearn.learner import LearnerState, Sessions
from nestlearn.learner.state import SAMPLE
from tests.learner.conftest import LEVELS, WINDOW, tiny, words
from tests.learner.test_learner import same, tensors

CONSOLIDATED = tuple(replace(level, consolidation=1.0) for level in LEVELS)
FIRST = "The level is slow and the memory fast. " * 30
SECOND = "fast memory? slow levels! chunk of a chunk; " * 30


@given(st.lists(st.integers(1, 300), max_size=60))
def test_a_sample_is_spread_evenly_over_a_text(sizes: list[int]) -> None:
    state = LearnerState(())
    for number, size in enumerate(sizes):
        state = state.sampled(torch.full((size,), number))
    places = [int(window[0]) for window in state.sample]
    assert places == list(range(0, len(sizes), state.stride))
    assert sum(map(len, state.sample)) <= SAMPLE
    assert state.stride == 1 or len(places) > 1
    assert state.opened(None).sample == ()


def test_a_text_is_forgotten_less(tokenizer: PreTrainedTokenizerBase) -> None:
    forgotten, learned = [], []
    for levels in (LEVELS, CONSOLIDATED):
        learner = ContinualLearner(tiny(levels=levels), tokenizer)
        learner.read(FIRST)
        after, other = learner.loss(FIRST), learner.loss(SECOND)
        learner.read(SECOND)
        forgotten.append(learner.loss(FIRST) - after)
        learned.append(other - learner.loss(SECOND))
    assert forgotten[1] < 0.5 * forgotten[0]
    assert learned[1] > 0.5 * learned[0] > 0


def test_nothing_is_sampled_and_kept_where_no_level_consolidates(tokenizer: PreTrainedTokenizerBase) -> None:
    learner = ContinualLearner(tiny(), tokenizer)
    learner.read(FIRST)
    assert not any("kept" in name for name in tensors(learner.state))
    assert learner.state.windows == 0


def test_it_comes_back_in_the_middle_of_a_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, text = tiny(levels=CONSOLIDATED), FIRST + SECOND

    def stop(report: object) -> None:
        nonlocal windows
        windows += 1
        if windows == 40:
            raise KeyboardInterrupt

    whole = ContinualLearner(model, tokenizer, tmp_path / "whole", autosave=WINDOW)
    for learner_text, source in ((FIRST, "a"), (text, "b")):
        whole.read(learner_text, source=source)
    windows = -10_000
    broken = ContinualLearner(model, tokenizer, tmp_path / "broken", autosave=WINDOW)
    broken.read(FIRST, source="a")
    windows = 0
    with pytest.raises(KeyboardInterrupt):
        broken.read(text, source="b", on_window=stop)
    again = ContinualLearner(model, tokenizer, tmp_path / "broken", autosave=WINDOW)
    assert len(again.state.sample) > 1
    again.read(text, source="b")
    assert same(again.state, whole.state)
    assert again.state.sample == ()
    first, *_ = again.state.levels[0].kept.values()
    assert first.matrix.shape[0] == first.matrix.shape[1]


def test_it_is_rolled_back_and_forgotten(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    learner = ContinualLearner(tiny(levels=CONSOLIDATED), tokenizer, tmp_path)
    learner.read(FIRST)
    learner.save("first")
    state = learner.state
    learner.read(SECOND)
    assert not same(learner.state, state)
    learner.rollback("first")
    assert same(learner.state, state)
    learner.forget()
    assert not learner.state.levels[0].kept


def test_sessions_consolidate_as_learners_do(tokenizer: PreTrainedTokenizerBase) -> None:
    levels = (Level(WINDOW, 1e-2, consolidation=0.3), Level(2 * WINDOW, 1e-2))
    model = tiny(dtype=torch.float64, levels=levels)
    sessions = Sessions(model, tokenizer)
    alone = {name: ContinualLearner(model, tokenizer) for name in ("ann", "bob")}
    for name in alone:
        sessions.open(name)
    script = [{"ann": words(20), "bob": words(9, 1)}, {"bob": words(20, 2)}, {"ann": words(30, 3), "bob": words(2)}]
    for texts in script:
        sessions.read(texts)
        for name, text in texts.items():
            alone[name].read(text)
    for name, learner in alone.items():
        mine, other = tensors(sessions.states[name]), tensors(learner.state)
        assert mine.keys() == other.keys()
        assert any(".kept" in key for key in mine)
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, other[key], atol=1e-5, rtol=1e-5)


def test_one_more_text_bends_further(tokenizer: PreTrainedTokenizerBase) -> None:
    learner = ContinualLearner(tiny(levels=CONSOLIDATED), tokenizer)
    passes = []
    for text in (FIRST, SECOND, words(200)):
        learner.read(text)
        matrices = [kept.matrix for kept in learner.state.levels[0].kept.values()]
        passes.append(sum(float(matrix.diagonal().sum()) for matrix in matrices))
    assert all(after < before for before, after in pairwise(passes))


def test_a_store_of_before_there_was_consolidation_is_taken_up(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = ContinualLearner(tiny(), tokenizer, tmp_path)
    learner.read(FIRST)
    with monkeypatch.context() as then:
        now = LevelsConfig.to_dict

        def old(config: LevelsConfig) -> dict[str, object]:
            levels = [{k: v for k, v in level.items() if k != "consolidation"} for level in now(config)["levels"]]
            return now(config) | {"levels": levels}

        then.setattr(LevelsConfig, "to_dict", old)
        learner.save("old")
    assert same(ContinualLearner(tiny(), tokenizer, tmp_path).state, learner.state)
    with pytest.raises(UserError, match="other levels"):
        ContinualLearner(tiny(levels=CONSOLIDATED), tokenizer, tmp_path)
