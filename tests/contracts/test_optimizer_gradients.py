"""Gradients that are not finite are refused by name, and no step waits for a device: over every optimizer."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestlearn import optim
from nestlearn.optim import NotFiniteGradient, base
from tests.contracts.optimizer_cases import Small, batches, equal, steps


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_refused_by_name_before_anything_changes(make, bad):
    model = Small()
    optimizer = make(model)
    steps(model, optimizer, batches(2))
    weights, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    model.loss(batches(1)[0]).backward()
    model.hidden.weight.grad[3, 5] = bad
    with pytest.raises(NotFiniteGradient, match=r"'hidden\.weight' is not finite"):
        optimizer.step()
    assert equal(model, weights)
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][key]) for key, value in entry.items())


def test_without_names_a_parameter_is_named_by_its_place():
    p = nn.Parameter(torch.zeros(2, 3))
    optimizer = optim.Momentum([p])
    p.grad = torch.full((2, 3), math.nan)
    with pytest.raises(NotFiniteGradient, match=r"parameter 0 of group 0, shape \(2, 3\)"):
        optimizer.step()


def test_large_finite_gradients_are_not_refused():
    p = nn.Parameter(torch.zeros(1000))
    p.grad = torch.full((1000,), 1e38)  # their sum is not finite in float32
    optim.Momentum([p], lr=1e-30).step()
    assert p.isfinite().all()


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1.0, 1e15, 1e20, 1e36])
def test_no_size_of_gradients_spoils_the_weights(make, size, on_cpu, monkeypatch):
    """From the smallest float32 to squares that overflow: a step is taken or the gradient is refused."""
    if not on_cpu:
        monkeypatch.setattr(base, "_on_cpu", lambda tensors: False)
        monkeypatch.setattr(base, "_copy_to_host", lambda flags: (flags.clone(), lambda: None))
    model = Small()
    optimizer = make(model)
    before = copy.deepcopy(model)
    refused = optimizer._squares and size > 1e19
    expected = pytest.raises(NotFiniteGradient, match="too large to be squared") if refused else nullcontext()
    with expected:
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p) * size
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    if size < 1:  # what is smaller than the weights moves them by what the rule allows, never by more
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        assert max((p - q).abs().max().item() for p, q in pairs) < 0.5


def test_on_an_accelerator_the_refusal_comes_a_step_later_and_nothing_is_spoiled(make, monkeypatch):
    """The path that waits for no device, walked on a CPU."""
    monkeypatch.setattr(base, "_on_cpu", lambda tensors: False)
    monkeypatch.setattr(base, "_copy_to_host", lambda flags: (flags.clone(), lambda: None))
    model = Small()
    optimizer = make(model)
    steps(model, optimizer, batches(2))
    model.hidden.weight.grad[0, 0] = math.nan
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(NotFiniteGradient, match=r"'hidden\.weight'.*zero gradients"):
        optimizer.step()
    steps(model, optimizer, batches(2))
    assert all(p.isfinite().all() for p in model.parameters())


class NoWaiting(TorchDispatchMode):
    """Fails when a tensor other than the given counters is read by the host."""

    def __init__(self, counters):
        super().__init__()
        self.allowed = {c.data_ptr() for c in counters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            assert args[0].data_ptr() in self.allowed, "the host reads a tensor of the device"
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_no_device(make, monkeypatch):
    """Only step counters, which stay on the host, are read; the check of the gradients is that of an accelerator."""
    monkeypatch.setattr(base, "_on_cpu", lambda tensors: False)
    monkeypatch.setattr(base, "_copy_to_host", lambda flags: (flags.clone(), lambda: None))
    model = Small()
    optimizer = make(model, weight_decay=0.1)
    steps(model, optimizer, batches(1))
    model.loss(batches(1)[0]).backward()
    counters = [state["step"] for state in optimizer.state.values() if "step" in state]
    optimizer._pending = None
    with NoWaiting(counters):
        optimizer.step()
