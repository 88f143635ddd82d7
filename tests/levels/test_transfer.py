"""Section 3.3: knowledge moves, and gradients flow where the paper says and nowhere else."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.levels import adapt, descend, direct, generate_weights, initialisation
from nestlearn.nn import ContinuumMemory
from nestlearn.optim import LevelwiseOptimizer, periods_of

WIDE = torch.float64


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


# Direct


def test_direct_parametric_reads_a_memory_and_sends_no_gradient_back() -> None:
    """Eq. 24-26: y = M_t(W_q x); W_q learns, the memory does not, and what it stored is what is read."""
    k, v, w_q, w_k = randn(4, seed=1), randn(3, seed=2), randn(4, 4, seed=3, grad=True), randn(4, 4, seed=4, grad=True)
    key = F.normalize(w_k @ k, dim=0)
    memory = torch.outer(v, key)  # written by the other block, whose gradient would reach W_k
    read = direct(lambda x, m: m @ (w_q @ x), k, memory)
    read.sum().backward()
    assert w_k.grad is None
    assert w_q.grad is not None
    assert w_q.grad.abs().max() > 0
    assert torch.allclose(direct(lambda x, m: m @ x, key, memory), v)  # the knowledge did move


def test_direct_from_an_output_and_from_nested_states() -> None:
    """Eq. 25: the fast block's output is the slow block's knowledge; states may be tuples and dictionaries."""
    fast, slow = nn.Linear(2, 3), nn.Linear(3, 1)
    direct(lambda x, h: slow(h) + x, torch.zeros(1), fast(torch.ones(2))).backward()
    assert fast.weight.grad is None
    assert slow.weight.grad is not None
    w = torch.ones(2, requires_grad=True)
    state = {"memories": (w * 2, [w + 1]), "steps": 3}
    seen = direct(lambda x, s: s, None, state)
    assert seen["steps"] == 3
    assert not any(t.requires_grad for t in (seen["memories"][0], seen["memories"][1][0]))
    assert torch.equal(seen["memories"][0], 2 * w)


def test_direct_from_a_state_of_this_package() -> None:
    memory, x = ContinuumMemory(4, [2, 4], online="local"), torch.ones(1, 3, 4)
    state = memory(x)[1]
    direct(lambda x, s: memory(x, s)[0].sum(), x, state).backward()
    through = {name for name, p in memory.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    memory.zero_grad()
    memory(x, state.detach())[0].sum().backward()
    assert through == {name for name, p in memory.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert direct(lambda _, s: s.levels[0].weights[0].requires_grad, x, state) is False


def test_direct_non_parametric_reads_the_context() -> None:
    """Eq. 27: attention over another block's context finds the value of a key, and that block learns nothing."""
    tokens, w_kv, w_q = 10 * torch.eye(4, dtype=WIDE), randn(4, 4, seed=1, grad=True), torch.eye(4, dtype=WIDE)
    w_q.requires_grad_()
    context = (tokens, tokens @ w_kv)

    def attention(x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = keys_values
        return F.scaled_dot_product_attention((x @ w_q)[None], keys[None], values[None])[0]

    read = direct(attention, tokens[2:3], context)
    assert torch.allclose(read, context[1][2:3], atol=1e-8)
    read.sum().backward()
    assert w_kv.grad is None
    assert w_q.grad is not None


# Backpropagation at different frequencies


def two_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(WIDE)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(randn(5, 3, seed=i), randn(5, 2, seed=100 + i)) for i in range(count)]


def composite(model: nn.Module):  # type: ignore[no-untyped-def]
    return lambda p, batch: F.mse_loss(functional_call(model, p, (batch[0],)), batch[1])


def test_equal_frequencies_are_sgd_on_the_composite() -> None:
    model, data = two_blocks(), batches(6)
    found = descend(composite(model), dict(model.named_parameters()), data, lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p, rtol=0, atol=1e-14), name


def test_each_block_applies_the_one_gradient_flow_at_its_own_frequency() -> None:
    """Eq. 71, and the optimizer for real training gives the same numbers."""
    model, data = two_blocks(), batches(7)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = [descend(composite(model), start, data[:n], lr=0.1, periods={"0": 3}) for n in range(1, 8)]
    slow = [a["0.weight"] for a in after]
    assert torch.equal(slow[0], start["0.weight"])
    assert torch.equal(slow[1], start["0.weight"])
    assert not torch.equal(slow[2], slow[1])
    assert torch.equal(slow[3], slow[2])
    fast = [start["2.weight"], *(a["2.weight"] for a in after)]
    assert all(not torch.equal(a, b) for a, b in pairwise(fast))
    optimizer = LevelwiseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), periods_of(model, {"0": 3}))
    for x, y in data:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(after[-1][name], p, rtol=0, atol=1e-14), name


