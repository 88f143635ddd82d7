"""DGD and GGD against the problems that they say they solve (Eq. 56-60), on every kind of layer that they watch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from nestlearn.errors import UserError
from nestlearn.memory import objectives, rules
from nestlearn.optim.descent import DGD, GGD
from nestlearn.optim.generalized import GeneralizedMomentum

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDE = {"rtol": 1e-7, "atol": 1e-7}
sizes, seeds = st.integers(1, 5), st.integers(0, 99)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(name: str) -> tuple[nn.Module, Tensor]:
    """A layer of each kind in float64, and an input."""
    torch.manual_seed(0)
    layer, x = {
        "linear": lambda: (nn.Linear(5, 4, bias=False), draw(3, 2, 5)),
        "conv1d": lambda: (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular", bias=False), draw(2, 3, 6)),
        "conv2d": lambda: (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), draw(2, 4, 7, 6)),
        "conv3d": lambda: (nn.Conv3d(2, 3, 2, dilation=2, padding="same", bias=False), draw(2, 2, 4, 4, 3)),
        "embedding": lambda: (nn.Embedding(6, 3, padding_idx=0), torch.tensor([[1, 1, 5], [0, 3, 1]])),
    }[name]()
    return layer.double(), x


LAYERS = ["linear", "conv1d", "conv2d", "conv3d", "embedding"]
ROWS = LAYERS[:-1]


def loss_of(y: Tensor) -> Tensor:
    """A mean loss that is not quadratic in the output."""
    return (y.tanh() - draw(*y.shape, seed=7)).square().mean()


def surprise(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """u_b = -dL_b/dy_b for the present weight, and the number of rows n; L is the mean of the n losses L_b."""
    y = layer(x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(loss_of(y), y)
    n = x.numel() if isinstance(layer, nn.Embedding) else y.numel() // layer.weight.shape[0]
    return -n * delta, n


def internal(layer: nn.Module, x: Tensor, u: Tensor, n: int, w: Tensor, objective=objectives.l2) -> Tensor:
    """``mean_b objective(W x_b, u_b)`` by the layer itself, any weight."""
    y = functional_call(layer, {"weight": w}, (x,))
    axis = -1 if isinstance(layer, nn.Embedding | nn.Linear) else 1
    return objective.value(y.movedim(axis, -1), u.movedim(axis, -1)).sum() / n


def one_step(optimizer, layer: nn.Module, x: Tensor) -> Tensor:
    loss_of(layer(x)).backward()
    optimizer.step()
    return layer.weight.detach().clone()


# DGD


@given(d_in=sizes, d_out=sizes, eta=st.floats(1e-3, 10), scale=st.floats(0.1, 5), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_one_sample_is_the_rule_of_equation_57(d_in: int, d_out: int, eta: float, scale: float, seed: int) -> None:
    """Sherman-Morrison: the solve with I + eta x x^T is the step eta / (1 + eta ||x||^2)."""
    layer, x = nn.Linear(d_in, d_out, bias=False).double(), scale * draw(d_in, seed=seed)
    w, error = layer.weight.detach().clone(), draw(d_out, seed=seed + 1)
    for mode, step in (("implicit", rules.implicit_step(eta, x)), ("explicit", eta)):
        layer.weight.data.copy_(w)
        optimizer = DGD(layer, lr=eta, mode=mode)
        optimizer.zero_grad()
        (layer(x) @ error).backward()
        optimizer.step()
        torch.testing.assert_close(layer.weight.data, rules.dgd(w, x, error, step), **EXACT)
        optimizer.close()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("eta", [0.03, 2.0])
def test_implicit_dgd_is_the_minimiser_of_equation_56(name: str, eta: float) -> None:
    """The gradient of mean_b 1/2 ||W x_b - u_b||^2 + 1/(2 eta) ||W - W_t||^2, by the layer's own forward, vanishes."""
    layer, x = case(name)
    start, (u, n) = layer.weight.detach().clone(), surprise(layer, x)
    new = one_step(DGD(layer, lr=eta), layer, x).requires_grad_()
    problem = internal(layer, x, u, n, new) + (new - start).square().sum() / (2 * eta)
    (gradient,) = torch.autograd.grad(problem, new)
    assert gradient.abs().max() < 1e-10
    assert (new - start).abs().max() > 1e-3


