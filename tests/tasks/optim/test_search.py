"""The search: equal effort for every optimizer, on fake runs whose best learning rate is known."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from nestlearn.tasks.cells import Cell
from nestlearn.tasks.optim import search as module
from nestlearn.tasks.optim.search import Effort, grid, search, summary

CENTRE = 0.01
STEP = 0.5  # decades between two points


class Fake:
    """Runs whose loss is the squared distance, in decades, to an optimum; above ``limit`` they diverge."""

    def __init__(self, optima: dict[str, float], limit: float = math.inf) -> None:
        self.optima, self.limit = optima, limit
        self.made: list[tuple[str, str, float, int]] = []

    def make(self, setting: str, name: str, lr: float, seed: int) -> Cell:
        self.made.append((setting, name, lr, seed))
        return Cell(f"{setting}-{name}-{lr:g}-{seed}", dict, {"name": name, "lr": lr, "seed": seed})

    def run(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        return {cell.name: self.result(**cell.arguments) for cell in cells}

    def result(self, name: str, lr: float, seed: int) -> dict[str, Any]:
        if lr > self.limit:
            return {"diverged": True}
        loss = (math.log10(lr) - math.log10(self.optima[name])) ** 2 + 0.001 * seed
        return {"validation_loss": loss, "curve": [[1, loss]], "diverged": False}


@pytest.fixture(autouse=True)
def _centres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CENTRES, "fake", dict.fromkeys(["a", "b"], CENTRE))


@pytest.mark.parametrize(
    ("optimum", "points", "edge"),
    [(0.011, 5, False), (0.1, 6, False), (0.3, 7, False), (3.0, 7, True), (1e-3, 6, False), (1e-6, 7, True)],
)
def test_all_get_as_many_points_as_the_one_at_its_edge(optimum: float, points: int, edge: bool) -> None:
    fake = Fake({"a": CENTRE, "b": optimum})
    found = search("fake", ["x"], ["a", "b"], fake.make, fake.run, Effort(points=5))["x"]
    assert Counter(name for _, name, _, seed in fake.made if seed == 0) == {"a": points, "b": points}
    assert Counter(name for _, name, _, seed in fake.made if seed) == {"a": 2, "b": 2}
    assert len(set(fake.made)) == len(fake.made)  # nothing twice
    assert found["b"]["at_edge"] is edge
    assert not found["a"]["at_edge"]
    assert found["a"]["lr"] == CENTRE
    assert {f["extended"] for f in found.values()} == {points - 5}
    rates = [rate for rate, _ in found["b"]["grid"]]
    assert len(rates) == points
    assert found["b"]["lr"] == min(rates, key=lambda rate: abs(math.log10(rate / optimum)))


def test_settings_are_extended_on_their_own() -> None:
    fakes = {"x": Fake({"a": CENTRE, "b": CENTRE}), "y": Fake({"a": CENTRE, "b": 1.0})}

    def run(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        return {cell.name: fakes[cell.name[0]].result(**cell.arguments) for cell in cells}

    found = search("fake", ["x", "y"], ["a", "b"], fakes["x"].make, run, Effort(points=3))
    assert {(s, n): len(f["grid"]) for s, names in found.items() for n, f in names.items()} == {
        ("x", "a"): 3,
        ("x", "b"): 3,
        ("y", "a"): 5,
        ("y", "b"): 5,
    }


def test_divergence_is_worse_than_anything() -> None:
    fake = Fake({"a": 1.0, "b": CENTRE}, limit=0.05)
    found = search("fake", ["x"], ["a", "b"], fake.make, fake.run, Effort(points=5))["x"]
    assert found["a"]["lr"] == 0.032
    assert found["a"]["grid"][-1] == [0.1, None]
    nothing = Fake({"a": 1.0, "b": 1.0}, limit=0.0)
    found = search("fake", ["x"], ["a", "b"], nothing.make, nothing.run, Effort(points=3, extensions=1))["x"]
    assert found["a"]["lr"] is None
    assert found["a"]["runs"] == []
    assert found["a"]["mean"] == {}
    assert found["a"]["grid"][0][0] == pytest.approx(0.001)  # it looked lower
    assert {seed for *_, seed in nothing.made} == {0}


def test_mean_and_spread_are_of_all_seeds() -> None:
    fake = Fake({"a": CENTRE, "b": CENTRE})
    found = search("fake", ["x"], ["a"], fake.make, fake.run, Effort(points=3))["x"]["a"]
    losses = [run["validation_loss"] for run in found["runs"]]
    assert losses == pytest.approx([0, 0.001, 0.002])
    assert found["mean"] == {"validation_loss": pytest.approx(0.001)}
    assert found["spread"] == {"validation_loss": pytest.approx(statistics.stdev(losses))}
    assert found["diverged"] == 0
    one = search("fake", ["x"], ["a"], fake.make, fake.run, Effort(points=3, seeds=(0,)))["x"]["a"]
    assert one["spread"] == {"validation_loss": None}


def test_a_seed_that_diverges_is_counted() -> None:
    runs = [{"validation_loss": 1.0, "diverged": False}, {"diverged": True}]
    found = summary({0.1: runs[0]}, runs[1:], "validation_loss", 0)
    assert found["diverged"] == 1
    assert found["mean"] == {}


@pytest.mark.parametrize("points", [1, 2, 5, 7])
def test_grids_are_half_a_decade_apart(points: int) -> None:
    rates = grid(CENTRE, points)
    assert len(rates) == points
    assert CENTRE in rates
    gaps = [math.log10(b / a) for a, b in itertools.pairwise(rates)]
    assert gaps == pytest.approx([STEP] * (points - 1), abs=0.01)
