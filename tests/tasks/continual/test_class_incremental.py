"""The task that is made of classes in groups."""

import dataclasses
from pathlib import Path

import pytest

from nestlearn.tasks.continual import class_incremental
from nestlearn.tasks.continual.class_incremental import GRADIENT, IN_CONTEXT, RECIPES, learn_classes, plan, section
from nestlearn.tasks.plan import carry_out, outcomes
from nestlearn.tasks.suite import SCALES


@pytest.mark.parametrize("given", [*GRADIENT.values(), *IN_CONTEXT.values()], ids=[*GRADIENT, *IN_CONTEXT])
def test_a_cell_of_every_method(data: str, given: dict) -> None:
    if given["method"] == "lora":
        pytest.importorskip("peft")
    recipe = RECIPES["smoke"] | dict(classes=5, groups=2, train=3, validation=1, test=2)
    lr = 2 if given["method"] in class_incremental.CHOSEN else 1e-3
    result = learn_classes(name="clinc150", lr=lr, seed=0, data=data, **(recipe | given))
    groups = 1 if given.get("joint") else 2
    assert len(result["curve"]) == len(result["accuracies"]) == groups
    assert result["average"] == result["curve"][-1] == pytest.approx(sum(result["accuracies"][-1]) / 2)
    assert 0 <= result["validation_error"] <= 100
    assert (result["parameters"] == 0) == (given["method"] in class_incremental.CHOSEN)
    assert (result["forgetting"] is None) == bool(given.get("joint"))


@pytest.mark.parametrize("scale", SCALES)
def test_plans_search_alike_and_say_what_is_missing(scale: str, data: str) -> None:
    whole = plan(scale, None)
    assert {row.reason for row in whole.rows if row.setting == "clinc150"} == {
        "no data was given: --data DIR with clinc150/data_full.json"
    }
    assert {len(whole.rates_of(n)) for n in range(len(whole.rows))} == {len(whole.rates)}
    names = {row.model for row in whole.rows}
    assert {"hope, 1 level", "hope, 4 levels", "icl", "inca", "ewc", "lora", "joint training"} <= names


def test_the_section_names_every_method(data: str, tmp_path: Path) -> None:
    whole = plan("smoke", data)
    few = [row for row in whole.rows if row.model in ("hope, 2 levels", "icl", "joint training")]
    small = dataclasses.replace(whole, rows=few)
    carry_out(small, tmp_path, 1)
    text = section(outcomes(small, tmp_path), tmp_path)
    assert "| hope, 2 levels |" in text
    assert "| joint training |" in text
    assert (tmp_path / "class-incremental.png").stat().st_size > 5000
    assert "not run" in section(outcomes(plan("smoke", None), tmp_path / "empty"), tmp_path)
