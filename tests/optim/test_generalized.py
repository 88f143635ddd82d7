"""GeneralizedMomentum: one gradient step of its objective per step, in units of the gradient (Eq. 35-37)."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestlearn.errors import UserError
from nestlearn.memory import objectives, rules
from nestlearn.optim.generalized import GeneralizedMomentum
from nestlearn.optim.momentum import Momentum
from tests.optim.test_descent import EXACT, LAYERS, ROWS, case, draw, internal, loss_of, surprise
from tests.optim.test_layer_optimizers import TOKENS, build


def memory_of(optimizer: GeneralizedMomentum, p: Tensor) -> Tensor:
    return -optimizer.state[p]["momentum"]


def size_of_keys(layer: nn.Module, x: Tensor) -> Tensor:
    """``mean_b ||x_b||^2`` for each output, (o, 1, ...): the trace of the second derivative of its 1/2 y^2."""
    w, n = layer.weight.detach(), surprise(layer, x)[1]
    if isinstance(layer, nn.Embedding):  # one column of the table holds what all keys say
        return (x != layer.padding_idx).double().sum() / n
    nothing = torch.zeros_like(layer(x))
    curvature = torch.autograd.functional.hessian(lambda w: internal(layer, x, nothing, n, w), w)
    diagonal = curvature.reshape(w.numel(), w.numel()).diagonal().view_as(w)
    return diagonal.flatten(1).sum(1).view(-1, *[1] * (w.ndim - 1))


@pytest.mark.parametrize("name", LAYERS)
def test_a_dot_product_is_momentum(name: str) -> None:
    layer, x = case(name)
    found = []
    for method in (
        lambda m: GeneralizedMomentum(m, 0.1, objective="dot", weight_decay=0.1),
        lambda m: Momentum(m.parameters(), 0.1, weight_decay=0.1),
    ):
        model = copy.deepcopy(layer)
        optimizer = method(model)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
        found.append(model.weight)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_dot_product_is_torch_sgd_with_momentum() -> None:
    model, twin = build(), build()
    ours = GeneralizedMomentum(model, 0.1, objective="dot")
    theirs = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        for m, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            m(TOKENS).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(
    ("name", "objective"),
    [(name, objectives.l2) for name in LAYERS]
    + [(name, o) for name in ROWS for o in (objectives.lp(1.5), objectives.lp(3))],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("lr", [0.01, 3.0])
def test_the_memory_takes_a_gradient_step_on_its_objective(name: str, objective, lr: float) -> None:
    """By autograd through the layer's forward: keys are its inputs, values -dL/dy, the read of the memory e * m."""
    layer, x = case(name)
    optimizer = GeneralizedMomentum(layer, lr, momentum=0.8, objective=objective)
    e = (1 / size_of_keys(layer, x)).clamp(max=lr)
    for _ in range(3):
        u, n = surprise(layer, x)
        m, w = memory_of(optimizer, layer.weight), layer.weight.detach().clone()
        read = (e * m).requires_grad_()
        (gradient,) = torch.autograd.grad(internal(layer, x, u, n, read, objective), read)
        optimizer.zero_grad()
        loss_of(layer(x)).backward()
        optimizer.step()
        torch.testing.assert_close(memory_of(optimizer, layer.weight), 0.8 * m - gradient, **EXACT)
        torch.testing.assert_close(layer.weight.data, w + lr * memory_of(optimizer, layer.weight), **EXACT)


@pytest.mark.parametrize("name", ROWS)
def test_the_closed_form_of_l2_is_that_of_the_rows(name: str) -> None:
    """The objective L_2 of Miras is the square objective, but goes the way of the rows."""
    layer, x = case(name)
    found = []
    for objective in ("l2", objectives.lp(2)):
        model = copy.deepcopy(layer)
        optimizer = GeneralizedMomentum(model, 0.1, objective=objective)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
        found.append(model.weight)
    torch.testing.assert_close(*found, **EXACT)


@given(d_in=st.integers(1, 5), d_out=st.integers(1, 5), alpha=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_in_the_units_of_the_paper_it_is_delta_descent_of_the_memory(d_in, d_out, alpha: float, seed: int) -> None:
    """``lr * m`` follows Eq. 57 with decay alpha: the rule of a memory layer, on the optimizer's context."""
    layer, lr = nn.Linear(d_in, d_out, bias=False).double(), 0.01
    optimizer = GeneralizedMomentum(layer, lr, momentum=alpha)
    memory, w = torch.zeros_like(layer.weight), layer.weight.detach().clone()
    for step in range(4):
        x, error = draw(d_in, seed=seed + step), draw(d_out, seed=seed + 9 + step)
        optimizer.zero_grad()
        (layer(x) @ error).backward()
        optimizer.step()
        memory = rules.dgd(memory, x, error, lr, alpha)
        w = w + memory
    torch.testing.assert_close(layer.weight.data, w.detach(), **EXACT)


def test_large_inputs_erase_no_more_than_what_is_there() -> None:
    layer, x = nn.Linear(4, 3, bias=False).double(), 1e6 * draw(4)
    optimizer = GeneralizedMomentum(layer, 0.1, momentum=0.9)
    optimizer.state[layer.weight]["momentum"].copy_(-draw(3, 4, seed=1))
    before = memory_of(optimizer, layer.weight)
    (0 * layer(x)).sum().backward()
    optimizer.step()
    after, key = memory_of(optimizer, layer.weight), x / x.norm()
    torch.testing.assert_close(after @ key, (0.9 - 1.0) * before @ key, **EXACT)
    rest = torch.eye(4, dtype=torch.float64) - torch.outer(key, key)
    torch.testing.assert_close(after @ rest, 0.9 * before @ rest, **EXACT)


def test_users_mistakes_are_named() -> None:
    for wrong, message in (
        (lambda: GeneralizedMomentum(nn.Linear(2, 2), momentum=1.5), "momentum=1.5"),
        (lambda: GeneralizedMomentum(nn.Linear(2, 2), objective="ll1"), "unknown objective"),
        (lambda: GeneralizedMomentum([torch.ones(2)]), "give it the module"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
