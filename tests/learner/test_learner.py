"""`ContinualLearner`: what it learns, when, and that it comes back to the bit."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestlearn import ContinualLearner
from nestlearn.convert import ContinualModel, Level
from nestlearn.errors import UserError
from nestlearn.learner import LearnerState
from nestlearn.learner.step import step
from nestlearn.learner.store import references
from tests.learner.conftest import WINDOW, words


def tensors(state: LearnerState) -> dict[str, Tensor]:
    return {f"{group}/{name}": t for group, ts in state.to_tensors().items() for name, t in ts.items()}


def same(a: LearnerState, b: LearnerState) -> bool:
    """To the bit."""
    mine, other = tensors(a), tensors(b)
    return (
        a.to_json() == b.to_json() and mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)
    )


def test_reading_lowers_the_loss_and_leaves_the_model_as_it_was(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    learner = ContinualLearner(model, tokenizer)
    before = [p.clone() for p in model.base.parameters()]
    first, text = learner.loss(words(30, seed=9)), words(300)
    report = learner.read(text)
    assert report.tokens == len(text)
    assert learner.loss(words(30, seed=9)) < first - 0.5
    assert report.levels[0].moved > 0
    assert all(map(torch.equal, before, model.base.parameters()))
    assert model.weights == {}
    learner.forget()
    assert learner.loss(words(30, seed=9)) == first


def test_each_level_is_updated_once_in_its_period(model: ContinualModel, tokenizer: PreTrainedTokenizerBase) -> None:
    report = ContinualLearner(model, tokenizer).read("x" * (WINDOW * 12))
    assert [level.updates for level in report.levels] == [12, 6, 3]


def test_one_level_is_plain_training_on_its_windows(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Eq. 71 with one level and a period of two windows: SGD with two accumulated gradients."""
    model = make(dtype=torch.float64, levels=(Level(2 * WINDOW, 0.1, rule="sgd", clip=100.0),))
    learner = ContinualLearner(model, tokenizer, window=WINDOW, context=4)
    text = words(60)[: WINDOW * 8]
    learner.read(text)
    theta = {n: w.clone().requires_grad_() for n, w in model.levels[0].start.items()}
    ids = torch.tensor(list(text.encode()))
    for chunk in range(4):
        with model.using(theta):
            losses = []
            for window in (2 * chunk, 2 * chunk + 1):
                start = window * WINDOW
                first = max(0, start - 4)
                logits = model(ids[None, first : start + WINDOW]).logits[0, :-1]
                all_losses = torch.nn.functional.cross_entropy(
                    logits, ids[first + 1 : start + WINDOW], reduction="none"
                )
                losses.append(all_losses[-WINDOW:] if start else all_losses)
            mean = torch.cat(losses).mean()
        grads = torch.autograd.grad(mean, list(theta.values()))
        theta = {n: (w - 0.1 * g).detach().requires_grad_() for (n, w), g in zip(theta.items(), grads, strict=True)}
    for name, w in theta.items():
        torch.testing.assert_close(learner.weights[name], w.detach(), atol=1e-7, rtol=0)  # Llama's norm is fp32


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 70), max_size=8), length=st.integers(0, 40), context=st.sampled_from([0, 5]))
def test_pieces_of_any_size_give_the_same_state(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, sizes: list[int], length: int, context: int
) -> None:
    text = words(length)
    bounds = [0, *itertools.accumulate(sizes), len(text)]
    whole, pieces = (ContinualLearner(model, tokenizer, context=context) for _ in range(2))
    whole.read(text)
    pieces.read(text[i:j] for i, j in itertools.pairwise(bounds))
    assert same(whole.state, pieces.state)


