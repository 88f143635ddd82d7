"""The ViT of section 9.7: it learns, sees only what it may, and ends a run that diverges."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.tasks.optim import vision
from nestlearn.train.optimizers import build
from tests.data.test_images import write_mnist

KEYS = {
    *("train_loss", "validation_loss", "test_loss", "accuracy", "seconds_per_step", "optimizer_seconds_per_step"),
    *("steps", "parameters", "curve", "diverged"),
}


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square at one of ten places, which the random shifts do not confuse."""
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 60, (count, 28, 28)), rng.integers(0, 10, count)
    for image, label in zip(pixels, labels, strict=True):
        row, column = 4 + 12 * (label // 5), 2 + 5 * (label % 5)
        image[row : row + 8, column : column + 4] += 180
    return pixels.astype(np.uint8), labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images")
    write_mnist(path / "mnist", drawn(600, 0), drawn(200, 1))
    return str(path)


def run(folder: str, optimizer: str = "adamw", lr: float = 1e-3, seed: int = 0) -> dict:
    return vision.train(optimizer, lr, seed, "smoke", folder, "mnist")


def numbers(result: dict) -> dict:
    return {key: value for key, value in result.items() if "seconds" not in key}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "m3", "m3-paper"])
def test_a_result_has_every_key_and_repeats_to_the_bit(folder: str, optimizer: str) -> None:
    result = run(folder, optimizer)
    assert result.keys() == KEYS
    assert not result["diverged"]
    assert result["steps"] == vision.SMOKE["steps"]
    assert [step for step, _ in result["curve"]] == [1, 2, 3, 4, 5, 6]
    assert 0 < result["optimizer_seconds_per_step"] < result["seconds_per_step"]
    json.dumps(result, allow_nan=False)
    assert numbers(run(folder, optimizer)) == numbers(result)
    assert numbers(run(folder, optimizer, seed=1)) != numbers(result)


def test_optimizers_of_one_seed_see_the_same_images_first(folder: str) -> None:
    first = {name: run(folder, name)["curve"][0] for name in ("adamw", "muon", "momentum")}
    assert len({tuple(point) for point in first.values()}) == 1


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.01), ("m3", 0.05)])
def test_it_learns(folder: str, monkeypatch: pytest.MonkeyPatch, optimizer: str, lr: float) -> None:
    monkeypatch.setitem(vision.SMOKE, "steps", 300)
    monkeypatch.setitem(vision.SMOKE, "batch", 32)
    result = run(folder, optimizer, lr)
    assert result["accuracy"] > 0.9
    assert max(result["train_loss"], result["validation_loss"], result["test_loss"]) < 0.5
    assert result["curve"][0][1] > 2 > result["curve"][-1][1]
    assert len(result["curve"]) <= vision.POINTS


@pytest.mark.parametrize("optimizer", ["momentum", "sgd-momentum", "muon"])
def test_a_run_that_diverges_says_so_and_stops(folder: str, optimizer: str) -> None:
    result = run(folder, optimizer, 1e30)
    assert result.keys() == KEYS
    assert result["diverged"]
    assert result["steps"] < vision.SMOKE["steps"]
    assert result["train_loss"] is result["validation_loss"] is result["test_loss"] is result["accuracy"] is None
    json.dumps(result, allow_nan=False)


def coded(count: int) -> torch.Tensor:
    """Images (N, 3, 8, 8) in which every pixel of a colour differs from its neighbours."""
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def data_of(images: torch.Tensor) -> vision.Data:
    split = vision.Split(images, torch.arange(len(images)))
    return vision.Data(split, split, split, torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25))


def test_a_batch_holds_shifted_and_flipped_images() -> None:
    setting = vision.Setting(patch=4, shift=2, flip=True, steps=1, batch=300)
    data = data_of(coded(20))
    images, labels = vision._batch(data, setting, torch.Generator().manual_seed(0))
    plain = vision._standardised(data, data.train.images)
    assert torch.allclose(plain[3], (coded(20)[3] / 255 - 0.5) / 0.25)
    padded = torch.nn.functional.pad(plain, [2] * 4)  # zero is the mean
    kinds = set()
    for image, label in zip(images, labels.tolist(), strict=True):
        found = [
            (row, column, flip)
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, padded[label, :, row : row + 8, column : column + 8])
        ]
        assert len(found) == 1
        kinds |= set(found)
    assert len(kinds) == 50  # every shift, either way round
    assert len(labels.unique()) == 20


