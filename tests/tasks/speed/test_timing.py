"""Turns, budgets, ratios within a round, and the report's tables. No time is asserted."""

from __future__ import annotations

import pytest

from nestlearn.tasks.speed import timing
from nestlearn.tasks.speed.report import timed
from nestlearn.tasks.speed.timing import AGAIN, COPY, PRODUCT, ceilings, in_turns, rates, ratio, rows


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a candidate says so."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(*seconds: float):
        left = list(seconds)

        def run() -> None:
            now[0] += left.pop(0) if len(left) > 1 else left[0]

        return run

    return takes


def test_candidates_take_turns_after_a_round_to_warm_up(clock) -> None:
    seconds = in_turns({"a": clock(9, 1, 2, 3), "b": clock(9, 2, 4, 6)}, rounds=3, budget=100)
    assert seconds == {"a": [1, 2, 3], "b": [2, 4, 6]}


def test_a_candidate_past_its_budget_sits_out_after_two_rounds(clock) -> None:
    seconds = in_turns({"a": clock(1), "b": clock(40)}, rounds=5, budget=100)
    assert seconds == {"a": [1] * 5, "b": [40, 40]}
    assert ratio(seconds["b"], seconds["a"]) == {"ratio": 40, "low": 40, "high": 40}


def test_rows_compare_within_a_round_and_a_repeat_with_itself() -> None:
    seconds = {
        "ours": [1.0, 2.0],
        "ours" + AGAIN: [1.0, 4.0],
        "peer": [3.0, 8.0],
        PRODUCT: [1.0, 1.0],
        COPY: [1.0, 1.0],
    }
    ours, again, peer = rows(seconds, ["peer"], units=6)
    assert (ours["seconds"], ours["best"], ours["per_second"]) == (1.5, 1.0, 4.0)
    assert ours["times_as_fast"] == {"peer": {"ratio": 3.5, "low": 3.25, "high": 3.75}}
    assert again["times_as_fast"] == {"ours": {"ratio": 0.75, "low": 0.625, "high": 0.875}}
    assert peer["times_as_fast"] == {}
    lines = timed([ours, again, peer], "tokens/s").splitlines()
    assert lines[0].count("|") == 6
    assert "3.5 (3.25 to 3.75) |  |" in lines[2]
    assert lines[3].endswith("|  | 0.75 (0.625 to 0.875) |")


def test_ceilings_do_their_work() -> None:
    runs = ceilings(size=8, megabytes=1)
    assert runs[PRODUCT]().shape == (8, 8)
    assert runs[COPY]().sum() == 250_000
    limits = rates({PRODUCT: [2.0, 4.0], COPY: [1.0, 2.0, 3.0]}, size=1000, megabytes=500)
    assert limits["gflops"] == 1.0
    assert limits["gflops_median"] == pytest.approx(2 / 3)
    assert (limits["gigabytes_per_second"], limits["gigabytes_per_second_median"]) == (1.0, 0.5)
