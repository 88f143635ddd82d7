"""The momentum family is a memory of gradients: parity with the oracle, identities of SPEC sections 5 and 8."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nestlearn.errors import UserError
from nestlearn.memory import LinearMemory, objectives, rules
from nestlearn.optim import DeltaMomentum, FeatureMomentum, Momentum, PreconditionedMomentum, newton_schulz, reference
from nestlearn.optim.momentum import cubic

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6))


def gradients(shape, count, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def run(optimizer_class, w, grads, **kwargs):
    p = torch.nn.Parameter(w.clone())
    optimizer = optimizer_class([p], **kwargs)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]


def oracle(w, grads, eta, alpha, **kwargs):
    m = torch.zeros_like(w)
    for g in grads:
        w, m = reference.momentum(w, m, g, eta, alpha, **kwargs)
    return w


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.floats(0.0, 1.0), st.integers(0, 1000))
def test_momentum_is_the_memory_of_eq_33(shape, alpha, seed):
    w, *grads = gradients(shape, 6, seed)
    close(run(Momentum, w, grads, lr=0.1, momentum=alpha)[0], oracle(w, grads, 0.1, alpha))


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.floats(0.0, 1.0), st.integers(0, 1000))
def test_delta_momentum_is_the_memory_of_eq_49(shape, alpha, seed):
    """Gradients small enough for the printed coefficient: the cap on the erasure is not reached."""
    w, *grads = gradients(shape, 6, seed, scale=0.3)
    result, _ = run(DeltaMomentum, w, grads, lr=0.01, momentum=alpha)
    close(result, oracle(w, grads, 0.01, alpha, objective=objectives.l2))


def test_preconditioned_and_feature_momentum_are_the_memories_of_eq_47_and_51():
    w, *grads = gradients((4, 5), 8)
    p = gradients((4, 4), 1, seed=1)[0]
    result, _ = run(PreconditionedMomentum, w, grads, lr=0.1, preconditioner=lambda g: p @ g)
    close(result, oracle(w, grads, 0.1, 0.9, preconditioner=p))
    result, _ = run(FeatureMomentum, w, grads, lr=0.1, preconditioner=lambda g: p @ g)
    close(result, oracle(w, grads, 0.1, 0.9, preconditioner=p, feature=cubic))
    result, _ = run(DeltaMomentum, w, grads, lr=1e-3, preconditioner=lambda g: p @ g)
    close(result, oracle(w, grads, 1e-3, 0.9, preconditioner=p, objective=objectives.l2))


def test_nonlinear_output_is_eq_52():
    """With a step of one, where the step size inside the memory and in front of the read are the same thing."""
    w, *grads = gradients((3, 5), 8)
    for name, sigma in (("sign", torch.sign), ("tanh", torch.tanh), ("orthogonal", newton_schulz)):
        close(run(Momentum, w, grads, lr=1.0, output=name)[0], oracle(w, grads, 1.0, 0.9, output=sigma))
    close(
        run(FeatureMomentum, w, grads, lr=1.0, output=lambda m: m**3)[0],
        oracle(w, grads, 1.0, 0.9, feature=cubic, output=lambda m: m**3),
    )


@pytest.mark.parametrize("shape", [(3, 70), (70, 3), (5,), (4, 3, 2, 2)])
def test_no_erasure_identity_preconditioner_and_feature_are_momentum(shape):
    w, *grads = gradients(shape, 8)
    plain, _ = run(Momentum, w, grads, lr=0.1)
    close(run(DeltaMomentum, w, grads, lr=0.1, erase=0.0)[0], plain)
    close(run(PreconditionedMomentum, w, grads, lr=0.1, preconditioner=None)[0], plain)
    close(run(FeatureMomentum, w, grads, lr=0.1, feature=lambda g: g)[0], plain)


def test_delta_momentum_tends_to_momentum_as_the_step_tends_to_zero():
    w, *grads = gradients((4, 5), 20)
    for lr in (1e-3, 1e-5):
        moved = run(DeltaMomentum, w, grads, lr=lr, momentum=1.0)[0] - w
        plain = run(Momentum, w, grads, lr=lr, momentum=1.0)[0] - w
        assert ((moved - plain).norm() / plain.norm()).item() < 200 * lr


def test_momentum_is_sgd_with_momentum_also_under_a_schedule():
    w, *grads = gradients((300, 1000), 5)  # several pieces
    ends = []
    for optimizer_class in (Momentum, torch.optim.SGD):
        p = torch.nn.Parameter(w.clone())
        optimizer = optimizer_class([p], lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3)
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
            schedule.step()
        ends.append(p.detach())
    close(*ends)


def test_preconditioned_momentum_is_rmsprop_with_a_corrected_mean():
    w, *grads = gradients((20, 30), 10)
    v, m, p = torch.zeros_like(w), torch.zeros_like(w), w.clone()
    for t, g in enumerate(grads, 1):
        v = v - 0.01 * objectives.l2.error(v, g * g)  # a gradient step on 1/2 ||v - g^2||^2
        m = 0.9 * m - g / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        p = p + 1e-3 * m
    close(run(PreconditionedMomentum, w, grads, lr=1e-3)[0], p)


# Delta momentum: keys, the cap, what it forgets


def test_delta_gradient_is_that_of_eq_48():
    m, g, p = (
        t.requires_grad_() for t in (gradients((4, 5), 1, 1)[0], gradients((4, 5), 1, 2)[0], torch.eye(4).double())
    )
    loss = 0.5 * (m @ g.mT + p).square().sum()
    (gradient,) = torch.autograd.grad(loss, m)
    (closed,) = LinearMemory(5, 4).gradient((m,), g, -p.mT, objectives.l2)
    close(gradient, closed)
    close(gradient, m @ g.mT @ g + p @ g)


@pytest.mark.parametrize("keys", ["rows", "whole", "elements"])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (6,)])
def test_kinds_of_keys(keys, shape):
    w, *grads = gradients(shape, 6, scale=0.5)
    m, p = torch.zeros_like(w), w.clone()
    for g in grads:
        size = g.abs().max() ** 2 if keys == "elements" else g.norm() ** 2
        e = min(0.3, 0.5 / size)
        if keys == "elements":
            m = 0.9 * m - e * g * g * m - g
        elif keys == "whole" or len(shape) == 1:
            m = 0.9 * m - e * (m * g).sum() * g - g
        else:
            m = m @ (0.9 * torch.eye(shape[1]).double() - e * g.mT @ g) - g
        p = p + 0.1 * m
    close(run(DeltaMomentum, w, grads, lr=0.1, erase=3.0, keys=keys)[0], p)


def test_a_vector_is_written_by_the_rules_of_the_layers():
    """A vector's memory has one output. Its key is g and its value -1: `rules.delta` and `rules.hebbian` write it."""
    w, *grads = gradients((6,), 8, scale=0.2)
    value, lr = -torch.ones(1).double(), 0.1
    for optimizer_class, rule, alpha in ((DeltaMomentum, rules.delta, 1.0), (Momentum, rules.hebbian, 0.9)):
        m, p = torch.zeros(1, 6).double(), w.clone()
        for g in grads:
            m = rule(m, g, value, eta=lr, alpha=alpha)
            p = p + m[0]
        close(run(optimizer_class, w, grads, lr=lr, momentum=alpha)[0], p)


