"""Section 9.7 at small scale: a ViT trained on real images by an optimizer of the package.

The paper trains ViTs of 24 M and 86 M parameters on ImageNet-21K (Fig. 11). Here they are of about half a million, on
MNIST or CIFAR-10, so that one run takes about a minute of one CPU core.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from transformers import ViTConfig, ViTForImageClassification

from nestlearn.data.images import CLASSES, FILES, ImageSet, find_image_sets, load_images
from nestlearn.errors import UserError, nearest
from nestlearn.optim import NotFiniteGradient
from nestlearn.tasks.optim.optimizers import build

WEIGHT_DECAY = 0.1  # decoupled, in units of the learning rate, on matrices
HELD_OUT = 5_000  # the last training images, for the choice of the learning rate
POINTS = 40  # of the curve


@dataclasses.dataclass(frozen=True)
class Setting:
    """One data set at one scale.

    ``patch``: side in pixels. ``shift``: the largest random shift in pixels. ``flip``: half the images, left to right.
    ``scored``: images of each of the three final measurements, at most.
    """

    patch: int
    shift: int
    flip: bool
    steps: int
    batch: int = 128
    width: int = 128
    layers: int = 4
    mlp: int = 256
    scored: int = 10_000


SETTINGS = {
    "mnist": Setting(patch=7, shift=2, flip=False, steps=400),
    "cifar10": Setting(patch=4, shift=4, flip=True, steps=200, batch=64, scored=5_000),
}
SMOKE = dict(steps=6, batch=16, width=32, layers=1, mlp=64, scored=200)
SCALES = ("cpu", "smoke")
HEADS = 4


class Split(NamedTuple):
    """Images as uint8 (N, C, H, W) and labels (N,)."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> Split:
        return Split(self.images[:count], self.labels[:count])


class Data(NamedTuple):
    """``mean`` and ``deviation`` by channel (C, 1, 1) are of pixels from 0 to 1 of the first training images."""

    train: Split
    validation: Split
    test: Split
    mean: Tensor
    deviation: Tensor


def available(data: str | None) -> list[str]:
    """The image sets that `train` can use in the folder ``data``; none without one.

    Raises `UserError` if ``data`` is no folder.

    >>> available(None)
    []
    """
    return [] if data is None else sorted(find_image_sets(data))


def train(optimizer: str, lr: float, seed: int, scale: str, data: str | None, dataset: str) -> dict[str, Any]:
    """Train the ViT on ``dataset`` from the folder ``data`` and measure it.

    Args:
        optimizer, lr: see `nestlearn.tasks.optim.optimizers.build`; ``lr`` is the peak of warm-up and cosine.
        seed: of the weights, the order of the images and their shifts.
        scale: ``"cpu"``, or ``"smoke"`` for a few steps of a smaller model.
        data: a folder that holds the images, or the folder above it.
        dataset: ``"mnist"`` or ``"cifar10"``.

    Returns train_loss (nats per image, on training images without augmentation), validation_loss, test_loss, accuracy
    (of the test images), seconds_per_step (all of a step), optimizer_seconds_per_step, steps, parameters, curve
    (``[step, mean training loss since the last point]``) and diverged. A loss or a gradient that is not finite ends the
    run: then ``diverged`` is true, and losses and accuracy are None.

    Raises `UserError` for unknown names and for missing or damaged images.
    """
    if scale not in SCALES:
        raise UserError(f"unknown scale '{scale}'; {nearest(scale, SCALES)}")
    if dataset not in SETTINGS:
        raise UserError(f"unknown dataset '{dataset}'; {nearest(dataset, SETTINGS)}")
    if data is None:
        raise UserError(f"{dataset} is not part of this package: give the folder that holds {FILES[dataset][0]}")
    setting = SETTINGS[dataset]
    if scale == "smoke":
        setting = dataclasses.replace(setting, **SMOKE)
    images = _read(data, dataset)
    torch.manual_seed(seed)
    model = _model(setting, images.train.images.shape)
    return _fit(model, build(optimizer, model, lr, WEIGHT_DECAY), setting, images, seed)


