"""What `DGD`, `GGD` and `GeneralizedMomentum` share: batches in parts, state, refusals, copies, learning, processes."""

from __future__ import annotations

import copy
import gc
import gzip
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nestlearn.memory import objectives
from nestlearn.optim.base import NotFiniteGradient
from nestlearn.optim.descent import DGD, GGD
from nestlearn.optim.generalized import GeneralizedMomentum
from tests.optim.processes import in_two, met

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 2, 2)
    ).double()


TOKENS = torch.randint(7, (8, 3), generator=torch.Generator().manual_seed(0))
METHODS = {
    "DGD": lambda model, **more: DGD(model, lr=0.1, **more),
    "GGD": lambda model, **more: GGD(model, lr=0.1, steps=2, **more),
    "GM": lambda model, **more: GeneralizedMomentum(model, lr=0.1, **more),
    "GM rows": lambda model, **more: GeneralizedMomentum(model, lr=0.1, objective=objectives.lp(1.5), **more),
}


def run(method: str, *micro_batches: Tensor, steps: int = 3, wrap=lambda model, x: model(x)) -> list[Tensor]:
    model = build()
    optimizer = METHODS[method](model)
    for _ in range(steps):
        for x in micro_batches:
            (wrap(model, x).square().mean() * len(x) / sum(map(len, micro_batches))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up_to_a_batch_and_checkpointing_changes_nothing(method: str) -> None:
    whole = run(method, TOKENS)
    for other in (
        run(method, TOKENS[:3], TOKENS[3:]),
        run(method, TOKENS, wrap=lambda model, x: checkpoint(model, x, use_reentrant=False)),
    ):
        for ours, theirs in zip(other, whole, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(whole, build().parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_what_was_read_is_forgotten_by_step_and_zero_grad(method: str) -> None:
    model = build()
    optimizer = METHODS[method](model)
    model(TOKENS[:1]).sum().backward()
    optimizer.zero_grad()
    model(TOKENS).square().mean().backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), run(method, TOKENS, steps=1), strict=True):
        torch.testing.assert_close(ours.data, theirs, **EXACT)


@pytest.mark.parametrize("method", ["DGD", "GGD"])
def test_parameters_without_an_input_follow_gradient_descent(method: str) -> None:
    """Biases and norms, weights tied to two kinds of layer, and everything once the hooks are gone."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)
            self.head.weight = self.table.weight
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.table(x)))

    def descend(model: nn.Module, close: bool) -> None:
        twin = copy.deepcopy(model)
        optimizer, sgd = METHODS[method](model), torch.optim.SGD(twin.parameters(), lr=0.1)
        if close:
            optimizer.close()
        for _ in range(2):
            for m, o in ((model, optimizer), (twin, sgd)):
                o.zero_grad()
                m(TOKENS).square().mean().backward()
                o.step()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)

    descend(Tied(), close=False)
    descend(build(), close=True)
    model = build()
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    optimizer = METHODS[method](model)
    model(TOKENS).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if n.endswith("bias")}
    optimizer.step()
    for name, p in model.named_parameters():
        if name in biases:
            torch.testing.assert_close(p.data, biases[name] - 0.1 * grads[name], **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_state_schedules_and_closures_work_as_in_torch(method: str) -> None:
    def train(model: nn.Module, optimizer, schedule, steps: int) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(TOKENS).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            loss = optimizer.step(closure)
            schedule.step()
        return loss.item()

    def start() -> tuple:
        model = build()
        optimizer = METHODS[method](model, weight_decay=0.1)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model, optimizer, schedule = start()
    train(model, optimizer, schedule, 2)
    other, resumed, schedule2 = start()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule2.load_state_dict(schedule.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.025
    assert train(model, optimizer, schedule, 2) == train(other, resumed, schedule2, 2)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_is_refused_by_name(method: str) -> None:
    model = build()
    optimizer = METHODS[method](model)
    before = [p.detach().clone() for p in model.parameters()]
    (model(TOKENS) * torch.tensor(math.inf)).sum().backward()
    with pytest.raises(NotFiniteGradient, match=r"'0\.weight'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_weights_follow_the_float32_update(method: str) -> None:
    """One step of a bfloat16 layer is the step of its float32 twin on the same rows, rounded once."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    half = nn.Linear(8, 4, bias=False).bfloat16()
    twin = nn.Linear(8, 4, bias=False)
    twin.weight.data.copy_(half.weight)
    for model, seen in ((half, x), (twin, x.float())):
        optimizer = METHODS[method](model)
        (model(seen) * x[:, :4].to(seen.dtype)).sum().div(16).backward()
        optimizer.step()
    torch.testing.assert_close(half.weight.float(), twin.weight, rtol=2**-7, atol=2**-8)
    assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_a_copied_model_is_free_and_the_model_does_not_keep_the_optimizer(method: str) -> None:
    model = build()
    optimizer = METHODS[method](model)
    twin = copy.deepcopy(model)
    twin(TOKENS[:1]).sum().backward()  # reads nothing into the optimizer of the original
    model(TOKENS).square().mean().backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), run(method, TOKENS, steps=1), strict=True):
        torch.testing.assert_close(ours.data, theirs, **EXACT)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not any(m._forward_hooks for m in model.modules())


def digits(folder: Path) -> tuple[Tensor, Tensor]:
    """1,000 digits of MNIST and their labels."""
    pixels, labels = (
        np.frombuffer(gzip.decompress((folder / "mnist" / f"t10k-{name}-ubyte.gz").read_bytes()), np.uint8, offset=skip)
        for name, skip in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images = torch.tensor(pixels[: 1000 * 784]).view(1000, 1, 28, 28)
    return F.avg_pool2d(images / 255 - 0.13, 2), torch.tensor(labels[:1000]).long()


@pytest.mark.parametrize("method", METHODS)
def test_digits_are_learned(method: str, shared_data: Path) -> None:
    x, y = digits(shared_data)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 10))
    optimizer = METHODS[method](model)
    losses = []
    for epoch in range(4):
        for i in torch.randperm(1000, generator=torch.Generator().manual_seed(epoch)).split(50):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[i]), y[i])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    accuracy = (model(x).argmax(-1) == y).float().mean()
    if method in ("DGD", "GGD"):  # they shrink what each layer says, so the loss stays high: see DGD
        assert sum(losses[-10:]) < 0.92 * sum(losses[:10])
        assert accuracy > 0.55
    else:
        assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
        assert accuracy > 0.85


def replica(rank: int, folder: str) -> None:
    def train(method: str) -> list[Tensor]:
        model = build()
        optimizer = METHODS[method](model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            wrapped(TOKENS[4 * rank :][:4]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    with met(rank, folder):
        torch.save({method: train(method) for method in METHODS}, f"{folder}/{rank}.pt")


def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    for found in in_two(replica, tmp_path):
        for method in METHODS:
            for ours, theirs in zip(found[method], run(method, TOKENS), strict=True):
                torch.testing.assert_close(ours, theirs, **EXACT)