def test_the_gradient_of_the_slow_block_is_the_printed_one() -> None:
    """Theta_0 -= eta delta_0 x^T with delta_0 = J^T Theta_1^T delta_1, the gradient flow through the fast block."""
    w0, w1, x, y = randn(4, 3, seed=1), randn(2, 4, seed=2), randn(3, seed=3), randn(2, seed=4)
    found = descend(
        lambda p, c: (p["1"] @ torch.tanh(p["0"] @ c[0]) - c[1]).square().sum() / 2, {"0": w0, "1": w1}, [(x, y)], 0.1
    )
    h = torch.tanh(w0 @ x)
    delta1 = w1 @ h - y
    delta0 = (1 - h.square()) * (w1.mT @ delta1)
    assert torch.allclose(found["1"], w1 - 0.1 * torch.outer(delta1, h))
    assert torch.allclose(found["0"], w0 - 0.1 * torch.outer(delta0, x))


def test_descend_leaves_its_input_alone_and_works_without_gradients() -> None:
    model, data = two_blocks(), batches(4)
    before = copy.deepcopy(model.state_dict())
    expected = descend(composite(model), dict(model.named_parameters()), data, 0.1, {"2": 2})
    with torch.no_grad():
        found = descend(composite(model), dict(model.named_parameters()), data, 0.1, {"2": 2})
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(found[name], expected[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        ({"0": 0}, "the period of '0' is 0: it must be a whole number of steps, 1 or more"),
        ({"0": 2.0}, "the period of '0' is 2.0"),
        ({"frist": 2}, "no block or parameter is called 'frist'; did you mean 'first'?"),
        ({"first": 2, "first.weight": 3}, "'first.weight' has two periods, one of them by 'first.weight'"),
    ],
)
def test_periods_that_are_refused(periods: dict, message: str) -> None:
    parameters = {"0.weight": randn(1), "first.weight": randn(1)}
    with pytest.raises(UserError, match=message):
        descend(lambda p, c: p["0.weight"].sum(), parameters, [0], 0.1, periods)


# Initialisation


def task(amplitude: float, phase: float, seed: int, count: int) -> tuple[Tensor, Tensor]:
    x = 10 * torch.rand(count, 1, dtype=WIDE, generator=torch.Generator().manual_seed(seed)) - 5
    return x, amplitude * torch.sin(x + phase)