@pytest.mark.parametrize("keys", ["rows", "whole", "elements"])
def test_the_cap_bounds_the_memory_for_gradients_of_any_size(keys):
    for scale in (1e-20, 1.0, 1e12):
        w, *grads = gradients((5, 6), 50, scale=scale)
        for erase in (1.0, math.inf):
            _, state = run(DeltaMomentum, w, grads, lr=0.1, erase=erase, keys=keys)
            assert state["momentum"].isfinite().all()
            assert state["momentum"].norm() <= 10.1 * max(g.norm() for g in grads)


def test_infinite_erase_forgets_the_stated_fraction_along_the_gradient():
    g, other = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = DeltaMomentum([p], lr=0.1, momentum=1.0, erase=math.inf, max_erase=0.25)
    for gradient in (g, other, g):
        p.grad = gradient.clone()
        optimizer.step()
    close(optimizer.state[p]["momentum"], torch.tensor([0.75 * 2 + 2, 3.0]), 1e-6)


# Long contexts (SPEC section 8)


def test_orthogonal_gradients_leave_momentum_as_beta_to_the_n():
    """Eq. 45: after n steps of a task, what the memory holds outside its direction is beta^n of what it held."""
    u, v = torch.eye(4, dtype=torch.float64)[:2]
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Momentum([p], lr=0.1, momentum=0.9)
    for _ in range(20):
        p.grad = u.clone()
        optimizer.step()
    before = optimizer.state[p]["momentum"] @ u
    for n in range(1, 30):
        p.grad = v.clone()
        optimizer.step()
        close(optimizer.state[p]["momentum"] @ u, before * 0.9**n)


