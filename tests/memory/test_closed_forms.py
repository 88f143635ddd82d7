"""Closed-form gradients and rules against ``torch.func.grad`` in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

from nestlearn.errors import UserError
from nestlearn.memory import LinearMemory, MLPMemory, SwiGLUMemory, objectives, rules

sizes = st.integers(1, 6)
OBJECTIVES = [objectives.dot_product, objectives.l2, objectives.lp(1), objectives.lp(1.5), objectives.lp(3)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@given(d_in=sizes, d_out=sizes, hidden=sizes, tokens=sizes, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_memory_gradients(objective, d_in: int, d_out: int, hidden: int, tokens: int, seed: int) -> None:
    k, v = draw(tokens, d_in, seed=seed), draw(tokens, d_out, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    for memory in (LinearMemory(d_in, d_out), MLPMemory(d_in, d_out, hidden), SwiGLUMemory(d_in, d_out, hidden)):
        weights = tuple(w.double() for w in memory.init(generator=generator))
        expected = grad(lambda *ws, m=memory: m.objective(ws, k, v, objective), argnums=tuple(range(len(weights))))
        for ours, theirs in zip(memory.gradient(weights, k, v, objective), expected(*weights), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_objective_errors_are_derivatives(objective) -> None:
    y, v = draw(5, 3), draw(5, 3, seed=1)
    expected = grad(lambda y: objective.value(y, v).sum())(y)
    torch.testing.assert_close(objective.error(y, v), expected, rtol=1e-10, atol=1e-10)


def setup() -> tuple[Tensor, Tensor, Tensor]:
    return draw(4, 3), draw(3, seed=1), draw(4, seed=2)


def test_hebbian_is_a_gradient_step_on_the_dot_product() -> None:
    w, k, v = setup()
    g = grad(lambda w: objectives.dot_product.value(w @ k, v))(w)
    torch.testing.assert_close(rules.hebbian(w, k, v, 0.3, 0.9), 0.9 * w - 0.3 * g, rtol=1e-10, atol=1e-12)


def test_delta_is_a_gradient_step_on_l2_after_the_decay() -> None:
    w, k, v = setup()
    g = grad(lambda w: objectives.l2.value(w @ k, v))(0.9 * w)
    torch.testing.assert_close(rules.delta(w, k, v, 0.3, 0.9), 0.9 * w - 0.3 * g, rtol=1e-10, atol=1e-12)


def test_delta_with_a_unit_key_and_full_step_stores_the_value() -> None:
    w, k, v = setup()
    k = k / k.norm()
    torch.testing.assert_close(rules.delta(w, k, v, 1.0) @ k, v)


def test_oja_is_a_gradient_step_on_its_objective() -> None:
    """Eq. 66: -<W k, v> + 1/2 ||W^T v||^2."""
    w, k, v = setup()
    g = grad(lambda w: -(w @ k) @ v + 0.5 * (w.T @ v).square().sum())(w)
    torch.testing.assert_close(rules.oja(w, k, v, 0.2, 1.0), w - 0.2 * g, rtol=1e-10, atol=1e-12)


def test_oja_converges_to_the_unit_top_eigenvector() -> None:
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    w = torch.full((1, 3), 0.5, dtype=torch.float64)
    for i in range(4000):
        k = torch.randn(3, generator=g, dtype=torch.float64) * scale
        w = rules.oja(w, k, w @ k, 0.2 / (i + 20))
    assert abs(w.norm().item() - 1) < 0.05
    assert abs(w[0, 0].item()) > 0.98


def test_omega_is_a_gradient_step_on_its_window_and_becomes_delta() -> None:
    w, k, v = draw(4, 3), draw(5, 3, seed=1), draw(5, 4, seed=2)
    gamma = torch.rand(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    g = grad(lambda w: (gamma * objectives.l2.value(k @ w.T, v)).sum())(w)
    ours = rules.omega(w, k, v, 0.1, gamma, objectives.l2, alpha=0.9)
    torch.testing.assert_close(ours, 0.9 * w - 0.1 * g, rtol=1e-10, atol=1e-12)
    one = rules.omega(w, k[-1:], v[-1:], 0.1, torch.ones(1, dtype=torch.float64), objectives.l2)
    torch.testing.assert_close(one, rules.delta(w, k[-1], v[-1], 0.1), rtol=1e-10, atol=1e-12)


@given(eta=st.floats(1e-3, 10), scale=st.floats(0.1, 4), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_implicit_dgd_minimises_its_proximal_problem(eta: float, scale: float, seed: int) -> None:
    """Eq. 56-57: the gradient of 1/2 ||W x - u||^2 + 1/(2 eta) ||W - W_t||^2 vanishes, for any ||x||."""
    w, x, error = draw(4, 3, seed=seed), scale * draw(3, seed=seed + 1), draw(4, seed=seed + 2)
    new = rules.dgd(w, x, error, rules.implicit_step(eta, x))
    g = grad(lambda n: 0.5 * (n @ x + error).square().sum() + (n - w).square().sum() / (2 * eta))(new)
    assert g.abs().max() < 1e-8 * (1 + 1 / eta)


def test_explicit_dgd_descends_the_loss_plus_half_the_squared_output() -> None:
    w, x, y = setup()
    g = grad(lambda w: objectives.l2.value(w @ x, y) + 0.5 * (w @ x).square().sum())(w)
    torch.testing.assert_close(rules.dgd(w, x, w @ x - y, 0.1), w - 0.1 * g, rtol=1e-10, atol=1e-12)
    x = x / x.norm()
    for _ in range(500):
        w = rules.dgd(w, x, w @ x - y, 0.1)
    torch.testing.assert_close(w @ x, y / 2)


def test_ggd_with_a_dot_product_is_gradient_descent_and_settles_on_dgd() -> None:
    w, x, error = setup()
    surprise = lambda w, x: -error  # noqa: E731
    ours = rules.ggd(w, x, surprise, objectives.dot_product, 0.1, alpha=0.9)
    torch.testing.assert_close(ours, 0.9 * w - 0.1 * rules.outer(error, x), rtol=1e-10, atol=1e-12)
    x = 0.5 * x / x.norm()
    many = rules.ggd(w, x, surprise, objectives.l2, 0.7, steps=60)
    exact = rules.dgd(w, x, error, rules.implicit_step(0.7, x))
    torch.testing.assert_close(many, exact, rtol=1e-10, atol=1e-10)


def test_rules_batch_over_leading_dimensions() -> None:
    w, k, v, eta = (
        draw(2, 3, 4, 5),
        draw(2, 3, 5, seed=1),
        draw(2, 3, 4, seed=2),
        draw(2, 3, seed=3).sigmoid(),
    )
    for rule in (rules.hebbian, rules.delta, rules.oja, rules.dgd):
        batched = rule(w, k, v, eta, 1 - eta / 10)
        single = rule(w[1, 2], k[1, 2], v[1, 2], eta[1, 2], 1 - eta[1, 2] / 10)
        torch.testing.assert_close(batched[1, 2], single)


def test_bad_objectives_are_named() -> None:
    with pytest.raises(UserError, match="p >= 1"):
        objectives.lp(0.5)
    with pytest.raises(UserError, match="did you mean 'dot'"):
        objectives.get("dott")


@pytest.mark.parametrize("objective", OBJECTIVES[1:], ids=lambda o: o.name)
def test_an_error_that_is_not_a_number_stays_so(objective) -> None:
    assert objective.error(torch.tensor([float("nan")]), torch.zeros(1)).isnan().all()


@pytest.mark.parametrize("p", [0.5, float("nan"), float("inf")])
def test_an_order_without_an_objective_is_refused(p: float) -> None:
    with pytest.raises(UserError, match="needs p >= 1"):
        objectives.lp(p)


def test_a_residual_of_another_width_is_refused() -> None:
    with pytest.raises(UserError, match="adds 4 channels of input to 1"):
        MLPMemory(4, 1, 3, skip=True)
