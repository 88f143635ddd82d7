"""A model folder from the disk, with one line for the user about whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from nestlearn.convert import ContinualModel, model_folder
from nestlearn.convert.pretrained import MODELS
from nestlearn.convert.saved import LEVELS
from nestlearn.data.tokenizers import blame, read_tokenizer, reason
from nestlearn.errors import UserError

INDEX = "model.safetensors.index.json"


def load_model(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a folder that ``save_pretrained`` wrote, for inference.

    Of a folder of ``nestlearn convert`` it is the `ContinualModel` with what it learned, and the tokenizer of its base;
    a model of ``nestlearn pull`` may be given by its name.

    On the GPU if there is one, in the data type it was saved in. Only safetensors are read, never a pickle,
    and no code from the folder is run. Raises `UserError` for a missing folder or file, a ``config.json``
    that is damaged or of another kind of model, weights that are truncated or do not fit it, and a
    tokenizer that is missing or too large for the model.

    >>> load_model("no/such/folder")
    Traceback (most recent call last):
        ...
    nestlearn.errors.UserError: no model folder 'no/such/folder': give a run, a folder of save_pretrained, or smollm2
    """
    folder = model_folder(path)
    if not folder.is_dir():
        raise UserError(
            f"no model folder {str(path)!r}: give a run, a folder of save_pretrained, or {', '.join(MODELS)}"
        )
    converted = (folder / LEVELS).is_file()
    model, config, tokenizer = _converted(folder) if converted else _ordinary(folder)
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model {size}: they do not belong together"
        )
    if torch.cuda.is_available():
        model.cuda()
    return model.eval(), tokenizer


def _ordinary(folder: Path) -> tuple[Any, PreTrainedConfig, PreTrainedTokenizerBase]:
    config = read_config(folder)
    _check_weights(folder)
    tokenizer = read_tokenizer(folder)
    return _weights(folder, config), config, tokenizer


def _converted(folder: Path) -> tuple[Any, PreTrainedConfig, PreTrainedTokenizerBase]:
    model = ContinualModel.from_pretrained(folder)
    return model, model.config, read_tokenizer(Path(model.config.name_or_path))


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a causal language model. Raises `UserError` for a file that is missing, damaged or of
    another kind of model.
    """
    path = folder / "config.json"
    if "model_type" not in _json(path):
        raise UserError(f"{path} names no model_type: it is not the config.json of a language model")
    with blame(f"cannot use {path}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{path} is of type {config.model_type!r}, which is no causal language model")
    size = config.get_text_config().vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if any(token is not None and token >= size for token in (value if isinstance(value, list) else [value])):
            raise UserError(f"cannot use {path}: {name}={value} is not below vocab_size={size}")
    return config


def _check_weights(folder: Path) -> None:
    """Every file of weights is there and its header fits its length."""
    if (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from names to files: save the model again")
        names = sorted(set(shards.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            pickled = [file.name for file in sorted(folder.glob("*.bin"))]
            hint = f" ({pickled[0]} is a pickle and is not read)" if pickled else ""
            raise UserError(f"{folder} has no {name}{hint}: save the model with save_pretrained")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder / name} is corrupt or truncated ({reason(error)}): use another checkpoint"
            ) from None


def _weights(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report of what does not fit is ours to give, in one line
    try:
        with blame(f"cannot load {folder}"):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(verbosity)
    for kind, what in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape")):
        names = sorted(key if isinstance(key, str) else key[0] for key in report[kind])
        if names:
            raise UserError(
                f"the weights in {folder} do not fit its config.json: {len(names)} {what}, {names[0]} for one"
            )
    return model


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no model folder: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: save the model again")
    return value
