"""A folder, a recipe or a preset as a model without weights and its optimizer."""

from pathlib import Path

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.optim import LevelwiseOptimizer
from nestlearn.train.recipe import OPTIMIZERS, DataRecipe, ModelRecipe, Recipe, TrainRecipe, dump
from nestlearn.train.structure import load_structure

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def write(folder: Path, recipe: Recipe) -> str:
    path = folder / "recipe.toml"
    path.write_text(dump(recipe))
    return str(path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_works_without_weights(name: str) -> None:
    found = load_structure("tiny", name)
    assert all(p.is_meta for p in found.model.parameters())
    assert found.optimizer is not None
    held = {id(p) for group in found.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in found.model.parameters()}


def test_the_recipe_says_what_is_levelwise(tmp_path: Path) -> None:
    options = {**SIZES, "intermediate_size": 48, "cms_chunk_sizes": [8, 64, 512]}
    train = TrainRecipe(tokens=10_000, batch_size=2, optimizer="sgd-momentum", learning_rate=0.5, levelwise=True)
    recipe = Recipe(data=DataRecipe(sequence_length=32), model=ModelRecipe("hope", options), train=train)
    path = write(tmp_path, recipe)
    found = load_structure(path)
    assert isinstance(found.optimizer, LevelwiseOptimizer)
    assert sorted(set(found.optimizer.periods.values())) == [8]
    assert found.tokens_per_step == 64
    assert found.optimizer.param_groups[0]["lr"] == 0.5
    assert isinstance(load_structure(path, "adamw").optimizer, LevelwiseOptimizer)


def test_a_vocabulary_that_would_have_to_be_trained_has_its_size(tmp_path: Path) -> None:
    recipe = Recipe(data=DataRecipe(tokenizer="bpe:1000"), model=ModelRecipe("transformer++", SIZES))
    assert load_structure(write(tmp_path, recipe)).model.config.vocab_size == 1000


def test_a_folder_needs_only_its_configuration(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=50, intermediate_size=32, **SIZES).save_pretrained(tmp_path)
    found = load_structure(str(tmp_path))
    assert (found.optimizer, found.tokens_per_step) == (None, None)
    assert found.model.device == torch.device("meta")
    chosen = load_structure(str(tmp_path), "muon").optimizer
    assert chosen is not None
    assert chosen.param_groups[0]["lr"] == TrainRecipe().learning_rate


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no preset of this name; did you mean 'tiny'"):
        load_structure("tinny")
    with pytest.raises(UserError, match="is no model folder"):
        load_structure(str(tmp_path))
    with pytest.raises(UserError, match="unknown tokenizer 'byte'"):
        load_structure(write(tmp_path, Recipe(data=DataRecipe(tokenizer="byte"))))
    with pytest.raises(UserError, match="SIZE is the size of the vocabulary"):
        load_structure(write(tmp_path, Recipe(data=DataRecipe(tokenizer="bpe:3"))))
