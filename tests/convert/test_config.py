"""The configuration says in one line what it does not take."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.convert import Level, LevelsConfig
from nestlearn.convert.config import default_rate
from nestlearn.errors import UserError


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"period": 0}, "period=0"),
        ({"period": 1.5}, "period=1.5"),
        ({"period": True}, "period=True"),
        ({"lr": -1e-4}, "lr=-0.0001"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"rule": "adam"}, "did you mean 'adamw'"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"retention": 1.1}, "retention=1.1"),
        ({"budget": 0.0}, "budget=0.0"),
    ],
)
def test_a_wrong_number_of_a_level_is_refused(change: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        Level(**{"period": 4, "lr": 1e-4, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "depth"}, "did you mean 'depthwise'"),
        ({"levels": ()}, "give one Level or more"),
        ({"levels": (Level(8, 1.0), Level(4, 1.0))}, "8,4 of the levels are not ordered fast to slow: give 4,8"),
        ({"levels": (8, 4)}, "give one Level or more"),
        ({"layers": "early"}, "allowed: all, late"),
        ({"layers": []}, "list of indices"),
        ({"layers": [1, 1]}, "twice"),
        ({"layers": [1.0]}, "list of indices"),
    ],
)
def test_a_wrong_configuration_is_refused(change: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        LevelsConfig(**change)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kinds": "split"}, "did you mean 'kind'"),
        ({"levels": [{"period": 4}]}, "has no lr"),
        ({"levels": [{"period": 4, "lr": 1e-4, "clipping": 1}]}, "did you mean 'clip'"),
        ({"levels": 4}, "list of objects"),
    ],
)
def test_a_wrong_entry_of_a_file_is_refused(values: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        LevelsConfig.from_dict(values)


def test_layers_that_the_model_has_not() -> None:
    with pytest.raises(UserError, match="no layer 7: give indices from 0 to 3"):
        LevelsConfig(layers=[3, 7], kind="split").chosen_layers(4)
    with pytest.raises(UserError, match="3 depthwise levels need as many layers and there are 2"):
        LevelsConfig(layers=[2, 3]).chosen_layers(4)
    with pytest.raises(UserError, match="there are 2"):
        LevelsConfig().chosen_layers(2)


@given(count=st.integers(3, 100), kind=st.sampled_from(["depthwise", "split"]))
def test_late_layers_are_the_last_quarter(count: int, kind: str) -> None:
    chosen = LevelsConfig(kind=kind).chosen_layers(count)
    assert chosen == tuple(range(count - len(chosen), count))
    assert len(chosen) == max(-(-count // 4), 3 if kind == "depthwise" else 1)


def test_through_json_and_back() -> None:
    config = LevelsConfig("split", [Level(8, 0.1, "m3", 2.0, 0.5, 0.25), Level(8, 0.0)], layers=[5, 1])
    assert config.layers == (1, 5)
    assert LevelsConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LevelsConfig.from_dict({}) == LevelsConfig()


def test_rates_grow_with_the_root_of_the_period() -> None:
    assert [(level.period, level.lr) for level in LevelsConfig().levels] == [(512, 2e-4), (1024, 2.8e-4), (2048, 4e-4)]
    assert default_rate(4 * 512) == 2 * default_rate(512)
