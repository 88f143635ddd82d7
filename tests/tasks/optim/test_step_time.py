"""Step times: the right shapes, every candidate, and M3's slow step inside what is timed."""

import pytest
import torch

from nestlearn.tasks.optim.step_time import CHUNK, SCALES, candidates, measure, seconds_of, shapes, state_bytes


def test_the_shapes_are_those_of_125_m() -> None:
    scale = {key: value for key, value in SCALES["cpu"].items() if key != "rounds"}
    wanted = shapes(**scale)
    count = sum(torch.Size(shape).numel() for shape in [*wanted.matrices, *wanted.others])
    assert count == 124_373_760
    assert len(wanted.matrices) == 72
    assert all(CHUNK % scale["rounds"] == 0 for scale in SCALES.values())


@pytest.mark.parametrize("part", ["hidden", "all"])
def test_every_candidate_is_timed_beside_its_peer(part: str) -> None:
    result = measure(part, layers=1, width=8, vocabulary=16, positions=4, rounds=2)
    rows = {row["name"]: row for row in result["candidates"]}
    assert len(rows) == len(result["candidates"]) == 16
    assert result["parameters"] == {"hidden": 768, "all": 768 + 160 + 24}[part]
    for row in rows.values():
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        if row["peer"] is None:
            assert row["ratio"] is None
        else:
            assert row["peer"].startswith("torch")
            assert row["ratio"] == pytest.approx(row["seconds"] / rows[row["peer"]]["seconds"])
    assert rows["Momentum"]["bytes_per_parameter"] == rows["torch SGD, momentum"]["bytes_per_parameter"] == 4
    if part == "hidden":
        assert rows["Muon"]["bytes_per_parameter"] == rows["torch Muon"]["bytes_per_parameter"] == 4
        assert 16 <= rows["M3"]["bytes_per_parameter"] < 16.1  # three momenta, one second moment, a counter


def test_the_timed_steps_of_m3_hold_one_slow_step() -> None:
    p = torch.randn(4, 4, requires_grad=True)
    p.grad = torch.randn(4, 4)
    (m3,) = (entry for entry in candidates([p], [], steps=5) if entry.name == "M3")
    optimizers = m3.make()
    slow = optimizers[0].state[p]["slow_orthogonal"]
    changes = []
    for _ in range(1 + 2 * CHUNK):
        before = slow.clone()
        assert seconds_of(optimizers, 1) > 0
        changes.append(not torch.equal(before, slow))
    assert [i for i, changed in enumerate(changes) if changed] == [CHUNK, 2 * CHUNK]  # step 0 warms up
    assert state_bytes(optimizers) == 4 * 16 * 4 + 4
