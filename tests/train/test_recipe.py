"""Recipes: what is written is read back equal, and every mistake is one line that names the remedy."""

import string
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.train.model import check_options, option_names
from nestlearn.train.recipe import (
    BaselineRecipe,
    DataRecipe,
    ModelRecipe,
    Recipe,
    TrainRecipe,
    changes,
    differences,
    dump,
    load_preset,
    load_recipe,
    parse,
    preset_names,
)
from nestlearn.train.run import resolve

numbers = st.floats(0, 1e6, allow_subnormal=False)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner.filter(lambda v: v is not None), max_size=3),
    max_leaves=4,
)
keys = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8) | st.text(min_size=1, max_size=4)
recipes = st.builds(
    Recipe,
    seed=st.integers(0, 2**32 - 1),
    data=st.builds(DataRecipe, st.text(max_size=12), st.text(max_size=12), st.integers(2, 10**9)),
    model=st.builds(
        ModelRecipe,
        st.sampled_from(["hope", "transformer++"]),
        st.dictionaries(keys.filter(lambda k: k != "kind"), values.filter(lambda v: v != "none"), max_size=4),
    ),
    train=st.builds(TrainRecipe, tokens=st.integers(1, 10**15), learning_rate=numbers, weight_decay=numbers),
    baseline=st.builds(BaselineRecipe, st.sampled_from(["none", "transformer++"]), st.none() | numbers),
)


@given(recipes)
def test_what_is_written_is_read_back_equal(recipe: Recipe) -> None:
    assert parse(dump(recipe)) == recipe
    assert differences(parse(dump(recipe)), recipe) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\ntokens = 1", "unknown section 'trian' in FILE; did you mean 'train'?"),
        ("sed = 1", "unknown key 'sed' in FILE; did you mean 'seed'?"),
        ("data = 3", "'data' in FILE must be a section [data], got 3 (an integer)"),
        ("[train]\nlearning_rat = 1.0", "unknown key 'learning_rat' in [train] of FILE; did you mean 'learning_rate'?"),
        ("[train]\nbatch_size = 'eight'", 'train.batch_size in FILE must be an integer, got "eight" (a string)'),
        ("[train]\nbatch_size = 8.0", "train.batch_size in FILE must be an integer, got 8.0 (a number)"),
        ("[train]\nbatch_size = true", "train.batch_size in FILE must be an integer, got true (true or false)"),
        ("[train]\nbatch_size = 0", "train.batch_size in FILE must be at least 1, got 0"),
        ("[train]\nwarmup = 1.5", "train.warmup in FILE must be between 0 and 0.999, got 1.5"),
        ("[train]\nlearning_rate = nan", "train.learning_rate in FILE must be a finite number, got nan"),
        ("[train]\nlearning_rate = 1e400", "train.learning_rate in FILE must be a finite number, got inf"),
        (f"[train]\nweight_decay = 1{'0' * 400}", "train.weight_decay in FILE must be a finite number, got inf"),
        ("[baseline]\nlearning_rate = inf", "baseline.learning_rate in FILE must be a finite number, got inf"),
        ("[model]\nrope_theta = inf", "model.rope_theta in FILE must be a finite number, got inf"),
        ("[model]\nx = [1, nan]", "model.x in FILE must be a finite number, got nan"),
        ("[train]\nschedule = 'cosin'", "unknown train.schedule 'cosin' in FILE; did you mean 'cosine'?"),
        ("[data]\nsource = ['a']", 'data.source in FILE must be a string, got ["a"] (a list)'),
        ("[model]\nkind = 'hop'", "unknown model.kind 'hop' in FILE; did you mean 'hope'?"),
        ("[baseline]\nkind = 'transformer'", "unknown baseline.kind 'transformer' in FILE; did you mean"),
        ("seed = -1", "seed in FILE must be between 0 and 4294967295, got -1"),
        ("seed = ", "FILE is not valid TOML: "),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message.replace("FILE", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "hope",
            {"hidden_sise": 8},
            "unknown key 'hidden_sise' in [model] of kind 'hope'; did you mean 'hidden_size'?",
        ),
        ("transformer++", {"chunk_size": 8}, "unknown key 'chunk_size' in [model] of kind 'transformer++'"),
        ("hope", {"vocab_size": 8}, "model.vocab_size is no key of a recipe: it follows from [data]"),
        ("hope", {"hidden_size": "wide"}, "[model] of the recipe: hidden_size='wide'"),
        ("hope", {"block_types": ["hopp"], "num_hidden_layers": 1}, "unknown block type 'hopp'"),
        ("hope", {"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 is not a multiple"),
        ("transformer++", {"hidden_size": 30, "num_attention_heads": 4}, "hidden size (30) is not a multiple"),
    ],
)
def test_mistakes_in_the_model_are_one_line(kind: str, options: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_options(ModelRecipe(kind, options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "binary.toml")


def test_presets_are_valid() -> None:
    assert "tiny" in preset_names()
    for name in preset_names():
        recipe = load_preset(name)
        check_options(recipe.model)
        assert recipe.steps >= 1
    with pytest.raises(UserError, match="unknown preset 'tyni'; did you mean 'tiny'"):
        load_preset("tyni")


def test_a_budget_below_one_step_is_one_line() -> None:
    with pytest.raises(UserError, match=r"train\.tokens is 100, less than one step of 2048 tokens"):
        Recipe(train=TrainRecipe(tokens=100)).steps  # noqa: B018


@pytest.mark.parametrize("fixture", ["recipe", "hope_recipe"])
def test_resolving_writes_everything_out_and_changes_nothing(fixture: str, request: pytest.FixtureRequest) -> None:
    recipe: Recipe = request.getfixturevalue(fixture)
    resolved = resolve(recipe)
    assert set(resolved.model.options) == set(option_names(recipe.model.kind))
    assert recipe.model.options.items() <= resolved.model.options.items()
    assert resolve(parse(dump(resolved))) == resolved
    if recipe.baseline.kind != "none":
        assert resolved.baseline.learning_rate == recipe.train.learning_rate


def test_changes_are_told_with_both_values() -> None:
    changed = Recipe(seed=1).replace("train", tokens=5, batch_size=2, warmup=0.5)
    said = changes(changed, Recipe())
    assert said == "seed is 1, was 0; train.batch_size is 2, was 8; train.tokens is 5, was 1000000; and 1 more"
    assert changes(changed, changed) == ""


def test_none_survives_the_file(recipe: Recipe) -> None:
    model = ModelRecipe("hope", {"write_scale": None})
    resolved = resolve(Recipe(data=recipe.data, model=model))
    assert tomllib.loads(dump(resolved))["model"]["write_scale"] == "none"
    assert parse(dump(resolved)).model.options["write_scale"] is None


def test_paths_become_absolute(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(recipe.data.source)
    monkeypatch.chdir(source.parent)
    assert resolve(recipe.replace("data", source=source.name)).data.source == str(source)
    assert resolve(recipe.replace("data", source="stdlib")).data.source == "stdlib"
