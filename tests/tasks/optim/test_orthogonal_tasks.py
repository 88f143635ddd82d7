"""Orthogonal tasks: the stream is what Eq. 45 asks for, and the theory of momentum holds on it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from nestlearn.optim import Momentum
from nestlearn.tasks.cells import Cell, run_cells
from nestlearn.tasks.optim.orthogonal_tasks import (
    OPTIMIZERS,
    OVERLAP,
    SETTINGS,
    WIDTH,
    Stream,
    batch_loss,
    cosine,
    learn,
    make_stream,
    make_student,
    memory_of,
    relative_losses,
)


def train_task(stream: Stream, student: nn.Module, optimizer: Optimizer, task: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(task)
    for _ in range(steps):
        optimizer.zero_grad()
        batch_loss(stream, student, task, generator).backward()
        optimizer.step()


@pytest.mark.parametrize("setting", SETTINGS)
def test_subspaces_have_the_stated_angles(setting: str) -> None:
    bases = make_stream(setting, 4, seed=3).bases
    overlap = OVERLAP if setting == "overlap" else 0.0
    for i in range(4):
        for j in range(4):
            wanted = torch.eye(WIDTH, dtype=torch.float64) * (1.0 if i == j else overlap)
            torch.testing.assert_close(bases[i].mT @ bases[j], wanted, atol=1e-12, rtol=0)
    coordinates = bases[0].abs().sum(0)
    assert torch.allclose(coordinates, torch.ones_like(coordinates)) == (setting == "aligned")


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("optimizer", [SGD, Momentum])
def test_momentum_outside_the_task_decays_as_its_power(beta: float, optimizer: type[Optimizer]) -> None:
    stream, student = make_stream("rotated", 3, seed=0), make_student("rotated", 3, seed=0)
    rule = optimizer(student.parameters(), lr=1e-3, momentum=beta)
    weight = next(student.parameters())

    def outside(task: int) -> Tensor:
        memory = memory_of(rule, weight)
        assert memory is not None
        basis = stream.bases[task]
        return (memory - memory @ basis @ basis.mT).norm()

    train_task(stream, student, rule, 0, 20)
    before, memory = outside(1), memory_of(rule, weight)
    assert memory is not None
    torch.testing.assert_close(before, memory.norm())  # nothing of task 1 yet
    for n in range(1, 30):
        train_task(stream, student, rule, 1, 1)
        torch.testing.assert_close(outside(1), before * beta**n, rtol=1e-9, atol=1e-14 * before.item())


@pytest.mark.parametrize("setting", ["aligned", "rotated"])
def test_without_momentum_nothing_orthogonal_is_forgotten(setting: str) -> None:
    stream, student = make_stream(setting, 3, seed=1), make_student(setting, 3, seed=1)
    optimizer = SGD(student.parameters(), lr=1e-2)
    train_task(stream, student, optimizer, 0, 100)
    learned = relative_losses(setting, stream, student)
    train_task(stream, student, optimizer, 1, 100)
    later = relative_losses(setting, stream, student)
    assert learned[0] < 0.05
    assert learned[1:] == pytest.approx([1.0, 1.0], abs=1e-12)
    assert later[0] == pytest.approx(learned[0], rel=1e-9)
    assert later[1] < 0.05


def test_an_overlap_is_forgotten_and_can_be_avoided() -> None:
    stream, student = make_stream("overlap", 2, seed=1), make_student("overlap", 2, seed=1)
    optimizer = SGD(student.parameters(), lr=5e-3)
    train_task(stream, student, optimizer, 0, 200)
    learned = relative_losses("overlap", stream, student)[0]
    train_task(stream, student, optimizer, 1, 200)
    assert relative_losses("overlap", stream, student)[0] > learned + 0.02
    weight = next(student.parameters())
    bases = torch.cat(list(stream.bases), dim=1)
    teachers = torch.cat([next(teacher.parameters()) for teacher in stream.teachers], dim=1)
    weight.data.copy_(teachers @ torch.linalg.pinv(bases))  # one matrix solves both tasks
    assert relative_losses("overlap", stream, student) == pytest.approx([0, 0], abs=1e-20)


@pytest.mark.parametrize("setting", ["rotated", "mlp"])
def test_relative_losses_are_means_over_samples(setting: str) -> None:
    stream, student = make_stream(setting, 2, seed=2), make_student(setting, 2, seed=2)
    for p in student.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    generator = torch.Generator().manual_seed(11)
    xi = torch.randn(20_000, WIDTH, generator=generator, dtype=torch.float64)
    for task, loss in enumerate(relative_losses(setting, stream, student)):
        target = stream.teachers[task](xi)
        error = student(xi @ stream.bases[task].mT) - target
        assert (error.square().sum() / target.square().sum()).item() == pytest.approx(loss, rel=0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cells_of_every_optimizer(optimizer: str) -> None:
    result = learn(optimizer, 3e-3, 0, "rotated", tasks=3, steps=10)
    losses = result["losses"]
    assert [len(row) for row in losses] == [3, 3, 3]
    assert result["validation_loss"] == pytest.approx(sum(losses[-1]) / 3)
    assert (result["first_task"], result["last_task"]) == (losses[2][0], losses[2][2])
    forgotten = (losses[2][0] - losses[0][0] + losses[2][1] - losses[1][1]) / 2
    assert result["forgetting"] == pytest.approx(forgotten)
    assert losses[0][0] < 1 or optimizer == "deep-momentum"
    assert (result["memory"] is None) == (optimizer == "deep-momentum")
    if result["memory"]:
        assert [step for step, _ in result["memory"]] == [5, 10, 15, 20, 25, 30]
        assert result["memory"][1][1] == pytest.approx(1, abs=1e-6) or optimizer == "adamw"
        assert all(0 <= value <= 1 + 1e-9 for _, value in result["memory"])
    assert learn(optimizer, 3e-3, 0, "rotated", tasks=3, steps=10) == result
    assert learn(optimizer, 3e-3, 1, "rotated", tasks=3, steps=10) != result


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "delta-momentum"])  # one of torch, one of ours
def test_divergence_is_a_result(tmp_path: Path, optimizer: str) -> None:
    arguments = dict(optimizer=optimizer, lr=1e6, seed=0, setting="rotated", tasks=2, steps=60)
    result = run_cells([Cell("x", learn, arguments)], tmp_path)["x"]
    assert result == {"diverged": True}


def test_cosine_of_a_momentum() -> None:
    basis = torch.eye(4, dtype=torch.float64)[:, :2]
    memory = torch.tensor([[3.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    assert cosine(memory, basis) == pytest.approx(0.6)
    assert cosine(torch.zeros(1, 4, dtype=torch.float64), basis) == 0
