"""The toy of Figure 4: the landscape, the criterion, and the real optimizers on it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.tasks.optim.curvature import (
    LANDSCAPES,
    METHODS,
    START,
    TOLERANCE,
    arrived,
    descend,
    gradient,
    psi,
    tune,
)

FIRST = next(iter(LANDSCAPES.values()))
POINTS = st.floats(-4, 4)


@given(name=st.sampled_from(sorted(LANDSCAPES)), r=POINTS, theta=POINTS)
def test_gradient_is_that_of_psi(name: str, r: float, theta: float) -> None:
    k, a, omega = LANDSCAPES[name]
    p = torch.tensor([r, theta], dtype=torch.float64, requires_grad=True)
    value = p[0] ** 2 + k * (p[0] - p[1] + a * torch.sin(omega * p[0])) ** 2
    value.backward()
    assert p.grad is not None
    assert psi(LANDSCAPES[name], r, theta) == pytest.approx(value.item(), abs=1e-10)
    assert gradient(LANDSCAPES[name], r, theta) == pytest.approx(p.grad.tolist(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("landscape", LANDSCAPES.values())
def test_the_optimum_is_the_origin(landscape) -> None:
    assert psi(landscape, 0, 0) == 0
    assert gradient(landscape, 0, 0) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_paths_are_those_of_the_equations(method: str) -> None:
    lr, beta = 0.004, 0.9
    path = descend(method, FIRST, lr, beta, 30)
    p, m = list(START), [0.0, 0.0]
    for point in path[1:]:
        g = gradient(FIRST, *p)
        size = math.hypot(*g)
        along = 0.0
        if method == "clipped" and size > 1:
            g = (g[0] / size, g[1] / size)
        if method.startswith("delta"):
            e = 0.5 / size**2 if method == "delta-inf" else min(lr, 0.5 / size**2)
            along = e * (m[0] * g[0] + m[1] * g[1])
        m = [beta * m[i] - along * g[i] - g[i] for i in range(2)]
        p = [p[i] + lr * m[i] for i in range(2)]
        assert point == pytest.approx(p, rel=1e-9)
    assert len(path) == 31


def test_flying_past_the_optimum_is_not_arriving() -> None:
    near = TOLERANCE / 2
    assert arrived([(1.0, 1.0), (near, 0.0), (0.0, 0.0)])
    assert not arrived([(1.0, 1.0), (near, 0.0)])
    assert not arrived([(2 * TOLERANCE, 0.0), (2 * TOLERANCE + near, 0.0)])


def test_divergence_ends_a_descent() -> None:
    path = descend("momentum", FIRST, 10.0, 0.99, 1000)
    assert len(path) < 1000
    assert not arrived(path)


def test_tuning_takes_the_fewest_steps_of_the_grid() -> None:
    rates, momenta = [0.02, 0.05], [0.8, 0.9]
    name = "k1-a0.5-w2"
    paths = {(lr, m): descend("momentum", LANDSCAPES[name], lr, m, 400) for lr in rates for m in momenta}
    steps = {setting: len(path) - 1 for setting, path in paths.items() if arrived(path)}
    best = min(steps, key=lambda setting: (steps[setting], *setting))
    found = tune("momentum", name, rates, momenta, 400)
    assert (found["steps"], found["lr"], found["momentum"]) == (steps[best], *best)
    assert (found["arrived"], found["tried"]) == (len(steps), 4)
    assert found["path"] == paths[best]
    assert found["path"][0] == START
    nowhere = tune("momentum", name, rates, momenta, 5)
    assert nowhere == {"diverged": True, "steps": None, "arrived": 0, "tried": 4}
