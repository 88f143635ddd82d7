"""Refused windows leave no trace; a probe that worsens stops learning; memory stays bounded."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestlearn.convert import ContinualModel, Level
from nestlearn.errors import UserError
from nestlearn.learner import ContinualLearner, LearnerState, RetentionProbe
from nestlearn.learner.guards import WARMUP, refusal
from nestlearn.learner.state import LevelState, Scale
from tests.learner.conftest import WINDOW, words
from tests.learner.test_learner import same, tensors

KNOWN = " ".join(str(n * n) for n in range(99))


def learned(state: LearnerState) -> dict[str, Tensor]:
    return {**tensors(state), "clocks": torch.tensor([[level.tokens, level.scored] for level in state.levels])}


def unchanged(before: LearnerState, after: LearnerState) -> bool:
    """The same tensors, not only equal ones, and the same clocks."""
    a, b = learned(before), learned(after)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) and before.clock == after.clock


def noise(count: int, seed: int = 0) -> str:
    choose = random.Random(seed)
    return "".join(chr(choose.randrange(1, 127)) for _ in range(count))


def test_noise_in_a_stream_is_refused_and_leaves_no_trace(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    levels = (Level(WINDOW, 1e-2), Level(2 * WINDOW, 1e-2))
    text = "level " * (WINDOW * 32)
    clean, dirty = (ContinualLearner(make(levels=levels), tokenizer) for _ in range(2))
    clean.read(text)
    at = WINDOW * 181
    report = dirty.read(text[:at] + noise(WINDOW) + text[at:])
    assert [(s.start, s.tokens) for s in report.skipped] == [(at, WINDOW)]
    assert "far above its running mean" in report.skipped[0].reason
    assert report.tokens == len(text) + WINDOW
    assert unchanged(clean.state, dirty.state)
    assert "skipped 16 tokens from token 2,896 on: the loss of" in str(report)


def test_a_stream_that_has_changed_gets_in_after_a_few_windows(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    learner = ContinualLearner(model, tokenizer, max_surprise=4)
    learner.read(words(300))
    report = learner.read(noise(WINDOW * 40, seed=1))
    assert 1 <= len(report.skipped) < 10
    assert ContinualLearner(model, tokenizer, max_surprise=math.inf).read(words(300) + noise(300)).skipped == ()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_refused_from_the_first_window(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    learner = ContinualLearner(model, tokenizer)
    learner.read(words(9))
    before = learner.state
    if where == "loss":
        model.base.lm_head.register_forward_hook(lambda *_: torch.full_like(_[2], math.nan))
    else:  # the loss is finite, its gradient is not
        model.base.model.norm.register_forward_hook(lambda *_: Poison.apply(_[2]))
    report = learner.read("ninety percent of it")
    assert [s.reason.rpartition(" is not finite")[1] for s in report.skipped] == [" is not finite"] * 2
    assert report.loss is None
    assert unchanged(replace(before, read=0), replace(learner.state, read=0))


class Poison(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(g, math.inf)


def test_an_update_that_is_not_finite_is_refused_as_a_whole(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make(levels=(Level(WINDOW, 1e-3), Level(WINDOW, 1e38, rule="sgd", clip=1e30)))
    learner = ContinualLearner(model, tokenizer)
    with torch.no_grad():
        for p in model.base.model.layers[0].mlp.parameters():
            p.mul_(10)
    start = learner.state
    report = learner.read("x" * WINDOW)
    assert [s.reason for s in report.skipped] == ["the updated weights are not finite"]
    assert unchanged(start, learner.state)


@pytest.mark.parametrize(
    ("loss", "norms", "share", "refused"),
    [
        (3.0, [1.0], 1.0, None),
        (4.9, [1.0], 1.0, None),
        (5.1, [1.0], 1.0, "the loss of 5.10 is far above its running mean of 3.00 (limit 5.00)"),
        (5.1, [1.0], 0.25, None),
        (3.0, [7.3], 1.0, None),
        (3.0, [7.5], 1.0, "the gradient of level 0, 7.5, is far above its running mean of 1"),
        (3.0, [0.0], 1.0, None),
        (3.0, [math.inf], 1.0, "the gradient of level 0 is not finite"),
    ],
)
def test_the_limit_of_a_surprise(loss: float, norms: list[float], share: float, refused: str | None) -> None:
    scale = Scale(count=WARMUP, mean=3.0, variance=0.0)
    state = LearnerState((LevelState(surprise=replace(scale, mean=0.0)),), surprise=scale)
    assert refusal(state, loss, norms, share, 8.0) == refused
    if refused and "not finite" not in refused:
        assert refusal(replace(state, refused=1), loss, norms, share, 8.0) is None
        assert refusal(replace(state, surprise=Scale(), levels=(LevelState(),)), loss, norms, share, 8.0) is None


def test_a_probe_that_worsens_stops_learning_at_the_last_good_state(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = make(levels=(Level(WINDOW, 1e-3), Level(4 * WINDOW, 1e-3)))
    probe = RetentionProbe(KNOWN, limit=1.02, every=4 * WINDOW)
    learner = ContinualLearner(model, tokenizer, tmp_path / "store", probe=probe, autosave=2 * WINDOW)
    before = learner.loss(probe.text)
    report = learner.read(words(400), source="text")
    assert report.stopped is not None
    assert report.stopped.startswith("the perplexity of the probe is")
    assert report.tokens < len(words(400))
    assert learner.loss(probe.text) <= before + math.log(1.02)
    assert 0 < learner.state.read < report.tokens
    assert learner.state.read % (4 * WINDOW) == 0
    again = ContinualLearner(model, tokenizer, tmp_path / "store", probe=probe)
    assert same(again.state, learner.state)
    free = ContinualLearner(model, tokenizer)
    free.read(words(400))
    assert free.loss(probe.text) > before + math.log(1.02)


def test_a_state_beyond_the_limit_reads_nothing(model: ContinualModel, tokenizer: PreTrainedTokenizerBase) -> None:
    learner = ContinualLearner(model, tokenizer)
    learner.read(words(400))
    learner.probe = RetentionProbe(KNOWN, limit=1.02)
    state = learner.state
    report = learner.read("more")
    assert (report.tokens, learner.state) == (0, state)
    assert report.stopped is not None


def test_a_state_beyond_the_limit_that_is_taken_up_later_stays_as_it_is(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    learner = ContinualLearner(model, tokenizer, tmp_path / "store")
    learner.save("start")
    learner.read(words(400))
    bad = learner.save("bad")
    learner.rollback("start")
    learner.probe = RetentionProbe(KNOWN, limit=1.02)
    learner.read("so")  # passes, and is the good state from here on
    learner.rollback("bad")
    assert learner.read("more").tokens == 0
    assert learner.state.read == bad.meta["learner"]["read"]


def test_a_text_that_breaks_off_leaves_no_state_beyond_the_limit(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make(levels=(Level(WINDOW, 1e-2),))
    learner = ContinualLearner(model, tokenizer, probe=RetentionProbe(KNOWN, limit=1.02, every=10**6))

    def text() -> Iterator[str]:
        yield words(400)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        learner.read(text())
    learner.state = replace(learner.state)  # measured anew
    assert "the perplexity" not in str(learner.read("so").stopped)


def test_a_probe_whose_loss_is_no_number_stops_learning(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for worse, message in ((math.nan, "is not finite"), (1e5, "times the pretrained model's")):
        learner = ContinualLearner(model, tokenizer, probe=RetentionProbe(KNOWN, limit=1.02))
        learner.read("so")
        good = learner.state
        monkeypatch.setattr(learner, "probe_loss", lambda weights=None, worse=worse: worse)
        report = learner.read("more")
        assert message in str(report.stopped)
        assert learner.state.weights.keys() == good.weights.keys()
        assert learner.state.read == good.read


def test_no_level_goes_beyond_its_budget(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make(levels=(Level(WINDOW, 0.1, budget=0.05), Level(2 * WINDOW, 0.1)))
    learner = ContinualLearner(model, tokenizer)
    seen: list[tuple[float, ...]] = []
    learner.read(words(200), on_window=lambda report: seen.append(tuple(level.moved for level in report.levels)))
    assert max(fast for fast, _ in seen) == pytest.approx(0.05)
    assert max(slow for _, slow in seen) > 0.1
    start = model.levels[0].start
    moved = sum(float((w - start[n]).square().sum()) for n, w in learner.state.levels[0].weights.items()) ** 0.5
    assert moved <= 0.05 * (1 + 1e-5) * sum(float(w.square().sum()) for w in start.values()) ** 0.5


@pytest.mark.parametrize("values", [{"text": " "}, {"text": "a", "limit": 0.0}, {"text": "a", "every": 0}])
def test_a_probe_out_of_range_is_said(values: dict) -> None:
    with pytest.raises(UserError, match="retention probe"):
        RetentionProbe(**values)


def test_memory_does_not_grow_with_the_stream(
    make: Callable[..., ContinualModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    levels = (Level(512, 1e-3), Level(2048, 1e-3))
    model = make(layers=2, levels=levels)
    model.base.config.max_position_embeddings = 1024
    learner = ContinualLearner(model, tokenizer, context=16)

    def stream(tokens: int) -> Iterator[str]:
        line = words(10) + "\n"
        for _ in range(tokens // len(line)):
            yield line

    process = psutil.Process()
    learner.read(stream(30_000))
    before = process.memory_info().rss
    report = learner.read(stream(200_000))
    assert report.tokens > 199_000
    assert process.memory_info().rss - before < 8 << 20  # one window's logits are half a megabyte
