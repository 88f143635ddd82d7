"""From the ``[model]`` section of a recipe to a configuration and a fresh model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from nestlearn.errors import UserError, nearest
from nestlearn.train.recipe import ModelRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Given by the tokenizer and the data, or not part of an architecture.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOO_LARGE = ("memory", "storage size", "overflow", "not enough", "unpack")
RESERVED = (*TOKENS, "vocab_size", "max_position_embeddings", "use_cache")


def config_class(kind: str) -> type[PreTrainedConfig]:
    """The configuration class of a model kind: ``"hope"`` or ``"transformer++"``."""
    if kind == "hope":
        from nestlearn.models.hope import HopeConfig

        return HopeConfig
    from transformers import LlamaConfig

    return LlamaConfig


def option_names(kind: str) -> list[str]:
    """The keys that ``[model]`` may have beside ``kind``."""
    cls = config_class(kind)
    own = cls.__annotations__  # without the fields that every configuration has
    return sorted(f.name for f in dataclasses.fields(cls) if f.name in own and f.name not in RESERVED)


def check_options(recipe: ModelRecipe) -> None:
    """Raise `UserError` for an unknown key or a value that the configuration class refuses."""
    names = option_names(recipe.kind)
    for key in recipe.options:
        if key in RESERVED:
            raise UserError(f"model.{key} is no key of a recipe: it follows from [data]; remove it")
        if key not in names:
            raise UserError(f"unknown key '{key}' in [model] of kind '{recipe.kind}'; {nearest(key, names)}")
    _configure(recipe)


def model_config(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedConfig:
    """The configuration of the recipe's model for a tokenizer and a training length in tokens.

    Raises `UserError` like `check_options`.
    """
    check_options(recipe)
    tokens = {name: getattr(tokenizer, name) for name in TOKENS}
    return _configure(recipe, vocab_size=len(tokenizer), max_position_embeddings=length, **tokens)


def resolved_options(recipe: ModelRecipe) -> dict[str, Any]:
    """Every option with its value, defaults included."""
    check_options(recipe)
    return architecture(_configure(recipe), recipe.kind)


def architecture(config: PreTrainedConfig, kind: str) -> dict[str, Any]:
    """The options of ``[model]`` that give ``config``, as TOML holds them."""
    return {name: _plain(getattr(config, name)) for name in option_names(kind)}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _configure(recipe: ModelRecipe, **tokens: Any) -> PreTrainedConfig:
    from nestlearn.data.tokenizers import reason

    for name, value in recipe.options.items():  # HopeConfig checks this itself, LlamaConfig does not
        if (name.startswith("num_") or name.endswith("_size")) and isinstance(value, int) and value < 1:
            raise UserError(f"[model] of the recipe: {name}={value}: must be at least 1")
    try:
        return config_class(recipe.kind)(**recipe.options, **tokens)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"[model] of the recipe: {reason(error)}") from error


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration, with fresh float32 weights.

    Raises `UserError` if its layers refuse the configuration or its weights cannot be allocated.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        # torch has no class of its own for a tensor that is too large.
        if not any(word in str(error).lower() for word in TOO_LARGE):
            raise
        raise UserError(
            f"a model of hidden_size={config.hidden_size}, vocab_size={config.vocab_size} and num_hidden_layers="
            f"{config.num_hidden_layers} does not fit into the memory: make it smaller"
        ) from error


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of a model, shared ones once.

    >>> count_parameters(torch.nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the model of a configuration, without allocating them."""
    with torch.device("meta"):
        return count_parameters(build(config))
