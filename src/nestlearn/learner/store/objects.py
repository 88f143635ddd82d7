"""The tensors of one level as one immutable safetensors file, named by the SHA-256 of its bytes.

The file is written here and not by safetensors, for two reasons: equal tensors must give equal bytes in every version,
and the bytes are hashed as they lie in memory, so that a level which did not change costs no write. It is read by
safetensors, from mapped memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from nestlearn.errors import UserError
from nestlearn.files import write_atomic

if TYPE_CHECKING:  # torch is imported where it is needed: the log of a store is shown without it
    from torch import Tensor

OBJECTS = "objects"
REMEDY = "go back to a snapshot without it ('nestlearn memory verify' tells which)"
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def path_of(folder: Path, digest: str) -> Path:
    """Where the object lies. ``sha256sum`` of the file gives its name."""
    return folder / OBJECTS / f"{digest}.safetensors"


def serialise(level: str, tensors: Mapping[str, Tensor]) -> list[Any]:
    """The file as a list of byte buffers: the header, then each tensor where it lies in memory.

    Widest numbers first, which keeps every tensor aligned; then by name.

    Raises:
        UserError: a tensor holds NaN or infinity, or is of a kind that safetensors or a learned state has no place for.
    """
    import torch

    parts = []
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in DTYPES or name == "__metadata__":
            allowed = f"a name other than __metadata__ and one of {', '.join(DTYPES)}"
            raise UserError(f"level {level!r}: tensor {name!r} of {kind} cannot be kept: {allowed} is expected")
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise UserError(f"level {level!r}: tensor {name!r} holds NaN or infinity: nothing was saved")
        parts.append((-tensor.element_size(), name, kind, tensor.detach().cpu().contiguous()))
    header, buffers, offset = {}, [], 0
    for _, name, kind, tensor in sorted(parts, key=lambda part: part[:2]):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        buffers.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *buffers]


def digest_of(buffers: list[Any]) -> str:
    """The SHA-256 of the file that `serialise` describes."""
    found = hashlib.sha256()
    for buffer in buffers:
        found.update(buffer)
    return found.hexdigest()


def write(folder: Path, digest: str, buffers: list[Any]) -> int:
    """Write the object unless it is there; returns its bytes. One that has lost its end is written anew.

    Raises ``RuntimeError`` if a tensor was changed in place since ``digest`` was taken.
    """
    size = sum(len(buffer) for buffer in buffers)
    path = path_of(folder, digest)
    if not path.exists() or path.stat().st_size != size:
        write_atomic(path, lambda beside: _fill(beside, digest, buffers))
    return size


def _fill(path: Path, digest: str, buffers: list[Any]) -> None:
    with path.open("wb") as file:
        for block in _hashed(digest, buffers):
            file.write(block)


def _hashed(digest: str, buffers: list[Any]) -> Iterator[Any]:
    """The buffers in blocks that stay in the processor's cache between hash and copy; checked at the end."""
    found = hashlib.sha256()
    for buffer in buffers:
        for start in range(0, len(buffer), 1 << 20):
            block = buffer[start : start + (1 << 20)]
            found.update(block)
            yield block
    if found.hexdigest() != digest:
        raise RuntimeError("a tensor was changed in place while it was being saved: nothing was saved")


def check(folder: Path, digest: str) -> None:
    """Read the whole file. Raises `UserError` that names it if it is missing, truncated or changed."""
    path = path_of(folder, digest)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {REMEDY}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    if found != digest:
        raise UserError(f"{path} is damaged (truncated or changed): {REMEDY}")


def read(folder: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a checked object, mapped from its file: writing to them changes memory, never the file."""
    check(folder, digest)
    from safetensors.torch import load_file

    path = path_of(folder, digest)
    try:
        return load_file(path)
    except SafetensorError as error:  # the bytes are those that were written, so another program wrote them
        raise UserError(f"{path} is no safetensors file ({error})") from error
