"""Checkpoints of a training run: safetensors and JSON in folders that are either complete or absent.

A checkpoint is filled beside its place, every file is fsynced, a manifest with the SHA-256 of each file is added,
and the folder is renamed. A folder without its manifest was not written by this module; one whose files do not
match it is damaged. Nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nestlearn.errors import UserError
from nestlearn.files import disk_errors, read_json, sync_file

MANIFEST, STATE = "manifest.json", "trainer_state.json"
FORMAT = "nestlearn training checkpoint, version 1"


def list_checkpoints(parent: Path) -> list[Path]:
    """The ``checkpoint-STEP`` folders of ``parent``, oldest first. Half-written ones have other names."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name; `verify` compares it with the step inside.

    >>> step_of(Path("run/checkpoints/checkpoint-120"))
    120
    """
    return int(checkpoint.name.rpartition("-")[2])


def commit(parent: Path, name: str, fill: Callable[[Path], None], keep: int = 2) -> Path:
    """Let ``fill`` write the files of ``parent/name``, make them durable, then drop all but the newest ``keep``.

    Raises whatever ``fill`` raises (``OSError`` on a full disk); the older checkpoints are then untouched.
    """
    parent.mkdir(parents=True, exist_ok=True)
    target, beside = parent / name, parent / f".{name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        fill(beside)
        files = sorted(path for path in beside.rglob("*") if path.is_file())
        entries = {path.relative_to(beside).as_posix(): _digest(path) for path in files}
        manifest = json.dumps({"format": FORMAT, "sha256": entries}, indent=2) + "\n"
        (beside / MANIFEST).write_text(manifest)
        for path in [*files, beside / MANIFEST, beside]:
            sync_file(path)
        _discard(target)  # only there when a run is resumed from an older checkpoint than its newest
        os.replace(beside, target)
        sync_file(parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in list_checkpoints(parent)[:-keep]:
        _discard(old)
    return target


def sweep(parent: Path) -> None:
    """Remove what a killed process left half-written or half-deleted. Raises `UserError` if ``parent`` is a file."""
    if parent.exists() and not parent.is_dir():
        raise UserError(f"{parent} is a file where the folder of the checkpoints belongs: move it away")
    for path in parent.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Delete a folder so that a kill in the middle leaves no folder with its name."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> None:
    """Raise `UserError` unless ``folder`` is a checkpoint of this module with every file as it was written.

    Its name must be that of the step which its files are from.
    """
    remedy = "delete this folder to resume from the checkpoint before it"
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} is no nestlearn checkpoint ({MANIFEST} is missing): {remedy}")
    manifest = read_json(folder / MANIFEST, remedy)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder} is no checkpoint of this version ({FORMAT!r} is expected): {remedy}")
    entries = manifest.get("sha256")
    if not isinstance(entries, dict) or STATE not in entries:
        raise UserError(f"{folder / MANIFEST} is damaged (it lists no {STATE}): {remedy}")
    for name, digest in entries.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"the checkpoint {folder} is damaged ({name} is missing): {remedy}")
        if _digest(path) != digest:
            raise UserError(f"the checkpoint {folder} is damaged ({name} was truncated or changed): {remedy}")
    extra = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {*entries, MANIFEST}
    if extra:
        raise UserError(f"{folder / MANIFEST} is damaged (it lists no {min(extra)}): {remedy}")
    step = read_json(folder / STATE, remedy).get("global_step")
    if step != step_of(folder):
        raise UserError(f"{folder} holds step {step}: rename it to checkpoint-{step} or delete it")


def save_state(path: Path, state: Any) -> None:
    """Write a tree of dicts, lists, tuples, tensors, arrays, numbers and strings as ``path``.json + .safetensors.

    Raises ``OSError`` on a full disk and ``TypeError`` for anything else in the tree.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, tensors, "")
    path.with_suffix(".json").write_text(json.dumps(tree) + "\n")
    with disk_errors():
        save_file(tensors, path.with_suffix(".safetensors"))


def load_state(path: Path) -> Any:
    """What `save_state` wrote, with equal types, bits and shapes, on the CPU."""
    tree = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return _decode(tree, load_file(path.with_suffix(".safetensors")))


def _encode(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.copy())
        return {"array": name}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, tensors, f"{name}/{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, f"{name}/{i}") for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
