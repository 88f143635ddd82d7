"""Parameters that several processes hold in parts (FSDP2) are updated as whole ones are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nestlearn.errors import UserError
from nestlearn.optim import (
    M3,
    DeepMomentum,
    DeltaMomentum,
    FeatureMomentum,
    LevelwiseOptimizer,
    Momentum,
    Muon,
    PreconditionedMomentum,
    matrix_groups,
    periods_of,
)
from nestlearn.optim.base import PIECE
from tests.optim.processes import in_two, met

METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "Momentum": lambda model: Momentum(model.parameters(), lr=0.1, weight_decay=0.1),
    "PreconditionedMomentum": lambda model: PreconditionedMomentum(model.parameters(), lr=0.1),
    "FeatureMomentum": lambda model: FeatureMomentum(model.parameters(), lr=0.1),
    "DeltaMomentum": lambda model: DeltaMomentum(model.parameters(), lr=0.1),
    "Muon": lambda model: Muon(matrix_groups(model), lr=0.02),
    "Muon, learned": lambda model: Muon(matrix_groups(model), lr=0.02, orthogonalization="learned"),
    "M3": lambda model: M3(matrix_groups(model), lr=0.02, chunk_size=2),
    "levelwise": lambda model: LevelwiseOptimizer(Momentum(model.parameters(), lr=0.1), periods_of(model, {"0": 2})),
}
INPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build() -> nn.Sequential:
    """Sizes that two processes cannot share equally, and a matrix of more than one piece of `sweep`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 521), nn.Tanh(), nn.Linear(521, 511), nn.Tanh(), nn.Linear(511, 5))
    assert model[2].weight.numel() > PIECE
    return model.double()


def run(method: str, model: nn.Module, inputs: Tensor) -> list[Tensor]:
    optimizer = METHODS[method](model)
    for _ in range(4):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def part(rank: int, folder: str) -> None:
    with met(rank, folder):
        mesh = init_device_mesh("cpu", (2,))
        inputs = INPUTS[4 * rank :][:4]
        found = {name: run(name, fully_shard(build(), mesh=mesh), inputs) for name in METHODS}
        torch.save(found, f"{folder}/{rank}.pt")
        with pytest.raises(UserError, match="without FSDP"):
            DeepMomentum(fully_shard(build(), mesh=mesh).parameters(), lr=0.1)


def test_parts_are_updated_as_the_whole(tmp_path: Path) -> None:
    for found in in_two(part, tmp_path):
        for method in METHODS:
            for ours, theirs in zip(found[method], run(method, build(), INPUTS), strict=True):
                named = f"{method}: {{}}".format
                torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9, msg=named)
