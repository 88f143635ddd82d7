"""One update, held to Eq. 71 written out in float64, and what must hold around it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestlearn.convert import Level
from nestlearn.convert.kept import Kept
from nestlearn.learner.state import LevelState
from nestlearn.learner.update import ADAM_BETAS, ADAM_EPS, update

START = {
    "w": torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4),
    "b": torch.linspace(1, 2, 3, dtype=torch.float64),
}


def gathered(seed: int, scored: int = 4) -> LevelState:
    random = torch.Generator().manual_seed(seed)
    return LevelState(
        gathered={name: torch.randn(w.shape, generator=random, dtype=torch.float64) for name, w in START.items()},
        tokens=5,
        scored=scored,
    )


def again(state: LevelState, seed: int) -> LevelState:
    fresh = gathered(seed)
    return replace(state, gathered=fresh.gathered, tokens=fresh.tokens, scored=fresh.scored)


def clipped(state: LevelState, clip: float) -> dict[str, Tensor]:
    mean = {name: g / state.scored for name, g in state.gathered.items()}
    norm = sum(float((g**2).sum()) for g in mean.values()) ** 0.5
    return {name: g * min(1.0, clip / norm) for name, g in mean.items()}


@pytest.mark.parametrize("clip", [0.1, 100.0])
def test_sgd_is_the_step_on_the_clipped_mean_gradient(clip: float) -> None:
    state = gathered(0)
    after = update(state, Level(8, lr=0.5, rule="sgd", clip=clip), START)
    assert after is not None
    g = clipped(state, clip)
    for name, w in START.items():
        torch.testing.assert_close(after.weights[name], w - 0.5 * g[name], atol=1e-12, rtol=0)
    assert (after.gathered, after.tokens, after.scored, after.updates) == ({}, 0, 0, 1)


def test_sgd_is_clipped_by_what_is_left_beside_what_is_kept() -> None:
    along = torch.eye(4, dtype=torch.float64)[:, :2]
    state, kept = gathered(0), {"w": Kept(along)}
    after = update(state, Level(8, lr=0.5, rule="sgd", clip=0.1), START, kept)
    assert after is not None
    left = replace(state, gathered={n: g.clone() for n, g in state.gathered.items()})
    left.gathered["w"][:, :2] = 0
    g = clipped(left, 0.1)
    for name, w in START.items():
        torch.testing.assert_close(after.weights[name], w - 0.5 * g[name], atol=1e-12, rtol=0)


def test_adamw_is_adam_with_bias_correction_and_no_decay() -> None:
    level = Level(8, lr=0.01)
    state: LevelState | None = gathered(0)
    m = {name: torch.zeros_like(w) for name, w in START.items()}
    v = {name: torch.zeros_like(w) for name, w in START.items()}
    theta = dict(START)
    for t in (1, 2, 3):
        assert state is not None
        g = clipped(state, 1.0)
        for name in theta:
            m[name] = ADAM_BETAS[0] * m[name] + (1 - ADAM_BETAS[0]) * g[name]
            v[name] = ADAM_BETAS[1] * v[name] + (1 - ADAM_BETAS[1]) * g[name] ** 2
            corrected = (v[name] / (1 - ADAM_BETAS[1] ** t)).sqrt() + ADAM_EPS
            theta[name] = theta[name] - 0.01 * m[name] / (1 - ADAM_BETAS[0] ** t) / corrected
        state = update(state, level, START)
        assert state is not None
        for name in theta:
            torch.testing.assert_close(state.weights[name], theta[name], atol=1e-12, rtol=1e-9)
        state = again(state, t)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "m3", "delta-momentum"])
def test_a_gradient_in_another_order_of_memory_is_the_same_gradient(rule: str) -> None:
    state, level = gathered(0), Level(8, lr=0.01, rule=rule)
    turned = replace(state, gathered={n: g.T.contiguous().T if g.ndim == 2 else g for n, g in state.gathered.items()})
    assert not turned.gathered["w"].is_contiguous()
    start = {n: w.T.contiguous().T if w.ndim == 2 else w for n, w in START.items()}
    one, two, three = update(state, level, START), update(turned, level, START), update(state, level, start)
    assert one is not None
    assert two is not None
    assert three is not None
    for name, w in one.weights.items():
        torch.testing.assert_close(two.weights[name], w, atol=1e-14, rtol=0)
        torch.testing.assert_close(three.weights[name], w, atol=1e-14, rtol=0)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "m3", "delta-momentum"])
def test_an_update_leaves_what_was_there_as_it_was(rule: str) -> None:
    level = Level(8, lr=0.01, rule=rule, retention=0.1, budget=0.5)
    first = update(gathered(0), level, START)
    assert first is not None
    state = again(first, 1)
    tensors = [*START.values(), *state.weights.values(), *state.gathered.values()]
    tensors += [t for ts in state.slots.values() for t in ts]
    before = [t.clone() for t in tensors]
    second = update(state, level, START)
    assert second is not None
    assert second.updates == 2
    assert all(map(torch.equal, tensors, before))
    assert not any(torch.equal(second.weights[name], state.weights[name]) for name in START)


def test_retention_is_the_share_of_the_way_back() -> None:
    level = Level(8, lr=0.5, rule="sgd")
    free, held = update(gathered(0), level, START), update(gathered(0), replace(level, retention=0.25), START)
    assert free is not None
    assert held is not None
    for name, w in START.items():
        torch.testing.assert_close(held.weights[name] - w, 0.75 * (free.weights[name] - w), atol=1e-12, rtol=0)
    assert held.moved == pytest.approx(0.75 * free.moved)


def test_no_level_moves_farther_than_its_budget() -> None:
    level = Level(8, lr=0.3, rule="sgd", clip=10.0, budget=0.1)
    state: LevelState | None = gathered(0)
    size = sum(float((w**2).sum()) for w in START.values()) ** 0.5
    farthest = 0.0
    for seed in range(1, 6):
        assert state is not None
        state = update(state, level, START)
        assert state is not None
        far = sum(float(((state.weights[name] - w) ** 2).sum()) for name, w in START.items()) ** 0.5 / size
        assert far <= 0.1 + 1e-12
        assert state.moved == pytest.approx(far)
        farthest = max(farthest, far)
        state = again(state, seed)
    assert farthest == pytest.approx(0.1)


def test_weights_that_are_not_finite_are_no_update() -> None:
    assert (
        update(gathered(0), Level(8, lr=1e308, rule="sgd", clip=1e300), {n: w * 1e308 for n, w in START.items()})
        is None
    )


def test_a_chunk_without_a_predicted_token_changes_no_weight() -> None:
    after = update(gathered(0, scored=0), Level(8, lr=1.0), START)
    assert after is not None
    assert (after.weights, after.updates, after.tokens) == ({}, 0, 0)
