"""Deep momentum (Eq. 50): the memory's own training is a gradient step of `memory.MLPMemory`."""

import pytest
import torch
from torch import nn

from nestlearn.errors import UserError
from nestlearn.memory import MLPMemory, objectives
from nestlearn.optim import DeepMomentum


def gradients(count, shape=(6, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def run(grads, **kwargs):
    p = nn.Parameter(torch.zeros(grads[0].shape, dtype=torch.float64))
    optimizer = DeepMomentum([p], **{"lr": 0.1, "hidden": 7, **kwargs})
    start = {key: value.clone() for key, value in optimizer.state[p].items()}
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), start


@pytest.mark.parametrize("name", ["l2", "dot"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_equals_autograd_on_the_memory(name, inner_steps):
    """The printed update, the memory's gradients by autograd, each divided by the input's squared norm."""
    grads, objective = gradients(6), objectives.get(name)
    result, start = run(grads, momentum=0.9, inner_lr=0.3, inner_steps=inner_steps, objective=name)
    w1, w2, w = start["w1"], start["w2"], torch.zeros(6, 5, dtype=torch.float64)
    for g in grads:
        k = g / g.square().mean().sqrt()
        w1 = 0.9 * w1
        for _ in range(inner_steps):
            w1.requires_grad_(), w2.requires_grad_()
            h = nn.functional.silu(k @ w2.mT)
            loss = objective.value(h @ w1.mT, -k).sum()
            d1, d2 = torch.autograd.grad(loss, (w1, w2))
            w1 = (w1 - 0.3 * d1 / h.square().sum()).detach()
            w2 = (w2 - 0.3 * d2 / k.square().sum()).detach()
        w = w + 0.1 * nn.functional.silu(k @ w2.mT) @ w1.mT
    torch.testing.assert_close(result, w, rtol=1e-10, atol=1e-12)


def test_the_first_read_descends():
    """From a zero output layer one inner step makes the memory answer against the gradient."""
    (g,) = gradients(1, (40, 5))
    moved, _ = run([g])
    assert (moved * g).sum() < 0


def test_the_memory_learns_to_answer_minus_the_gradient():
    g = gradients(1, (40, 5))[0]
    p = nn.Parameter(torch.zeros(40, 5, dtype=torch.float64))
    optimizer = DeepMomentum([p], lr=0.0, momentum=1.0)
    for _ in range(500):
        p.grad = g.clone()
        optimizer.step()
    state, k = optimizer.state[p], g / g.square().mean().sqrt()
    answer = MLPMemory(5, 5, 64, skip=False).read((state["w1"], state["w2"]), k)
    assert ((answer + k).norm() / k.norm()).item() < 0.2


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_update_does_not_depend_on_the_size_of_the_gradient(scale):
    grads = gradients(8)
    torch.testing.assert_close(run([scale * g for g in grads])[0], run(grads)[0], rtol=1e-7, atol=1e-9)


def test_zero_gradients_and_a_long_run_stay_finite():
    moved, _ = run([torch.zeros(6, 5).double()] * 3 + gradients(300) + [torch.zeros(6, 5).double()] * 3, inner_lr=1.0)
    assert moved.isfinite().all()


def test_values_of_ones_choice():
    grads = gradients(5)
    assert torch.equal(run(grads, value=lambda k: k)[0], run(grads)[0])
    assert not torch.allclose(run(grads, value=torch.sign)[0], run(grads)[0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"inner_steps": 1.5}, "inner_steps=1.5"),
        ({"inner_lr": 3.0}, "inner_lr=3.0"),
        ({"objective": "ll2"}, "did you mean 'l2'"),
        ({"output": "sgn"}, "did you mean 'sign'"),
    ],
)
def test_mistakes_are_one_line(wrong, words):
    with pytest.raises(UserError, match=words):
        DeepMomentum([nn.Parameter(torch.zeros(2, 2))], **wrong)
