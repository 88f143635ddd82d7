"""LevelUpdate: a chunk's step is that of the optimizer of its name, and what bounds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestlearn.errors import UserError
from nestlearn.nn import LevelUpdate
from nestlearn.optim import M3, DeltaMomentum

OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "delta-momentum": lambda p, lr: DeltaMomentum(p, lr=lr),
    "m3": lambda p, lr: M3(p, lr=lr),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_is_the_optimizer_of_its_name_in_every_row(rule: str, shape: tuple[int, int]) -> None:
    update = LevelUpdate(rule, lr=0.05, clip=None, norm_limit=None)
    w0, rate = draw(*shape), torch.tensor(0.05, dtype=torch.float64)
    weights: Any = (w0,)
    slots: Any = ((),)
    parameters = [nn.Parameter(w0.clone()) for _ in range(2)]
    optimizers = [OPTIMIZERS[rule]([p], 0.05) for p in parameters]
    for t in range(25):
        g = draw(2, *shape, seed=t + 1) * (1 + t % 3)
        weights, slots = update.step(weights, (g,), slots, rate, (w0,), tokens=4)
        for parameter, gradient, optimizer in zip(parameters, g, optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    for row, parameter in zip(weights[0], parameters, strict=True):
        torch.testing.assert_close(row, parameter.detach(), rtol=1e-6, atol=1e-6)


def test_mean_divides_by_the_tokens_of_the_chunk() -> None:
    rate, w, g = torch.tensor(1.0), torch.ones(2, 2), torch.ones(1, 2, 2)
    step = lambda how: LevelUpdate(reduction=how, clip=None, norm_limit=None).step((w,), (g,), ((),), rate, (w,), 4)  # noqa: E731
    assert torch.equal(step("sum")[0][0], torch.zeros(1, 2, 2))
    assert torch.equal(step("mean")[0][0], torch.full((1, 2, 2), 0.75))


def test_clip_and_norm_limit_are_frobenius_norms_of_each_row() -> None:
    w0, rate = torch.eye(2), torch.tensor(10.0)
    g = torch.stack([100 * torch.ones(2, 2), 0.01 * torch.ones(2, 2)])
    (w,), _ = LevelUpdate(clip=0.5, norm_limit=None).step((w0,), (g,), ((),), rate, (w0,), 1)
    torch.testing.assert_close((w - w0).norm(dim=(-2, -1)), torch.tensor([5.0, 0.2]))
    (w,), _ = LevelUpdate(clip=None, norm_limit=0.25).step((w0,), (g,), ((),), rate, (w0,), 1)
    torch.testing.assert_close((w - w0).norm(dim=(-2, -1)), torch.tensor([0.25, 0.2]) * torch.tensor([2**0.5, 1]))


@pytest.mark.parametrize("rule", ["sgd", "delta-momentum", "m3"])
def test_a_zero_error_has_finite_derivatives(rule: str) -> None:
    w0 = draw(2, 3).requires_grad_()
    g = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)
    (w,), _ = LevelUpdate(rule).step((w0,), (g,), ((),), torch.tensor(0.1, dtype=torch.float64), (w0,), 1)
    assert all(d.isfinite().all() for d in torch.autograd.grad(w.sum(), [w0, g]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "dgdd"}, "unknown rule 'dgdd' of a level: did you mean 'dgd'"),
        ({"reduction": "men"}, "did you mean 'mean'"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"norm_limit": float("inf")}, "norm_limit=inf"),
    ],
)
def test_rejects_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        LevelUpdate(**options)
    assert "\n" not in str(error.value)
