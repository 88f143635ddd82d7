"""A converted model on the disk: what was learned and which base it belongs to, never the base itself.

The folder holds ``levels.json`` (configuration, path and hash of the base), ``learned.safetensors`` and, of a model
that must not disturb some text, ``kept.safetensors``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nestlearn.convert.config import LevelsConfig
from nestlearn.convert.identity import base_hash
from nestlearn.convert.pretrained import model_folder
from nestlearn.errors import UserError
from nestlearn.files import no_empty_folders, read_json, write_atomic, write_json

if TYPE_CHECKING:
    from nestlearn.convert.model import ContinualModel

LEVELS, LEARNED, KEPT = "levels.json", "learned.safetensors", "kept.safetensors"
FORMAT = 1
REMEDY = "save the converted model again"


def save_converted(model: ContinualModel, folder: Path) -> None:
    """Write the folder. Weights that are still the pretrained ones are left out.

    Raises `UserError` for weights with rows of their own, which belong to no one model.
    """
    start = {name: weight for level in model.levels for name, weight in level.start.items()}
    learned: dict[str, Tensor] = {}
    for name, weight in model.weights.items():
        if weight.shape != start[name].shape:
            raise UserError(f"the weight {name} differs from row to row: save the weights of one row")
        value = weight.detach().to(start[name].device)
        if not torch.equal(value.to(start[name].dtype), start[name]):
            learned[name] = value.contiguous()
    path = Path(model.base.config.name_or_path or "").expanduser()
    base = {
        "path": str(path.absolute()) if path.parts and path.is_dir() else None,
        "sha256": base_hash(model),
        "dtype": str(model.base.dtype).removeprefix("torch."),
    }
    # Weights that see the same inputs share a matrix, which safetensors does not write.
    kept = {
        name: own.matrix.clone(memory_format=torch.contiguous_format)
        for level in model.levels
        for name, own in level.kept.items()
    }
    content = {"format": FORMAT, "base": base, "config": model.config_levels.to_dict()}
    with no_empty_folders(folder), _no_half(folder):
        # The weights first: their hash stands in the other file, so that two halves of different age are not one model.
        write_atomic(folder / LEARNED, lambda path: save_file(learned, path))
        content["learned"] = {"sha256": _hash(folder / LEARNED), "weights": len(learned)}
        if kept:
            write_atomic(folder / KEPT, lambda path: save_file(kept, path))
            content["kept"] = {"sha256": _hash(folder / KEPT), "weights": len(kept)}
        write_json(folder / LEVELS, content)


@contextmanager
def _no_half(folder: Path) -> Iterator[None]:
    """After an error inside, as on a full disk, nothing is left of a model that was not there before."""
    new = not (folder / LEVELS).exists()
    try:
        yield
    except BaseException:
        if new:
            for name in (LEVELS, LEARNED, KEPT):
                (folder / name).unlink(missing_ok=True)
        raise


def read_converted(folder: Path) -> tuple[dict[str, Any], LevelsConfig, dict[str, Tensor], dict[str, Tensor]]:
    """The entry of the base, the configuration, the learned weights, the directions that are kept. Raises `UserError`
    that names what is damaged.
    """
    path = folder / LEVELS
    if not path.is_file():
        raise UserError(f"no converted model in {folder} ({LEVELS} is missing): give a folder of `nestlearn convert`")
    entries = read_json(path, REMEDY)
    if entries.get("format") != FORMAT:
        raise UserError(f"{path} has the format {entries.get('format')!r} and this version reads {FORMAT}: {REMEDY}")
    base, learned = entries.get("base"), entries.get("learned")
    if not isinstance(base, dict) or not isinstance(learned, dict) or not isinstance(entries.get("config"), dict):
        raise UserError(f"{path} is damaged (base, config or learned is missing): {REMEDY}")
    weights = _tensors(folder / LEARNED, learned)
    kept = entries.get("kept")
    return (
        base,
        LevelsConfig.from_dict(entries["config"]),
        weights,
        {} if kept is None else _tensors(folder / KEPT, kept),
    )


def _tensors(file: Path, entry: Any) -> dict[str, Tensor]:
    if not isinstance(entry, dict) or not file.is_file() or _hash(file) != entry.get("sha256"):
        raise UserError(f"{file} is damaged or missing (its hash is not the one in {LEVELS}): {REMEDY}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): {REMEDY}") from error


def read_base(entry: dict[str, Any], given: PreTrainedModel | str | Path | None) -> PreTrainedModel:
    """The base model that was converted: the one given, or loaded from where it lay. Raises `UserError` for another."""
    if isinstance(given, PreTrainedModel):
        model = given
    elif given is None and not entry.get("path"):
        raise UserError(
            "the converted model does not say where its base lies: convert a saved base, or in Python give it as base="
        )
    else:
        model = load_base(str(entry["path"]) if given is None else given, str(entry.get("dtype")))
    found = base_hash(model)
    if found != entry.get("sha256"):
        raise UserError(
            f"the base model {model.config.name_or_path or type(model).__name__!r} has the hash {found[:12]} and the "
            f"learned weights belong to {str(entry.get('sha256'))[:12]}: give the model that was converted "
            "(restore it, or in Python base=)"
        )
    return model


def load_base(name: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model from a folder, or by the name of a pulled one, for inference.

    Only safetensors are read and no code from the folder is run. Raises `UserError` for a folder that is missing or
    holds no such model.
    """
    folder = model_folder(name)
    if not folder.is_dir():
        raise UserError(f"no model folder {str(name)!r}: give a folder of save_pretrained, or a name `pull` knows")
    if (folder / LEVELS).is_file():
        raise UserError(f"{folder} is converted already: give its base model")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"the base model has the data type {dtype!r}, which torch does not know: {REMEDY}")
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the model in {folder} ({str(error).splitlines()[0]})") from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
