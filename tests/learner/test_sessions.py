"""Many sessions on one model: as if each were alone, and no bit of one in another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from nestlearn.convert import ContinualModel, Level
from nestlearn.errors import UserError
from nestlearn.learner import ContinualLearner, Sessions
from tests.learner.conftest import WINDOW, tiny, words
from tests.learner.test_learner import same, tensors

NAMES = ("ann", "bob", "cho")
MODELS = [
    tiny(dtype=torch.float64),
    tiny(dtype=torch.float64, kind="split", levels=(Level(WINDOW, 1e-2), Level(3 * WINDOW, 0.1, rule="sgd"))),
]
TEXT = st.builds(lambda seed, length: words(20, seed)[:length], st.integers(0, 99), st.integers(0, 70))
SCRIPT = st.lists(st.dictionaries(st.sampled_from(NAMES), TEXT, min_size=1), min_size=1, max_size=5)


def opened(model: ContinualModel, tokenizer: PreTrainedTokenizerBase, context: int = 0, rows: int = 8) -> Sessions:
    sessions = Sessions(model, tokenizer, context=context, rows=rows)
    for name in NAMES:
        sessions.open(name)
    return sessions


@settings(max_examples=12, deadline=None)
@given(script=SCRIPT, context=st.sampled_from([0, 5]), rows=st.integers(1, 3), kind=st.integers(0, 1))
def test_interleaved_sessions_are_separate_learners(
    tokenizer: PreTrainedTokenizerBase, script: list[dict[str, str]], context: int, rows: int, kind: int
) -> None:
    sessions = opened(MODELS[kind], tokenizer, context, rows)
    alone = {name: ContinualLearner(MODELS[kind], tokenizer, context=context) for name in NAMES}
    for texts in script:
        reports = sessions.read(texts)
        for name, text in texts.items():
            expected = alone[name].read(text)
            assert reports[name].tokens == expected.tokens
            assert reports[name].loss == pytest.approx(expected.loss, abs=1e-5)
    for name in NAMES:
        mine, other = tensors(sessions.states[name]), tensors(alone[name].state)
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, other[key], atol=1e-5, rtol=1e-5)


@settings(max_examples=12, deadline=None)
@given(script=SCRIPT, other=SCRIPT, context=st.sampled_from([0, 5]), rows=st.integers(2, 3))
def test_the_text_of_one_session_changes_no_bit_of_another(
    tokenizer: PreTrainedTokenizerBase,
    script: list[dict[str, str]],
    other: list[dict[str, str]],
    context: int,
    rows: int,
) -> None:
    first, second = (opened(MODELS[0], tokenizer, context, rows) for _ in range(2))
    for step, texts in enumerate(script):
        # ann reads something else, or nothing, in the second run.
        theirs = {name: text for name, text in texts.items() if name != "ann"}
        if "ann" in (other[step] if step < len(other) else {}):
            theirs["ann"] = other[step]["ann"]
        before, after = first.read(texts), second.read(theirs)
        assert all(before[name].loss == after[name].loss for name in theirs if name != "ann")
    for name in ("bob", "cho"):
        assert same(first.states[name], second.states[name])


def test_a_poisoned_session_is_refused_and_the_others_learn_on(
    tokenizer: PreTrainedTokenizerBase, make: Callable[..., ContinualModel]
) -> None:
    clean, poisoned = (opened(make(), tokenizer) for _ in range(2))
    bad = poisoned.states["ann"].levels[0]
    name, start = next(iter(poisoned.model.levels[0].start.items()))
    bad.weights[name] = torch.full_like(start, torch.nan)
    texts = {name: words(20, seed) for seed, name in enumerate(NAMES)}
    clean.read(texts)
    report = poisoned.read(texts)["ann"]
    assert {skipped.reason for skipped in report.skipped} == {"the loss is not finite"}
    assert all(same(clean.states[name], poisoned.states[name]) for name in ("bob", "cho"))
    assert list(poisoned.states["ann"].weights) == [name]


def test_rows_of_a_batch_are_generated_with_the_weights_of_their_sessions(
    tokenizer: PreTrainedTokenizerBase, model: ContinualModel
) -> None:
    sessions = opened(model, tokenizer)
    sessions.read({"ann": words(100), "bob": words(100, seed=5)[::-1]})
    ids = torch.tensor([list(b"level ")] * 3)
    with sessions.using(["ann", "cho", "bob"]):
        logits = model(ids).logits
    for row, name in enumerate(["ann", "cho", "bob"]):
        with model.using(sessions.learner(name).weights):
            torch.testing.assert_close(logits[row], model(ids[:1]).logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[0], logits[1])


def test_sessions_are_opened_and_closed_by_name(tokenizer: PreTrainedTokenizerBase, model: ContinualModel) -> None:
    sessions = opened(model, tokenizer)
    with pytest.raises(UserError, match="there is a session 'ann' already"):
        sessions.open("ann")
    with pytest.raises(UserError, match="no session 'anne' is open; did you mean 'ann'"):
        sessions.read({"bob": "text", "anne": "text"})
    assert sessions.states["bob"].read == 0
    sessions.read({"bob": words(20)})
    state = sessions.close("bob")
    sessions.open("again", state)
    assert sessions.states["again"] is state
    with pytest.raises(UserError, match="rows=0"):
        Sessions(model, tokenizer, rows=0)