@pytest.mark.parametrize("scale", [1e-15, 1e18, 1e30])
def test_cubic_features_have_no_square_to_overflow(scale):
    g = torch.tensor([1.0, -0.5, 0.25, 0.0]) * scale
    close(cubic(g) / scale, torch.tensor([1.0, -0.5 * 0.625, 0.25 * 0.53125, 0.0]), 1e-6)


def test_horizon_of_momentum():
    """Section 4.3: the last 7 gradients are half of an EMA of 0.9, the last 44 are 99 % (the print counts indices)."""
    weights = [0.1 * 0.9**i for i in range(200)]
    assert sum(weights[:6]) < 0.5 < sum(weights[:7])
    assert sum(weights[:43]) < 0.99 < sum(weights[:44])


@pytest.mark.parametrize(
    ("optimizer_class", "wrong", "words"),
    [
        (Momentum, {"momentum": 1.5}, "momentum=1.5"),
        (Momentum, {"lr": -1.0}, "lr=-1.0"),
        (Momentum, {"lr": float("inf")}, "lr=inf"),
        (Momentum, {"lr": float("nan")}, "lr=nan"),
        (Momentum, {"output": "sing"}, "did you mean 'sign'"),
        (PreconditionedMomentum, {"preconditioner": "full"}, "'diagonal'"),
        (FeatureMomentum, {"feature": "cubik"}, "give .cubic."),
        (DeltaMomentum, {"keys": "row"}, "did you mean 'rows'"),
        (DeltaMomentum, {"max_erase": 3.0}, "max_erase=3.0"),
    ],
)
def test_mistakes_are_one_line(optimizer_class, wrong, words):
    with pytest.raises(UserError, match=words) as caught:
        optimizer_class([torch.nn.Parameter(torch.zeros(2, 2))], **wrong)
    assert "\n" not in str(caught.value)


def test_hooks_that_change_what_is_loaded_are_heeded() -> None:
    """As torch's own optimizers do: here one that puts the states in the order of the names."""
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    saved = Momentum([("a", a), ("b", b)], lr=1.0)
    a.grad, b.grad = torch.tensor([1.0]), torch.tensor([5.0])
    saved.step()
    other = Momentum([("b", b), ("a", a)], lr=1.0)

    def by_name(optimizer: torch.optim.Optimizer, state: dict) -> dict:
        group, here = state["param_groups"][0], optimizer.param_groups[0]["param_names"]
        order = [group["param_names"].index(name) for name in here]
        moved = {**group, "params": [group["params"][i] for i in order], "param_names": here}
        return {**state, "param_groups": [moved]}

    other.register_load_state_dict_pre_hook(by_name)
    other.register_load_state_dict_post_hook(lambda o: o.state[b]["momentum"].mul_(2))
    other.load_state_dict(saved.state_dict())
    assert [other.state[p]["momentum"].item() for p in (a, b)] == [1.0, 10.0]