def test_a_numerical_minimiser_finds_the_same_weight() -> None:
    layer, x = case("conv2d")
    start, (u, n) = layer.weight.detach().clone(), surprise(layer, x)
    w = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [w], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def problem() -> Tensor:
        search.zero_grad()
        value = internal(layer, x, u, n, w) + (w - start).square().sum() / (2 * 0.7)
        value.backward()
        return value

    search.step(problem)
    torch.testing.assert_close(one_step(DGD(layer, lr=0.7), layer, x), w.detach(), **WIDE)


@pytest.mark.parametrize("name", LAYERS)
def test_explicit_dgd_is_descent_on_the_loss_plus_half_the_squared_output(name: str) -> None:
    layer, x = case(name)
    w = layer.weight
    _, n = surprise(layer, x)
    nothing = torch.zeros_like(layer(x))
    (g,) = torch.autograd.grad(loss_of(layer(x)) + internal(layer, x, nothing, n, w), w)
    expected = w.detach() - 0.3 * g
    torch.testing.assert_close(one_step(DGD(layer, lr=0.3, mode="explicit"), layer, x), expected, **EXACT)


def test_explicit_dgd_settles_at_half_of_the_target_of_a_square_loss() -> None:
    layer, x, y = nn.Linear(3, 2, bias=False).double(), draw(3), draw(2, seed=1)
    optimizer = DGD(layer, lr=0.1, mode="explicit")
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(layer(x).detach(), y / 2, **WIDE)


@pytest.mark.parametrize("mode", ["implicit", "explicit"])
def test_weight_decay_comes_first(mode: str) -> None:
    """W <- (1 - lr wd) W, then the rule with the gradient of the undecayed weight: alpha of Eq. 88."""
    layer, x = case("linear")
    twin = copy.deepcopy(layer)
    decayed = one_step(DGD(layer, lr=0.3, mode=mode, weight_decay=0.5), layer, x)
    optimizer = DGD(twin, lr=0.3, mode=mode)
    loss_of(twin(x)).backward()
    twin.weight.data.mul_(1 - 0.3 * 0.5)
    optimizer.step()
    torch.testing.assert_close(decayed, twin.weight.data, **EXACT)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e5])
def test_the_implicit_step_is_stable_for_large_inputs_in_float32(size: float) -> None:
    """Where rounding makes I + eta G indefinite the step is lowered. Without that the weight grows 1,000-fold."""
    torch.manual_seed(0)
    layer, x = nn.Linear(512, 8, bias=False), size * torch.randn(64, 512) * torch.logspace(-3, 0, 512)
    start = layer.weight.detach().double()
    moment = x.double().T @ x.double() / 64
    exact = torch.linalg.solve(torch.eye(512, dtype=torch.float64) + moment, start.T).T
    optimizer = DGD(layer, lr=1.0)
    (0 * layer(x)).sum().backward()
    optimizer.step()
    assert (layer.weight - exact).norm() < 3e-3 * start.norm()
    assert layer(x).norm() < 0.01 * (x.double() @ start.T).norm()


