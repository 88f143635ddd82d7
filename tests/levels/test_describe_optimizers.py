"""describe() with optimizers: their memories stand where Definition 2 puts them, and none is dropped."""

import pytest
import torch
from torch import nn

from nestlearn.levels import FROZEN, Description, UpdateFrequency, describe
from nestlearn.nn import continuum_periods
from nestlearn.optim import DGD, GGD, M3, LevelwiseOptimizer, PreconditionedMomentum, matrix_groups, periods_of
from nestlearn.train.optimizers import BUILDERS, build
from tests.levels.models import OddSGD, hope


def levels(found: Description) -> list[tuple[str, ...]]:
    return [level.names for level in found.system.levels]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8))


def test_gradient_descent_is_one_level_and_momentum_makes_two() -> None:
    model = net()
    assert len(describe(model, torch.optim.SGD(model.parameters(), lr=0.1)).system.levels) == 1
    found = describe(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert levels(found) == [("SGD m",), ("0,2", "3")]
    assert found.system["SGD m"].state == found.parameters
    kinds = {(t.kind, t.source, t.target) for t in found.system.transfers}
    assert ("context generation", "3", "SGD m") in kinds
    assert ("direct", "SGD m", "3") in kinds
    assert found.trained == {"0,2", "3"}


def test_memories_that_read_one_another_are_ordered() -> None:
    model = net()
    amsgrad = describe(model, torch.optim.Adam(model.parameters(), amsgrad=True))
    assert levels(amsgrad)[:2] == [("Adam m", "Adam v"), ("Adam vmax",)]
    rmsprop = describe(model, torch.optim.RMSprop(model.parameters(), momentum=0.9, centered=True))
    assert levels(rmsprop)[:2] == [("RMSprop v", "RMSprop mean"), ("RMSprop m",)]
    scaled = describe(model, PreconditionedMomentum(model.parameters(), lr=0.1))
    assert levels(scaled)[:2] == [("PreconditionedMomentum v",), ("PreconditionedMomentum m",)]


def test_the_slow_momentum_of_m3_is_slower_than_the_weights() -> None:
    model = net()
    found = describe(model, M3(matrix_groups(model), lr=0.02, chunk_size=10))
    names = levels(found)
    assert names[-1] == ("M3 m2",)
    assert found.system["M3 m2"].frequency == UpdateFrequency.every(10)
    assert "M3 m1" in names[0]
    assert "M3 m2" in found.system["0,2.weight"].needs
    assert "M3 m2" not in found.system["0,2.bias"].needs
    assert found.system.level_of("0,2.weight") == 1
    assert sum(box.state or 0 for box in found.system.boxes if box.name.startswith("M3 v")) == found.parameters


def test_of_dgd_the_weights_are_the_memory() -> None:
    model = net()
    found = describe(model, DGD(model, lr=0.1))
    box = next(box for box in found.system.boxes if "delta gradient descent" in box.rule)
    assert box.objective.startswith("1/2 ||W x - u||^2")
    assert box.context == "layer input x -> u = -dL/dy"
    assert box.needs == ()
    several = describe(model, GGD(model, lr=0.1, steps=3))
    assert UpdateFrequency.every(1, updates=3) in {box.frequency for box in several.system.boxes}


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_optimizer_of_a_recipe_is_known(name: str) -> None:
    model = net()
    found = describe(model, build(name, model, 0.01, 0.1))
    assert "not known" not in str(found)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert max(map(len, str(found).splitlines())) <= 140


def test_an_unknown_optimizer_is_listed_by_its_class() -> None:
    model = net()
    optimizer = OddSGD(model.parameters(), lr=0.25, momentum=0.9)
    found = describe(model, optimizer)
    assert levels(found) == [("OddSGD state",), ("0,2", "3")]
    state = found.system["OddSGD state"]
    assert (state.structure, state.rule, str(state.frequency), state.state) == (*["not known"] * 3, None)
    assert found.system["3"].rule == "OddSGD (not known), lr 0.25"
    assert any("OddSGD" in note and "as_memory does not know" in note for note in found.notes)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert describe(model, optimizer).system["OddSGD state"].state == found.parameters


def test_a_setting_without_derivation_is_told() -> None:
    from pytorch_optimizer import Lion

    model = net()
    found = describe(model, Lion(model.parameters(), cautious=True))
    assert "Lion state" in levels(found)[0]
    assert any("cautious" in note for note in found.notes)


def test_groups_with_different_rates_are_different_rows() -> None:
    model = net()
    fast = {"params": model[2].parameters(), "lr": 0.5}
    found = describe(model, torch.optim.SGD([{"params": model[0].parameters()}, fast], lr=0.1, momentum=0.9))
    rules = {box.name: box.rule for box in found.system.boxes}
    assert (rules["0"], rules["2"]) == ("SGD, lr 0.1", "SGD, lr 0.5")
    assert found.system["3"].frequency == FROZEN  # the optimizer does not have it
    assert levels(found) == [("SGD m",), ("0", "2"), ("3",)]
    assert found.system["SGD m"].state == 40 + 72


def test_groups_that_remember_differently_have_their_own_memories() -> None:
    model = net()
    slow = {"params": model[2].parameters(), "momentum": 0.99}
    found = describe(model, torch.optim.SGD([{"params": model[0].parameters()}, slow], lr=0.1, momentum=0.9))
    assert levels(found)[0] == ("SGD m (group 0)", "SGD m (group 1)")
    assert found.system["2"].needs == ("SGD m (group 1)",)


def test_frozen_parameters_and_foreign_ones() -> None:
    model, other = net(), nn.Linear(3, 3)
    model[0].requires_grad_(False)
    found = describe(model, torch.optim.Adam([*model.parameters(), *other.parameters()]))
    assert found.system["0"].frequency == FROZEN
    assert found.system["0"].rule == "none"
    assert "the optimizer also has 2 parameters (12 numbers) of no module" in found.notes


@pytest.mark.parametrize("error", ["sum", "mean", "last"])
def test_levelwise_periods_are_the_frequencies(error: str) -> None:
    model = net()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = describe(model, LevelwiseOptimizer(inner, periods_of(model, {"2": 8}), error=error))
    eighth = UpdateFrequency.every(8)
    assert found.system["2"].frequency == eighth
    assert found.system["0"].frequency == UpdateFrequency.every(1)
    assert found.system["AdamW m, every 8 steps"].frequency == eighth
    assert found.system["AdamW m, every 8 steps"].state == 72
    assert found.system["2"].needs == ("AdamW m, every 8 steps", "AdamW v, every 8 steps")
    gathered = [("error of 8 steps",)] if error != "last" else []
    first = ("AdamW m", "AdamW v", *(name for names in gathered for name in names))
    assert levels(found) == [
        first,
        ("0", "3"),
        ("AdamW m, every 8 steps", "AdamW v, every 8 steps"),
        ("2",),
    ]
    assert found.optimizer == "LevelwiseOptimizer of AdamW"
    if gathered:
        sent = {(t.source, t.target) for t in found.system.transfers if t.kind == "direct"}
        assert ("error of 8 steps", "AdamW m, every 8 steps") in sent
        assert ("2", "error of 8 steps") in {(t.source, t.target) for t in found.system.transfers}


def test_a_wrapper_is_looked_through() -> None:
    from accelerate import Accelerator

    model = net()
    found = describe(model, Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters())))
    assert found.optimizer == "AdamW"
    assert levels(found)[0] == ("AdamW m", "AdamW v")


def test_hope_with_its_levels_at_their_own_frequencies() -> None:
    model = hope(cms_chunk_sizes=[8, 64, 512])
    optimizer = LevelwiseOptimizer(torch.optim.AdamW(model.parameters()), continuum_periods(model, 64))
    found = describe(model, optimizer, tokens_per_step=64)
    frequency = {box.name: box.frequency for box in found.system.boxes}
    assert [frequency[f"model.layers.0-1.memory.levels.{i}"] for i in range(3)] == [
        *(UpdateFrequency.every(1), UpdateFrequency.every(1), UpdateFrequency.every(8))
    ]
    order = [found.system.level_of(f"model.layers.0-1.memory.levels.{i}") for i in range(3)]
    assert order[0] == order[1] < order[2]
    assert found.parameters == sum(p.numel() for p in model.parameters())
