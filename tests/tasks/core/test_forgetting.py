"""Forgetting by levels: the stream updates what it says, and its numbers are those of its curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.models.hope import HopeForCausalLM
from nestlearn.tasks.core import forgetting

TINY: dict[str, Any] = forgetting.RECIPES["smoke"]


@pytest.fixture(autouse=True)
def _small_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "CHARACTERS", 20_000)
    forgetting.domains.cache_clear()
    forgetting._base.cache_clear()


@pytest.fixture
def prose(tmp_path: Path) -> str:
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("the cat sat on the mat and looked at the rain .\n" * 200)
    return str(tmp_path)


def test_without_prose_every_row_says_why(tmp_path: Path) -> None:
    for data in (None, str(tmp_path)):
        reasons = {row.reason for row in forgetting.plan("smoke", data).rows}
        assert reasons == {"no data: give --data DIR with wikitext2/"}


def test_the_numbers_are_those_of_the_curve_and_repeat_to_the_bit(prose: str) -> None:
    run = lambda: forgetting.stream([1, 4, 16, 64], 1e-3, 0, prose, **TINY)  # noqa: E731
    result = run()
    at = {step: (code, text) for step, code, text in result["curve"]}
    steps = TINY["steps"]
    assert set(at) >= {0, 1, 8, steps, steps + 1, steps + 8, 2 * steps}
    assert result["gain"] == at[0][1] - at[steps][1]
    assert result["forgotten"] == at[steps][0] - at[0][0]
    assert result["at_end"] == at[2 * steps][0] - at[0][0]
    assert result["both"] == sum(at[2 * steps]) / 2
    assert run() == result


def test_all_learners_start_alike_and_a_rate_of_zero_changes_nothing(prose: str) -> None:
    still = forgetting.stream([1, 1, 4, 4], 0.0, 0, prose, **TINY)
    assert still["gain"] == still["forgotten"] == still["at_end"] == 0
    whole = forgetting.stream(None, 1e-3, 0, prose, **TINY)
    assert whole["curve"][0] == still["curve"][0]
    assert whole["gain"] != 0


def test_only_levels_whose_chunk_ends_are_updated() -> None:
    learner = HopeForCausalLM(forgetting._config(TINY["model"]))
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    optimizer, updated = forgetting._optimizer(learner, [1, 4, 16, 64], 1e-3)
    ids = torch.arange(32)[None]
    for _ in range(5):
        learner(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in learner.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".memory.levels.0." in name or ".memory.levels.1." in name for name in moved)
    level = sum(p.numel() for name, p in learner.named_parameters() if ".levels.0." in name)
    every = sum(p.numel() for p in learner.parameters())
    assert updated == pytest.approx(level * (1 + 1 / 4 + 1 / 16 + 1 / 64) / every)


def test_the_section_is_written_from_any_part_of_the_results(prose: str, tmp_path: Path) -> None:
    run = forgetting.stream([1, 1, 1, 1], 1e-3, 0, prose, **TINY)
    numbers = {key: value for key, value in run.items() if isinstance(value, float | int)}
    outcome = {"state": "finished", "reason": None, "diverged": 0, "runs": [run], "mean": numbers}
    outcome["spread"] = dict.fromkeys(numbers)
    text = forgetting.section({forgetting.SETTING: {"1 level": outcome}}, tmp_path)
    assert "| 4 levels | not run |" in text
    assert (tmp_path / "forgetting.png").stat().st_size > 1000