def test_users_mistakes_are_named() -> None:
    layer = nn.Linear(2, 2)
    for wrong, message in (
        (lambda: DGD(layer, mode="implicite"), "did you mean 'implicit'"),
        (lambda: DGD(layer, lr=-1.0), "lr=-1.0"),
        (lambda: DGD(layer.parameters()), "give it the module"),
        (lambda: GGD(layer, steps=0), "steps=0"),
        (lambda: GGD(layer, objective="ll2"), "unknown objective"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
    optimizer = GGD(layer, value=lambda w, x, delta: delta[:, :1])
    layer(torch.ones(3, 2)).sum().backward()
    with pytest.raises(UserError, match="one value per row"):
        optimizer.step()


# GGD


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_ggd_with_a_dot_product_is_sgd(name: str, clip: float | None) -> None:
    """Eq. 58 from the rows: dL/dy_b is scaled so that the mean of delta_b x_b^T is p.grad, clipped or not."""
    layer, x = case(name)
    twin = copy.deepcopy(layer)
    for model, optimizer in ((layer, GGD(layer, 0.3, "dot")), (twin, torch.optim.SGD(twin.parameters(), 0.3))):
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            if clip:
                assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
            optimizer.step()
    torch.testing.assert_close(layer.weight, twin.weight, **EXACT)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("objective", [objectives.l2, objectives.lp(1.5), objectives.lp(3)], ids=lambda o: o.name)
def test_ggd_takes_explicit_steps_on_its_objective_with_proximity(name: str, objective) -> None:
    """Gradient steps of size eta on objective + 1/(2 eta) ||W - W_t||^2, by autograd through the layer's forward."""
    layer, x = case(name)
    start, (u, n) = layer.weight.detach().clone(), surprise(layer, x)
    w = start.clone()
    for _ in range(3):
        w.requires_grad_()
        problem = internal(layer, x, u, n, w, objective) + (w - start).square().sum() / (2 * 0.05)
        (gradient,) = torch.autograd.grad(problem, w)
        w = (w - 0.05 * gradient).detach()
    torch.testing.assert_close(one_step(GGD(layer, 0.05, objective, steps=3), layer, x), w, **EXACT)


@pytest.mark.parametrize("name", ROWS)
def test_ggd_with_l2_is_explicit_dgd_and_tends_to_the_implicit_one(name: str) -> None:
    layer, x = case(name)
    results = []
    for build_one in (
        lambda m: GGD(m, 0.02),
        lambda m: DGD(m, 0.02, mode="explicit"),
        lambda m: GGD(m, 0.02, steps=60),
        lambda m: DGD(m, 0.02),
    ):
        model = copy.deepcopy(layer)
        results.append(one_step(build_one(model), model, x))
    torch.testing.assert_close(results[0], results[1], **EXACT)
    torch.testing.assert_close(results[2], results[3], **EXACT)
    assert (results[0] - results[2]).abs().max() > 1e-6


@given(d_in=sizes, d_out=sizes, steps=st.integers(1, 3), decay=st.floats(0, 1), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_one_sample_of_ggd_is_the_rule_of_equation_60(
    d_in: int, d_out: int, steps: int, decay: float, seed: int
) -> None:
    layer, x, error = nn.Linear(d_in, d_out, bias=False).double(), draw(d_in, seed=seed), draw(d_out, seed=seed + 1)
    w, objective = layer.weight.detach().clone(), objectives.lp(1.5)
    optimizer = GGD(layer, 0.1, objective, steps=steps, weight_decay=decay)
    (layer(x) @ error).backward()
    optimizer.step()
    expected = rules.ggd(w, x, lambda w, k: -error, objective, 0.1, alpha=1 - 0.1 * decay, steps=steps)
    torch.testing.assert_close(layer.weight.data, expected, **EXACT)


def test_ggd_stores_the_values_that_it_is_told_to() -> None:
    """With the value W x - delta, the answer corrected by its surprise, L2 is gradient descent: nothing is erased."""
    for name in ROWS:
        layer, x = case(name)
        twin = copy.deepcopy(layer)
        ours = one_step(GGD(layer, 0.3, value=lambda w, x, delta: x @ w.mT - delta), layer, x)
        torch.testing.assert_close(ours, one_step(torch.optim.SGD(twin.parameters(), 0.3), twin, x), **EXACT)


@pytest.mark.parametrize("name", ROWS)
def test_what_else_is_in_the_gradient_is_descended_as_it_is(name: str) -> None:
    """A penalty on the weights and a clip of single elements: with a dot product GGD is descent still (Eq. 58), with l2
    explicit DGD."""
    layer, x = case(name)
    others = {"dot": GGD(layer, lr=0.1, objective="dot"), "l2": GGD(copy.deepcopy(layer), lr=0.1, objective="l2")}
    explicit = DGD(copy.deepcopy(layer), lr=0.1, mode="explicit")
    wanted = {}
    for key, optimizer in {**others, "dgd": explicit}.items():
        model = optimizer._model
        (loss_of(model(x)) + 0.5 * model.weight.square().sum()).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        wanted[key] = model.weight.detach() - 0.1 * model.weight.grad
        optimizer.step()
    torch.testing.assert_close(others["dot"]._model.weight.data, wanted["dot"], **EXACT)
    torch.testing.assert_close(others["l2"]._model.weight.data, explicit._model.weight.data, **EXACT)


@pytest.mark.parametrize("make", [DGD, GGD, GeneralizedMomentum])
def test_a_layer_without_outputs_or_inputs_changes_nothing(make) -> None:
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    optimizer = make(model)
    model(draw(5, 3).float()).sum().backward()
    optimizer.step()
    assert model[1].bias.isfinite().all()
    assert model[1].bias.abs().sum() > 0
