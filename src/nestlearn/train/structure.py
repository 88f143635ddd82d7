"""A folder, a recipe or a preset as a model of which only the structure is there, with its optimizer.

For what asks about shapes and names and not about weights: the model stands on the meta device, takes no memory and is
made in a moment, whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from nestlearn.convert import ContinualModel, model_folder
from nestlearn.errors import UserError, nearest
from nestlearn.train.recipe import Recipe, load_preset, load_recipe, preset_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Structure:
    """What a name stands for. ``tokens_per_step`` is known of a recipe and of a run."""

    model: PreTrainedModel | ContinualModel
    optimizer: Optimizer | None
    tokens_per_step: int | None


def load_structure(name: str, optimizer: str | None = None) -> Structure:
    """The model that ``name`` stands for, without its weights, and the optimizer that it is trained with.

    Args:
        name: a run folder or one of ``save_pretrained``, a recipe file ending in ``.toml``, or a preset. Of a folder
            of ``nestlearn convert`` the weights are read after all.
        optimizer: a name of `nestlearn.train.optimizers` in place of the recipe's; a folder without a recipe has none
            by itself. Learning rate and weight decay are the recipe's, or the defaults of `TrainRecipe`.

    Raises:
        UserError: none of these, a folder or recipe that cannot be used, or an unknown optimizer.

    >>> found = load_structure("tiny")
    >>> found.model.device, type(found.optimizer).__name__, found.tokens_per_step
    (device(type='meta'), 'AdamW', 4096)
    """
    from nestlearn.convert.saved import LEVELS
    from nestlearn.train.loading import load_model
    from nestlearn.train.model import build

    if (model_folder(name) / LEVELS).is_file():  # what its levels learn is cut from the base, weights and all
        if optimizer is not None:
            raise UserError(f"{name} is a converted model, whose levels name their rules: leave the optimizer out")
        return Structure(load_model(name)[0], None, None)
    recipe, config = _find(name)
    with torch.device("meta"):
        model = build(config)
    plan = recipe
    if optimizer is not None:
        plan = replace(plan or Recipe(), train=replace((plan or Recipe()).train, optimizer=optimizer))
    made = None if plan is None else _optimizer(plan, model)
    return Structure(model, made, None if recipe is None else recipe.tokens_per_step)


def _find(name: str) -> tuple[Recipe | None, PreTrainedConfig]:
    """The recipe, where there is one, and the configuration of its model."""
    from nestlearn.train.loading import read_config
    from nestlearn.train.model import model_config

    path = model_folder(name)
    if path.is_dir():
        own = path / "run.toml"
        return (load_recipe(own) if own.is_file() else None), read_config(path)
    if path.suffix == ".toml" or path.is_file():
        recipe = load_recipe(path)
    elif name in preset_names():
        recipe = load_preset(name)
    else:
        raise UserError(
            f"no model folder or recipe file {name!r}, and no preset of this name; {nearest(name, preset_names())}"
        )
    return recipe, model_config(recipe.model, _tokenizer(recipe), recipe.data.sequence_length)


def _tokenizer(recipe: Recipe) -> Any:
    """The recipe's tokenizer; of one that would have to be trained on the data, its size."""
    from nestlearn.data.tokenizers import bpe_size, load_tokenizer

    spec = recipe.data.tokenizer
    return _Size(bpe_size(spec)) if spec.partition(":")[0] == "bpe" else load_tokenizer(spec)


class _Size:
    """A tokenizer of which only the size is known."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def _optimizer(recipe: Recipe, model: PreTrainedModel) -> Optimizer:
    """As `nestlearn.train.trainer` makes it, levelwise where the recipe says so."""
    from nestlearn.nn import ContinuumLevel, continuum_periods
    from nestlearn.optim import LevelwiseOptimizer
    from nestlearn.train.optimizers import build

    train = recipe.train
    made = build(train.optimizer, model, train.learning_rate, train.weight_decay)
    if train.levelwise and any(isinstance(module, ContinuumLevel) for module in model.modules()):
        return LevelwiseOptimizer(made, continuum_periods(model, recipe.tokens_per_step), error="mean")
    return made
