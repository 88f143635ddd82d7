"""What a learner alone holds is learned in place, to the same bits, and what anyone holds never changes."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import nestlearn.learner.holder as module
import nestlearn.learner.step as stepping
import nestlearn.learner.update as updating
from nestlearn import ContinualLearner
from nestlearn.convert import ContinualModel, Level
from nestlearn.errors import UserError
from nestlearn.learner import LearnerState
from nestlearn.learner.state import LevelState
from nestlearn.learner.update import certain
from tests.learner.conftest import WINDOW, words
from tests.learner.test_learner import same, tensors

LEVELS = (Level(WINDOW, 1e-2), Level(2 * WINDOW, 1e-2, retention=0.01), Level(4 * WINDOW, 1e-2, budget=0.02))


@pytest.fixture
def learner(make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase) -> ContinualLearner:
    """One that has read four windows."""
    learner = ContinualLearner(make(levels=LEVELS), tokenizer)
    learner.read(words(80)[: WINDOW * 4])
    return learner


def addresses(state: LearnerState) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in tensors(state).items() if "gathered" not in name}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=st.sets(st.integers(1, 16)))
def test_what_is_held_never_changes_and_nothing_depends_on_it(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase, held: set[int]
) -> None:
    model, text = make(levels=LEVELS), words(80)[: WINDOW * 16]
    alone, watched = ContinualLearner(model, tokenizer), ContinualLearner(model, tokenizer)
    alone.read(text)
    seen: list[tuple[LearnerState, dict[str, Tensor]]] = []
    count = itertools.count(1)

    def on_window(_: object) -> None:
        if next(count) in held:
            seen.append((watched.state, {name: t.clone() for name, t in tensors(watched.state).items()}))

    watched.read(text, on_window=on_window)
    assert same(alone.state, watched.state)
    assert len(seen) == len(held)
    for state, before in seen:
        assert all(torch.equal(t, before[name]) for name, t in tensors(state).items())


def test_what_nobody_else_holds_stays_where_it_is(learner: ContinualLearner) -> None:
    places = [addresses(learner._held.current)]
    learner.read(words(80, seed=1)[: WINDOW * 8])
    places.append(addresses(learner._held.current))
    assert places[0] == places[1]
    fork = learner.fork()
    learner.read(words(80, seed=2)[: WINDOW * 4])
    assert set(addresses(learner._held.current).values()).isdisjoint(addresses(fork.state).values())


def test_a_state_that_another_thread_takes_during_an_update_never_changes(
    learner: ContinualLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = stepping.update
    taken: list[tuple[LearnerState, list[Tensor]]] = []

    def take() -> None:
        state = learner.state
        taken.append((state, [t.clone() for t in tensors(state).values()]))

    def watched(*args: Any, **options: Any) -> Any:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.05)
        return update(*args, **options)

    monkeypatch.setattr(stepping, "update", watched)
    learner.read(words(80, seed=1)[: WINDOW * 4])
    while len(taken) < 7:
        time.sleep(0.01)
    for state, before in taken:
        assert all(map(torch.equal, before, tensors(state).values()))


def test_a_copy_of_a_learner_shares_nothing_with_it(learner: ContinualLearner) -> None:
    other = copy.deepcopy(learner)
    learner.read(words(80, seed=1)[: WINDOW * 4])
    other.read(words(80, seed=1)[: WINDOW * 4])
    assert same(learner.state, other.state)


def test_a_rule_that_may_fail_leaves_every_level_as_it_was(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    levels = (Level(WINDOW, 1e-2), Level(2 * WINDOW, 1e30, rule="sgd", clip=1e30))
    learner = ContinualLearner(make(levels=levels), tokenizer)
    learner.read(words(80)[:WINDOW])
    kept = {name: t.clone() for name, t in tensors(learner._held.current).items()}
    (skipped,) = learner.read(words(80, seed=1)[:WINDOW]).skipped  # both are due, and the second has no finite norm
    assert skipped.reason == "the updated weights are not finite"
    assert all(torch.equal(t, kept[name]) for name, t in tensors(learner._held.current).items())


def test_an_update_is_certain_only_far_from_the_largest_numbers() -> None:
    weights = {"w": torch.ones(2, 3)}
    near = LevelState(weights=weights, gathered=weights, scored=1, size=1.0)
    assert certain(near, Level(8, 1e-3))
    assert not certain(near, Level(8, 1e-3, rule="sgd"))
    assert not certain(near, Level(8, 1e18))
    assert not certain(LevelState(weights=weights, gathered=weights, scored=1), Level(8, 1e-3))
    infinite = {"w": torch.full((2, 3), 3e38)}
    assert not certain(LevelState(weights=weights, gathered=infinite, scored=1, size=1.0), Level(8, 1e-3))


@pytest.mark.parametrize("stop", [3, 4])
def test_ctrl_c_in_an_update_waits_for_its_end(
    make: Callable[..., ContinualModel],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    model, text = make(levels=LEVELS), words(80)[: WINDOW * 8]
    learner, straight = ContinualLearner(model, tokenizer), ContinualLearner(model, tokenizer)
    count, learn = itertools.count(1), module.learn

    def interrupted(*args: Any) -> Any:
        if next(count) != stop:
            return learn(*args)
        os.kill(os.getpid(), signal.SIGINT)
        outcome = learn(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return outcome

    monkeypatch.setattr(module, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learner.read(text, source="book")
    monkeypatch.undo()
    assert learner.state.read == stop * WINDOW
    learner.read(text, source="book")
    straight.read(text, source="book")
    assert same(learner.state, straight.state)


@pytest.mark.parametrize("stored", [False, True])
def test_an_update_that_is_cut_off_is_told_and_undone(
    make: Callable[..., ContinualModel],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stored: bool,
) -> None:
    model, text = make(levels=LEVELS), words(80)[: WINDOW * 8]
    store = tmp_path if stored else None
    learner, straight = ContinualLearner(model, tokenizer, store), ContinualLearner(model, tokenizer)
    learner.read(words(20), source="before")
    straight.read(words(20), source="before")
    if stored:
        learner.save("good")
    count, adamw = itertools.count(1), updating.adamw

    def cut_off(*args: Any, **options: Any) -> None:
        adamw(*args, **options)
        if next(count) == 8:
            raise MemoryError

    monkeypatch.setattr(updating, "adamw", cut_off)
    back = "snapshot good" if stored else "what it began with"
    with pytest.raises(UserError, match=f"an update was cut off in its middle: the learner is back at {back}"):
        learner.read(text, source="book")
    monkeypatch.undo()
    assert learner.stored is stored
    assert learner.state.read == (straight.state.read if stored else 0)
    for source, words_of in (("before", words(20)), ("book", text)):
        learner.read(words_of, source=source)
        straight.read(words_of, source=source)
    assert same(learner.state, straight.state)


def test_a_learner_that_has_been_copied_in_any_way_writes_over_nothing(learner: ContinualLearner) -> None:
    other = copy.copy(learner)
    before = [t.clone() for t in tensors(other.state).values()]
    learner.read(words(80, seed=1)[: WINDOW * 4])
    assert all(map(torch.equal, before, tensors(other.state).values()))


def test_a_text_is_learned_in_inference_mode(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make(levels=LEVELS)
    learner, other = ContinualLearner(model, tokenizer), ContinualLearner(model, tokenizer)
    with torch.inference_mode():
        learner.read(words(20))
    learner.read(words(20, seed=1))
    other.read(words(20))
    other.read(words(20, seed=1))
    assert same(learner.state, other.state)