def sinusoids(seed: int, count: int = 5, shots: int = 10) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Tasks of the family of Finn et al.: amplitudes of 0.1 to 5, phases of 0 to pi."""
    draw = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    shapes = [(0.1 + 4.9 * a, math.pi * p) for a, p in draw]
    return [
        (task(*shape, 1000 * seed + i, shots), task(*shape, 1000 * seed + 500 + i, shots))
        for i, shape in enumerate(shapes)
    ]


def regressor(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
    return nn.Sequential(*layers).to(WIDE)


def test_without_inner_steps_it_is_ordinary_training() -> None:
    model, tasks = regressor(6), sinusoids(0)
    initialisation(model, tasks, F.mse_loss, lr=0.1, steps=0).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.stack([F.mse_loss(model(x), y) for _, (x, y) in tasks]).mean().backward()
    assert len(found) == 6
    for gradient, p in zip(found, model.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)


@pytest.mark.parametrize("periods", [None, {"4": 2}])
def test_the_outer_gradient_is_that_of_finite_differences(periods: dict[str, int] | None) -> None:
    model, tasks = regressor(3), sinusoids(1, count=2, shots=4)

    def outer(flat: Tensor) -> Tensor:
        moved = copy.deepcopy(model)
        nn.utils.vector_to_parameters(flat, moved.parameters())
        return initialisation(moved, tasks, F.mse_loss, 0.05, 3, periods).detach()

    initialisation(model, tasks, F.mse_loss, 0.05, 3, periods).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    step = 1e-6 * torch.eye(len(flat), dtype=WIDE)
    expected = torch.stack([(outer(flat + e) - outer(flat - e)) / 2e-6 for e in step])
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_first_order_goes_past_the_inner_updates() -> None:
    """Its outer gradient is that of the query loss at the adapted parameters, which the full one is not."""
    model, tasks = regressor(4), sinusoids(2, count=1)
    initialisation(model, tasks, F.mse_loss, lr=0.1, steps=2, first_order=True).backward()
    (support, (x, y)) = tasks[0]
    fast = {n: p.detach().requires_grad_() for n, p in adapt(model, support, F.mse_loss, 0.1, 2).items()}
    expected = torch.autograd.grad(F.mse_loss(functional_call(model, fast, (x,)), y), list(fast.values()))
    first = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    for found, gradient in zip(first, expected, strict=True):
        assert torch.allclose(found, gradient)
    model.zero_grad()
    initialisation(model, tasks, F.mse_loss, lr=0.1, steps=2).backward()
    assert any(not torch.allclose(a, p.grad) for a, p in zip(first, model.parameters(), strict=True))  # type: ignore[arg-type]


def after_adaptation(start: nn.Module, steps: int, lr: float) -> float:
    """Mean loss on 40 tasks that no training has seen, after so many inner steps."""
    losses = []
    for support, (x, y) in map(narrow, sinusoids(99_999, count=40)):
        fast = adapt(start, support, F.mse_loss, lr, steps)
        losses.append(F.mse_loss(functional_call(start, fast, (x,)), y).item())
    return sum(losses) / len(losses)


def narrow(task: tuple) -> tuple:
    return tuple(tuple(t.float() for t in pair) for pair in task)


@pytest.mark.parametrize(("first_order", "steps"), [(False, 1), (True, 3)])
def test_a_learned_start_learns_a_sinusoid_faster_than_a_random_one(first_order: bool, steps: int) -> None:
    model = regressor(32).float()
    random = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for i in range(300):
        optimizer.zero_grad()
        tasks = map(narrow, sinusoids(i, count=4))
        initialisation(model, tasks, F.mse_loss, 0.05, steps, first_order=first_order).backward()
        optimizer.step()
    learned = after_adaptation(model, steps, 0.05)
    assert learned < 0.6 * after_adaptation(model, 0, 0.05)  # it is the adaptation that makes it good
    # The random start may choose its step size and take more steps.
    others = [after_adaptation(random, n, lr) for lr in (0.003, 0.01, 0.03, 0.1) for n in (1, 3, 10)]
    assert learned < 0.5 * min(others)


def test_frozen_parameters_are_no_part_of_the_start() -> None:
    model, (support, _) = regressor(3), sinusoids(0, count=1)[0]
    model[0].requires_grad_(False)
    fast = adapt(model, support, F.mse_loss, lr=0.1)
    assert sorted(fast) == ["2.bias", "2.weight", "4.bias", "4.weight"]


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_steps_that_are_refused(steps: object) -> None:
    with pytest.raises(UserError, match="it must be a whole number of updates, 0 or more"):
        adapt(regressor(2), task(1, 0, 0, 3), F.mse_loss, 0.1, steps)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is learned from tasks, and none is given"):
        initialisation(regressor(2), [], F.mse_loss, 0.1)


# Generation


def test_a_constant_generator_is_a_static_layer() -> None:
    block = nn.Linear(3, 2).to(WIDE)
    flat = nn.utils.parameters_to_vector(block.parameters()).detach()
    for seed in range(3):
        weights = generate_weights(block, lambda c: flat, randn(5, seed=seed))
        x = randn(4, 3, seed=seed)
        assert torch.equal(functional_call(block, weights, (x,)), block(x))


def test_gradients_flow_through_the_generator_and_into_the_knowledge_alone() -> None:
    block, generator = nn.Linear(3, 2).to(WIDE), nn.Linear(5, 8).to(WIDE)
    knowledge, x = randn(5, grad=True), randn(4, 3, seed=1)
    weights = generate_weights(block, generator, knowledge)
    functional_call(block, weights, (x,)).square().sum().backward()
    assert all(p.grad is None for p in block.parameters())
    assert knowledge.grad is not None
    y = functional_call(block, {n: w.detach() for n, w in weights.items()}, (x,))
    by_hand = torch.cat([(2 * y.mT @ x).flatten(), 2 * y.sum(0)])  # dL/dTheta
    assert torch.allclose(generator.weight.grad, torch.outer(by_hand, knowledge.detach()))  # type: ignore[arg-type]
    assert torch.allclose(knowledge.grad, generator.weight.detach().mT @ by_hand)


def test_a_generator_learns_a_family_of_layers() -> None:
    """Knowledge did move: given only c, the generated layer computes c x, for c that was never seen."""
    torch.manual_seed(0)
    block, generator = nn.Linear(2, 2, bias=False), nn.Linear(1, 4)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.05)
    for _ in range(300):
        c, x = torch.rand(1), torch.randn(16, 2)
        optimizer.zero_grad()
        F.mse_loss(functional_call(block, generate_weights(block, generator, c), (x,)), c * x).backward()
        optimizer.step()
    x = torch.randn(8, 2)
    made = functional_call(block, generate_weights(block, generator, torch.tensor([1.5])), (x,))
    assert torch.allclose(made, 1.5 * x, atol=0.05)


def test_a_generator_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"made \(7,\) for a Linear of 8 weights: it must give one vector of 8"):
        generate_weights(nn.Linear(3, 2), lambda c: torch.zeros(7), None)
