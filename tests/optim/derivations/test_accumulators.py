"""The identities of appendix B (Eq. 101-111): averages, their correction, reads, full and Kronecker memories."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import pytorch_optimizer as po
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestlearn.memory import objectives, rules
from nestlearn.optim.derivations import accumulators, as_memory, matrix_recurrences


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(objective: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(objective(at), at)[0]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


betas, counts, seeds = st.floats(0.05, 0.99), st.integers(1, 30), st.integers(0, 1000)


@given(beta=betas, count=counts, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_average_is_a_ridge_regression_and_its_correction_drops_the_ridge(beta: float, count: int, seed: int) -> None:
    squares = draw(count, 4, seed=seed).square()
    memory, v = accumulators.average("v", "g^2", beta), torch.zeros(4, dtype=torch.float64)
    for x in squares:
        v = memory.write(v, x)
    w = torch.tensor([(1 - beta) * beta ** (count - 1 - i) for i in range(count)], dtype=torch.float64)[:, None]
    fit = lambda u: (w * (u - squares).square()).sum()  # noqa: E731
    ridge = beta**count
    close(v, (w * squares).sum(0) / (w.sum() + ridge))  # the minimiser with the ridge: its weights sum to one
    close(gradient(lambda u: fit(u) + ridge * u.square().sum(), v), torch.zeros_like(v))
    corrected = memory.without_ridge(v, count)
    close(corrected, (w * squares).sum(0) / w.sum())
    close(gradient(fit, corrected) / w.sum(), torch.zeros_like(v))


@given(beta=betas, seed=seeds)
@settings(max_examples=25, deadline=None)
def test_a_write_is_a_gradient_step_on_the_objective(beta: float, seed: int) -> None:
    memory, value = draw(5, seed=seed), draw(5, seed=seed + 1)
    step = gradient(lambda v: objectives.l2.value(v, value), memory)
    close(accumulators.average("v", "x", beta).write(memory, value), memory - (1 - beta) * step)
    close(accumulators.average("v", "x", beta).write(memory, value), beta * memory + (1 - beta) * value)
    step = gradient(lambda m: objectives.dot_product.value(m, value), memory)
    close(accumulators.running_sum("m", "x", beta, 0.7).write(memory, value), beta * memory - 0.7 * step)
    # SGD's decay is a ridge of its own (Eq. 33): one step on -<m, x> + (1 - beta) / 2 ||m||^2
    step = gradient(lambda m: objectives.dot_product.value(m, value) + (1 - beta) / 2 * m.square().sum(), memory)
    close(accumulators.running_sum("m", "x", beta).write(memory, value), memory - step)


def test_monotone_retention_is_a_projected_step() -> None:
    memory, value = draw(50), draw(50, seed=1)
    written = accumulators.running_maximum("H", "v").write(memory, value)
    grid = memory + torch.linspace(0, 6, 2001, dtype=torch.float64)[:, None]  # the feasible set, H not below its past
    best = grid.gather(0, (grid - value).square().argmin(0, keepdim=True))[0]
    torch.testing.assert_close(written, best, rtol=0, atol=3e-3)
    assert (written >= memory).all()


@given(count=counts, ridge=st.floats(1e-3, 2), seed=seeds)
@settings(max_examples=25, deadline=None)
def test_read_out_minimises_equation_101(count: int, ridge: float, seed: int) -> None:
    g, target = draw(count, 6, seed=seed), draw(6, seed=seed + 1)
    read = accumulators.read_out(g.sum(0), g.square().sum(0), target, ridge)
    objective = lambda m: (m * g - target).square().sum() + ridge * m.square().sum()  # noqa: E731
    close(gradient(objective, read), torch.zeros_like(read))


def test_targets_that_give_momentum_and_adagrad() -> None:
    g = draw(12, 6)
    m, h = g.sum(0), g.square().sum(0)
    close(accumulators.read_out(m, h, h, 0.0), m)  # Eq. 104
    close(accumulators.read_out(m, h, h.sqrt(), 0.0), m / h.sqrt())  # Eq. 105
    close(accumulators.read_out(m, h, h.sqrt(), 0.1 * h.sqrt()), m / (h.sqrt() + 0.1))  # its ridge is Adam's eps
    close(accumulators.read_out(g[0], g[0].square(), g[0].abs(), 0.0), g[0].sign())


def test_an_unreached_element_reads_zero() -> None:
    zero = torch.zeros(2)
    assert torch.equal(accumulators.read_out(zero, zero, zero, 0.0), zero)


def full_memory() -> tuple[Tensor, Tensor, Tensor]:
    g = draw(40, 6)
    return g, g.mT @ g, g.sum(0)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_full_matrix_read_minimises_equation_106(ridge: float) -> None:
    g, h, m = full_memory()
    target = draw(6, 6, seed=1)
    read = torch.linalg.solve(h + ridge * torch.eye(6), target @ m)  # Eq. 107
    objective = lambda x: 0.5 * (g @ x).square().sum() - x @ target @ m + ridge / 2 * x.square().sum()  # noqa: E731
    close(gradient(objective, read), torch.zeros_like(read))


def test_full_matrix_with_the_root_as_target_is_full_adagrad() -> None:
    _, h, m = full_memory()
    root = accumulators.symmetric_power(h, 0.5)
    close(root @ root, h)
    close(torch.linalg.solve(h, root @ m), accumulators.symmetric_power(h, -0.5) @ m)  # Eq. 111


def test_diagonal_of_the_full_memory_is_the_element_wise_one() -> None:
    g, h, m = full_memory()
    diagonal, target = h.diagonal(), draw(6, seed=1)
    full = torch.linalg.solve(torch.diag(diagonal) + 0.1 * torch.eye(6), torch.diag(target) @ m)
    close(full, accumulators.read_out(m, g.square().sum(0), target, 0.1))


def test_statistics_are_written_by_the_hebbian_rule() -> None:
    g, memory = draw(3, 4), draw(3, 3, seed=1)
    left, right = accumulators.statistics(step_size=0.2, retention=0.8)
    expected = 0.8 * memory
    for column in g.mT:
        expected = rules.hebbian(expected, column, column, 0.2)
    close(left.write(memory, g, 0), expected)
    close(left.write(memory, g, 0), 0.8 * memory + 0.2 * g @ g.mT)
    # the same memory as an average of G G^T (an element-wise regression)
    close(left.write(memory, g, 0), accumulators.average("L", "G G^T", 0.8).write(memory, g @ g.mT))
    close(right.write(torch.zeros(4, 4), g, 1), 0.2 * g.mT @ g)


def test_shampoo_is_the_kronecker_approximation() -> None:
    gradients, p = draw(8, 3, 4), torch.zeros(3, 4, dtype=torch.float64)
    group = as_memory(po.Shampoo([nn.Parameter(p)], lr=1.0, matrix_eps=1e-3)).groups[0]
    state = group.init(p)
    for g in gradients:
        before = p
        p, state = group.update(state, g, p)
    left = 1e-3 * torch.eye(3) + sum(g @ g.mT for g in gradients)
    right = 1e-3 * torch.eye(4) + sum(g.mT @ g for g in gradients)
    whole = accumulators.symmetric_power(torch.kron(right, left), -0.25)  # H^(-1/2) with H = (R (x) L)^(1/2)
    columns = gradients[-1].mT.reshape(-1)  # vec stacks columns
    close(before - p, (whole @ columns).reshape(4, 3).mT)


def test_shampoo_of_a_vector_is_full_adagrad() -> None:
    gradients, p = draw(8, 5), torch.zeros(5, dtype=torch.float64)
    group = as_memory(po.Shampoo([nn.Parameter(p)], lr=1.0)).groups[0]
    state = group.init(p)
    for g in gradients:
        before = p
        p, state = group.update(state, g, p)
    h = 1e-6 * torch.eye(5) + gradients.mT @ gradients
    close(before - p, accumulators.symmetric_power(h, -0.5) @ gradients[-1])


def test_orthogonal_iteration_finds_the_eigenbasis() -> None:
    root = draw(5, 5)
    memory = {0: root @ root.mT}
    q, v = {0: torch.eye(5)}, torch.arange(5.0)
    for _ in range(300):
        q, v = matrix_recurrences.orthogonal_iteration(q, memory, v)
    rotated = q[0].mT @ memory[0] @ q[0]
    off = rotated - torch.diag(rotated.diagonal())
    assert off.norm() / rotated.norm() < 1e-5  # it factors in float32
    assert (rotated.diagonal().diff() < 0).all()
    assert sorted(v.tolist()) == list(range(5))