@functools.lru_cache(maxsize=1)
def _read(data: str, dataset: str) -> Data:
    loaded: ImageSet = load_images(data, dataset)
    held = min(HELD_OUT, len(loaded.train) // 2)
    pixels = loaded.train[:held].float().div_(255).transpose(0, 1).flatten(1)
    return Data(
        Split(loaded.train[:-held], loaded.train_labels[:-held]),
        Split(loaded.train[-held:], loaded.train_labels[-held:]),
        Split(loaded.test, loaded.test_labels),
        pixels.mean(1)[:, None, None],
        pixels.std(1)[:, None, None],
    )


def _model(setting: Setting, shape: torch.Size) -> ViTForImageClassification:
    """A fresh ViT for images (N, C, side, side)."""
    config = ViTConfig(
        hidden_size=setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=HEADS,
        intermediate_size=setting.mlp,
        image_size=shape[2],
        patch_size=setting.patch,
        num_channels=shape[1],
        num_labels=CLASSES,  # pyrefly: ignore[unexpected-keyword]
        # The library's 0.02 is for a width of 768: at this one AdamW then stands still for half of so short a run.
        initializer_range=setting.width**-0.5,
    )
    return ViTForImageClassification(config)


def _fit(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting, data: Data, seed: int) -> dict[str, Any]:
    scheduler = _schedule(optimizer, setting.steps)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    seconds = optimizer_seconds = 0.0
    diverged = False
    model.train()
    for _ in range(setting.steps):
        began = time.perf_counter()
        images, labels = _batch(data, setting, generator)
        loss = nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        diverged = not math.isfinite(loss.item())
        if diverged:
            break
        loss.backward()
        stepped = time.perf_counter()
        try:
            optimizer.step()
        except NotFiniteGradient:
            diverged = True
            break
        ended = time.perf_counter()
        optimizer_seconds += ended - stepped
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - began
    return {
        **_measure(model, data, setting.scored, diverged),
        "seconds_per_step": seconds / max(1, len(losses)),
        "optimizer_seconds_per_step": optimizer_seconds / max(1, len(losses)),
        "steps": len(losses),
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": smoothed(losses),
    }


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The first tenth rises to the peak, the rest falls to zero along a cosine."""
    warmup = max(1, steps // 10)
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [rise, CosineAnnealingLR(optimizer, steps - warmup)], [warmup])


def _batch(data: Data, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random training images, each shifted (the border is filled with the mean) and half of them flipped."""
    index = torch.randint(len(data.train.labels), (setting.batch,), generator=generator)
    images = _standardised(data, data.train.images[index])
    side = images.shape[-1]
    padded = nn.functional.pad(images, [setting.shift] * 4)
    offsets = torch.randint(2 * setting.shift + 1, (2, setting.batch, 1), generator=generator)
    rows, columns = offsets + torch.arange(side)  # (B, side) each
    if setting.flip:
        flipped = torch.rand(setting.batch, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    number = torch.arange(setting.batch)[:, None, None]
    shifted = padded[number, :, rows[:, :, None], columns[:, None, :]]  # (B, side, side, C)
    return shifted.permute(0, 3, 1, 2), data.train.labels[index]


def _standardised(data: Data, images: Tensor) -> Tensor:
    return (images.float() / 255 - data.mean) / data.deviation


@torch.no_grad()
def _measure(model: nn.Module, data: Data, count: int, diverged: bool) -> dict[str, Any]:
    """Losses in nats per image and the accuracy, None for all if any is not finite."""
    model.eval()
    result: dict[str, Any] = {}
    for name, split in (("train", data.train.first(HELD_OUT)), ("validation", data.validation), ("test", data.test)):
        split = split.first(count)
        loss = right = 0.0
        for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
            logits = model(pixel_values=_standardised(data, images)).logits
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(1) == labels).sum().item()
        result[f"{name}_loss"] = loss / len(split.labels)
        result["accuracy"] = right / len(split.labels)  # the last one stays: of the test images
    diverged = diverged or not all(math.isfinite(value) for value in result.values())
    return (dict.fromkeys(result) if diverged else result) | {"diverged": diverged}


def smoothed(losses: list[float]) -> list[list[float]]:
    """About ``POINTS`` points ``[step, mean loss since the last point]``.

    >>> smoothed([4.0, 2.0])
    [[1, 4.0], [2, 2.0]]
    """
    stride = max(1, math.ceil(len(losses) / POINTS))
    ends = [*range(stride, len(losses) + 1, stride)]
    return [[end, sum(losses[end - stride : end]) / stride] for end in ends]
