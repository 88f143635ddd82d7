"""Orthogonalisation: SPEC section 6."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.optim import descend_to_orthogonal, newton_schulz, reference

SIZES = st.integers(1, 9)


def matrix(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def polar(g):
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    return u @ v


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.floats(1e-6, 1e6), st.integers(0, 100), st.sampled_from(["quintic", "cubic"]))
def test_invariances(rows, columns, scale, seed, coeffs):
    """NS(c G) = NS(G) for c > 0 and NS(A G B) = A NS(G) B for orthogonal A, B."""
    g = matrix(rows, columns, seed=seed)
    a, b = (torch.linalg.qr(matrix(n, n, seed=seed + 1))[0] for n in (rows, columns))
    o = newton_schulz(g, coeffs=coeffs)
    torch.testing.assert_close(newton_schulz(scale * g, coeffs=coeffs), o, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(newton_schulz(a @ g @ b, coeffs=coeffs), a @ o @ b, rtol=1e-8, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(SIZES, SIZES, st.integers(0, 100))
def test_the_oracle_and_batches(rows, columns, seed):
    g = matrix(2, 3, rows, columns, seed=seed)
    o = newton_schulz(g)
    for i in range(2):
        for j in range(3):
            one = g[i, j] if rows <= columns else g[i, j].mT
            expected = reference.newton_schulz(one)
            torch.testing.assert_close(o[i, j], expected if rows <= columns else expected.mT, rtol=1e-9, atol=1e-9)


def test_cubic_converges_to_the_polar_factor():
    g = matrix(5, 3)
    torch.testing.assert_close(newton_schulz(g, 40, "cubic"), polar(g), rtol=1e-12, atol=1e-12)


def test_quintic_brings_singular_values_near_one():
    values = torch.linalg.svdvals(newton_schulz(matrix(64, 96)))
    assert 0.6 < values.min() < values.max() < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_stays_zero_and_the_type_is_kept(dtype):
    assert newton_schulz(torch.zeros(3, 4, dtype=dtype)).eq(0).all()
    assert descend_to_orthogonal(torch.zeros(3, 4, dtype=dtype)).eq(0).all()
    assert newton_schulz(torch.ones(4, 3, dtype=dtype)).dtype == dtype


def test_the_descent_is_the_gradient_of_eq_43():
    """Both the printed objective and its proximal form, one step at a time, against autograd."""
    g = matrix(3, 5)
    start = g / g.norm()
    for anchor in (True, False):
        o = start
        for steps in range(1, 5):
            variable = o.clone().requires_grad_()
            fit = 0.5 * (variable - start).square().sum() if anchor else 0.0
            # O O^T for a wide matrix: the same penalty up to a constant
            loss = fit + 0.5 * (variable @ variable.mT - torch.eye(3).double()).square().sum()
            (gradient,) = torch.autograd.grad(loss, variable)
            o = o - 0.25 * gradient
            result = descend_to_orthogonal(g, steps, 0.25, anchor)
            torch.testing.assert_close(result, o, rtol=1e-12, atol=1e-12)


def test_the_first_step_of_the_descent_is_cubic_newton_schulz_and_so_is_all_of_it_without_the_anchor():
    g = matrix(4, 6)
    torch.testing.assert_close(descend_to_orthogonal(g, 1), newton_schulz(g, 1, "cubic"))
    torch.testing.assert_close(descend_to_orthogonal(g, 30, anchor=False), newton_schulz(g, 30, "cubic"))


def test_with_the_anchor_singular_values_end_where_the_objective_says():
    g = matrix(4, 6)
    values = torch.linalg.svdvals(descend_to_orthogonal(g, 500))
    start = torch.linalg.svdvals(g / g.norm())
    torch.testing.assert_close(2 * values**3 - values, start, rtol=1e-9, atol=1e-9)
    assert 0.70 < values.min() < values.max() <= 1.0


def test_unknown_coefficients_are_one_line():
    with pytest.raises(UserError, match="did you mean 'cubic'"):
        newton_schulz(torch.eye(2), coeffs="cubics")