def test_without_augmentation_a_batch_holds_the_images_themselves() -> None:
    data = data_of(coded(20))
    setting = vision.Setting(patch=4, shift=0, flip=False, steps=1, batch=30)
    images, labels = vision._batch(data, setting, torch.Generator().manual_seed(0))
    assert torch.equal(images, vision._standardised(data, data.train.images[labels]))


def test_held_out_images_are_the_last_and_never_trained_on(folder: str) -> None:
    data = vision._read(folder, "mnist")
    pixels, labels = drawn(600, 0)
    assert len(data.train.labels) == len(data.validation.labels) == 300  # of a small set the half, else 5,000
    assert np.array_equal(data.validation.images[:, 0].numpy(), pixels[300:])
    assert np.array_equal(data.train.labels.numpy(), labels[:300])
    standard = vision._standardised(data, data.train.images)
    assert abs(standard.mean().item()) < 1e-5
    assert standard.std().item() == pytest.approx(1, abs=1e-4)


def test_the_losses_are_those_of_their_splits(folder: str) -> None:
    data = vision._read(folder, "mnist")
    model = vision._model(vision.SETTINGS["mnist"], data.train.images.shape)
    result = vision._measure(model, data, 150, False)
    with torch.no_grad():
        logits = model(pixel_values=vision._standardised(data, data.test.images[:150])).logits
    expected = torch.nn.functional.cross_entropy(logits, data.test.labels[:150]).item()
    assert result["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == data.test.labels[:150]).float().mean().item())
    assert len({result["train_loss"], result["validation_loss"], result["test_loss"]}) == 3


@pytest.mark.parametrize("steps", [6, 40])
def test_the_schedule_is_one_for_all_groups(steps: int) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 4))
    for name in ("adamw", "m3"):
        optimizer = build(name, model, 0.1, 0.0)
        peaks = [group["lr"] for group in optimizer.param_groups]
        scheduler = vision._schedule(optimizer, steps)
        shares = []
        for _ in range(steps):
            share = {round(g["lr"] / peak, 9) for g, peak in zip(optimizer.param_groups, peaks, strict=True)}
            assert len(share) == 1
            shares.append(share.pop())
            optimizer.step()
            scheduler.step()
        warmup = steps // 10 or 1
        assert shares[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
        cosine = [(1 + math.cos(math.pi * i / (steps - warmup))) / 2 for i in range(steps - warmup)]
        assert shares[warmup:] == pytest.approx(cosine, abs=1e-8)


def test_settings_fit_their_images() -> None:
    assert set(vision.SETTINGS) == {"mnist", "cifar10"}
    for name, side in (("mnist", 28), ("cifar10", 32)):
        assert side % vision.SETTINGS[name].patch == 0


def test_available(folder: str, tmp_path: Path) -> None:
    assert vision.available(None) == []
    assert vision.available(str(tmp_path)) == []
    assert vision.available(folder) == ["mnist"]
    with pytest.raises(UserError, match="is not a folder"):
        vision.available(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("adamm", 0.1, 0, "smoke", "DATA", "mnist"), "unknown optimizer 'adamm'; did you mean 'adamw'"),
        (("adamw", 0.1, 0, "smok", "DATA", "mnist"), "unknown scale 'smok'; did you mean 'smoke'"),
        (("adamw", 0.1, 0, "smoke", "DATA", "cifar"), "unknown dataset 'cifar'; did you mean 'cifar10'"),
        (("adamw", 0.1, 0, "smoke", None, "mnist"), "give the folder that holds train-images"),
        (("adamw", 0.1, 0, "smoke", "DATA", "cifar10"), "holds no cifar10"),
        (("adamw", -1.0, 0, "smoke", "DATA", "mnist"), "adamw got lr=-1.0: it must be a finite number"),
    ],
)
def test_mistakes_are_one_line(folder: str, arguments: tuple, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        vision.train(*(folder if argument == "DATA" else argument for argument in arguments))
    assert "\n" not in str(caught.value)