def test_a_short_text_is_learned_at_once_and_slow_levels_gather_over_texts(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    learner = ContinualLearner(model, tokenizer)
    for _ in range(7):
        learner.read("ten bytes.")
    assert [level.updates for level in learner.state.levels] == [7, 1, 1]
    assert [level.tokens for level in learner.state.levels] == [0, 30, 0]
    assert learner.state.levels[1].gathered.keys() == model.levels[1].start.keys()


def test_documents_are_joined_by_the_end_of_text(model: ContinualModel, tokenizer: PreTrainedTokenizerBase) -> None:
    report = ContinualLearner(model, tokenizer).read([["one"], ["two", " and"], ["three"]])
    assert report.tokens == 3 + 7 + 5 + 2


def test_an_empty_text_and_one_token_change_nothing(model: ContinualModel, tokenizer: PreTrainedTokenizerBase) -> None:
    learner = ContinualLearner(model, tokenizer)
    assert learner.read("").loss is None
    assert learner.read("a").loss is None
    assert learner.weights == {}
    with pytest.raises(UserError, match="no token to predict"):
        learner.loss("a")


def test_a_level_with_no_learning_rate_keeps_its_pretrained_weights(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make(levels=(Level(WINDOW, 0.0), Level(WINDOW, 0.0)))
    learner = ContinualLearner(model, tokenizer)
    assert learner.read(words(30)).loss is not None
    assert learner.weights == {}


@pytest.mark.parametrize("rule", ["adamw", "sgd", "m3", "delta-momentum"])
@pytest.mark.parametrize("kind", ["depthwise", "split"])
def test_a_restored_state_goes_on_to_the_same_bits(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, rule: str, kind: str
) -> None:
    levels = (Level(WINDOW, 1e-2, rule=rule, budget=0.5), Level(3 * WINDOW, 1e-2, rule=rule, retention=0.1))
    first = ContinualLearner(make(kind=kind, levels=levels), tokenizer, tmp_path / "store", context=3)
    first.read(words(50))
    snapshot = first.save("half")
    second = ContinualLearner(make(kind=kind, levels=levels), tokenizer, tmp_path / "store", context=3)
    assert second.snapshot == snapshot
    assert same(first.state, second.state)
    for learner in (first, second):
        learner.read(words(50, seed=1))
    assert same(first.state, second.state)
    second.rollback("half")
    second.read(words(50, seed=1))
    assert same(first.state, second.state)


def test_a_source_goes_on_where_its_reading_was_cut_off(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = words(100)
    whole = ContinualLearner(model, tokenizer)
    whole.read(text, source="book")
    for stop in (1, 5, 16, 29):
        learner = ContinualLearner(model, tokenizer, tmp_path / str(stop), autosave=WINDOW * 9)
        with pytest.raises(KeyboardInterrupt):
            learner.read(text, source="book", on_window=interrupt_after(stop))
        resumed = ContinualLearner(model, tokenizer, tmp_path / str(stop))
        assert resumed.state.read == stop * WINDOW
        report = resumed.read(iter(text), source="book")
        assert report.resumed == stop * WINDOW
        assert same(resumed.state, whole.state)
        assert resumed.read(text, source="book").tokens == 0
        assert same(resumed.state, whole.state)
        with pytest.raises(UserError, match="book has changed"):
            resumed.read("other" + text, source="book")
        added = resumed.read(text + " more", source="book")
        assert (added.tokens, added.resumed) == (5, len(text))


def interrupt_after(windows: int) -> Callable[[object], None]:
    count = itertools.count(1)

    def on_window(_: object) -> None:
        if next(count) == windows:
            raise KeyboardInterrupt

    return on_window


def test_a_fork_shares_the_past_and_nothing_else(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    learner = ContinualLearner(model, tokenizer, tmp_path / "store")
    learner.read(words(50))
    other = learner.fork("mine")
    assert other.state is learner.state
    other.read(words(50, seed=3))
    kept = other.save("changed")
    assert same(learner.state, ContinualLearner(model, tokenizer, tmp_path / "store").state)
    assert learner.fork().store is None
    assert [s.id for s in other.log()] == [kept.id, *[s.id for s in learner.log()]]
    (level, *_) = learner.diff("main", "changed").levels
    assert level.moved > 0
    assert level.unknown == ()
    merged = learner.merge("main", "changed", 0.5)
    assert len(merged.parents) == 2


def test_a_model_in_bfloat16_learns_in_float32(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    learner = ContinualLearner(make(dtype=torch.bfloat16), tokenizer, tmp_path / "store")
    first = learner.loss(words(30, seed=9))
    learner.read(words(300))
    assert learner.loss(words(30, seed=9)) < first - 0.5
    assert {t.dtype for t in tensors(learner.state).values()} == {torch.float32}
    learner.save()
    assert same(ContinualLearner(make(dtype=torch.bfloat16), tokenizer, tmp_path / "store").state, learner.state)
    assert isinstance(learner.generate("level", max_new_tokens=3), str)


def test_a_store_of_other_levels_or_another_model_is_refused_by_name(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    learner = ContinualLearner(make(), tokenizer, tmp_path / "store")
    learner.read(words(20))
    learner.save("mine")
    with pytest.raises(UserError, match="snapshot mine was learned with other levels"):
        ContinualLearner(make(levels=(Level(WINDOW, 1e-3),)), tokenizer, tmp_path / "store")
    with pytest.raises(UserError, match="memory of base model"):
        ContinualLearner(make(seed=1), tokenizer, tmp_path / "store")
    with pytest.raises(UserError, match="no store"):
        ContinualLearner(make(), tokenizer).save()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, "whole numbers of windows"),
        ({"context": -1}, "context=-1"),
        ({"context": 256}, "leave room for a window in 256 tokens"),
        ({"window": 16, "context": 250}, "do not fit into the model's 256 tokens"),
        ({"max_surprise": 0.0}, "max_surprise=0"),
        ({"autosave": 0}, "autosave=0"),
    ],
)
def test_a_number_out_of_range_is_said(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ContinualLearner(model, tokenizer, **options)


def test_the_window_divides_every_period_and_fits_the_model(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    def window(*periods: int, **options: int) -> int:
        model = make(levels=tuple(Level(period, 1e-3) for period in periods))
        return ContinualLearner(model, tokenizer, **options).reading.window

    assert window(64, 128, 256) == 64
    assert window(64, 96) == 32
    assert window(512, 1024) == 256
    assert window(512, 1024, context=1) == 128


def test_generation_reads_the_learned_weights(model: ContinualModel, tokenizer: PreTrainedTokenizerBase) -> None:
    learner = ContinualLearner(model, tokenizer)
    plain = learner.generate("level ", max_new_tokens=20, temperature=0)
    for _ in range(3):
        learner.read(words(200))
    learned = learner.generate("level ", max_new_tokens=20, temperature=0)
    assert learned != plain
    with model.using(learner.weights):
        ids = model.generate(**tokenizer("level ", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("level " + learned[:5])


def test_ctrl_c_while_a_snapshot_is_written_waits_until_it_is_there(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = ContinualLearner(model, tokenizer, tmp_path / "store", autosave=10**6)
    learner.read(words(10))
    write = references.write

    def interrupted(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(*given)

    monkeypatch.setattr(references, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learner.read(words(20, seed=1))
    monkeypatch.undo()
    assert learner.stored
    assert same(ContinualLearner(model, tokenizer, tmp_path / "store").state, learner.state)
    learner.read(words(5))
    assert list(learner.store.branches) == ["main"]  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_level_that_rests_is_read_as_it_was_learned(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase, rows: int
) -> None:
    """With lr=0 it learns nothing more, and what it has learned before counts for what the others learn."""
    model = make(levels=(Level(WINDOW, 1e-2), Level(WINDOW, 0.0)))
    learner = ContinualLearner(model, tokenizer)
    level = learner.state.levels[1]
    weights = {name: w + 0.3 * torch.randn_like(w) for name, w in model.levels[1].start.items()}
    learner.state = replace(learner.state, levels=(learner.state.levels[0], replace(level, weights=weights)))
    text = "x" * WINDOW
    expected = learner.loss(text)
    if rows == 1:
        assert learner.read(text).loss == pytest.approx(expected)
        return
    window = torch.tensor(tokenizer(text)["input_ids"])
    outcomes = step(model, [learner.state] * 2, [window] * 2, learner.reading)
    assert [o.loss / o.scored for o in outcomes] == pytest.approx([expected] * 2)


def test_one_step_back_is_the_text_before(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    learner = ContinualLearner(model, tokenizer, tmp_path / "store", autosave=10**6)
    saved = []
    for seed in range(3):
        learner.read(words(20, seed))
        saved.append(learner.save())
    assert [s.id for s in learner.log()] == [s.id for s in reversed(saved)]
    assert all(level.moved > 0 for level in learner.diff("head~1", "head").levels if level.numbers)
    learner.rollback("head~1")
    assert learner.state.read == saved[1].meta["learner"]["read"]


def test_a_rollback_to_what_is_damaged_moves_nothing(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    learner = ContinualLearner(model, tokenizer, tmp_path / "store")
    learner.read(words(20))
    one = learner.save("one")
    learner.read(words(20, seed=1))
    two = learner.save("two")
    own = {level.object for level in one.levels.values()} - {level.object for level in two.levels.values()}
    path = tmp_path / "store" / "objects" / f"{own.pop()}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"damaged|changed|hash"):
        learner.rollback("one")
    assert ContinualLearner(model, tokenizer, tmp_path / "store").snapshot == two


def test_a_state_read_with_a_longer_context_is_gone_on_with(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    long, short = ContinualLearner(model, tokenizer, context=2 * WINDOW), ContinualLearner(model, tokenizer, context=3)

    with pytest.raises(KeyboardInterrupt):
        long.read(words(100), source="text", on_window=interrupt_after(4))
    short.state = long.state
    assert short.read(words(100), source="text").tokens > 0
    assert len(short.state.context) <= 3
