"""Images: what is written is read back, and every damaged or missing file is one line that names it."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nestlearn.data.images import BATCHES, LABELS, MNIST, find_image_sets, load_images
from nestlearn.errors import UserError


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> None:
    """Images uint8 (N, 28, 28) and labels (N,) in the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(MNIST, (*train, *test), strict=True):
        (folder / name).write_bytes(gzip.compress(idx(array.astype(np.uint8)), mtime=0))


def random_images(count: int, seed: int = 0, shape: tuple[int, ...] = (28, 28)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(0, 10, count)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "mnist", random_images(12), random_images(5, 1))
    return tmp_path / "mnist"


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """Five batches of two images and three for the test, as the package unpacks."""
    folder = tmp_path / "cifar" / "package"
    folder.mkdir(parents=True)
    for number, name in enumerate(BATCHES):
        pixels, _ = random_images(3 if name == BATCHES[-1] else 2, number, (1024, 3))
        Image.fromarray(pixels).save(folder / name)
    for name, labels in zip(LABELS, ([*range(10)], [9, 0, 4]), strict=True):
        (folder / name).write_text(json.dumps(labels))
    return folder


def test_mnist_is_read_back(mnist: Path) -> None:
    loaded = load_images(mnist, "mnist")
    pixels, labels = random_images(12)
    assert loaded.train.shape == (12, 1, 28, 28)
    assert loaded.train.dtype == torch.uint8
    assert np.array_equal(loaded.train[:, 0].numpy(), pixels)
    assert loaded.train_labels.tolist() == labels.tolist()
    assert np.array_equal(loaded.test[:, 0].numpy(), random_images(5, 1)[0])


def test_cifar_is_read_back_by_row_and_channel(cifar10: Path) -> None:
    loaded = load_images(cifar10, "cifar10")
    assert loaded.train.shape == (10, 3, 32, 32)
    assert loaded.test.shape == (3, 3, 32, 32)
    row = random_images(2, 1, (1024, 3))[0][1]  # the second image of the second batch
    assert loaded.train[3, 2, 5, 7].item() == row[5 * 32 + 7, 2]
    assert loaded.train_labels.tolist() == [*range(10)]
    assert loaded.test_labels.tolist() == [9, 0, 4]


def test_sets_are_found_in_the_folder_and_below(mnist: Path, cifar10: Path) -> None:
    assert find_image_sets(mnist.parent) == {"cifar10": cifar10, "mnist": mnist}
    assert find_image_sets(mnist) == {"mnist": mnist}
    assert find_image_sets(cifar10) == find_image_sets(cifar10.parent) == {"cifar10": cifar10}
    assert load_images(mnist.parent, "mnist").test.shape == (5, 1, 28, 28)


def test_the_real_digits(shared_data: Path) -> None:
    loaded = load_images(shared_data, "mnist")
    assert loaded.train.shape == (60_000, 1, 28, 28)
    assert loaded.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    ones, zeros = (loaded.test[loaded.test_labels == digit].float() for digit in (1, 0))
    assert ones.mean() < 0.6 * zeros.mean()  # a one has less ink than a zero


def one_line(folder: Path, name: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_images(folder, name)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(mnist: Path, cifar10: Path, tmp_path: Path) -> None:
    one_line(tmp_path / "absent", "mnist", "absent.* is not a folder")
    one_line(mnist, "cifar10", "holds no cifar10: give the folder with data_batch_1.png")
    one_line(mnist, "minst", "unknown images 'minst'; did you mean 'mnist'")
    (mnist / MNIST[3]).unlink()
    one_line(mnist, "mnist", f"has no {MNIST[3]}")
    (cifar10 / BATCHES[2]).unlink()
    one_line(cifar10, "cifar10", f"has no {BATCHES[2]}")


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((12, 28), np.uint8), "no IDX file of bytes with 3 axes"),
        (np.zeros((12, 32, 32), np.uint8), "shape is .12, 32, 32.: images are of 28 by 28 pixels"),
        (np.zeros((11, 28, 28), np.uint8), "has 11 images and .* 12 labels"),
    ],
)
def test_images_of_another_shape_are_refused(mnist: Path, array: np.ndarray, match: str) -> None:
    (mnist / MNIST[0]).write_bytes(gzip.compress(idx(array)))
    one_line(mnist, "mnist", match)


def test_a_length_that_differs_from_the_header_is_refused(mnist: Path) -> None:
    whole = idx(random_images(12)[0])
    for content in (whole[:-1], whole + b"\0"):
        (mnist / MNIST[0]).write_bytes(gzip.compress(content))
        one_line(mnist, "mnist", "bytes where the shape .* is announced")


def test_labels_beyond_nine_are_refused(mnist: Path, cifar10: Path) -> None:
    (mnist / MNIST[1]).write_bytes(gzip.compress(idx(np.full(12, 10, np.uint8))))
    one_line(mnist, "mnist", "label 10, beyond 9")
    for labels in ([*range(9), 10], [*range(9), -1], [*range(9), True], [*range(9), 1.0], {"a": 1}):
        (cifar10 / LABELS[0]).write_text(json.dumps(labels))
        one_line(cifar10, "cifar10", "no list of labels from 0 to 9")
    (cifar10 / LABELS[0]).write_text(json.dumps([*range(9)]))
    one_line(cifar10, "cifar10", "has 10 images and .* 9 labels")
    (cifar10 / LABELS[0]).write_bytes(b"\xff[1")
    one_line(cifar10, "cifar10", "train_lables.json is damaged .it is no JSON")


def test_a_picture_of_another_kind_is_refused(cifar10: Path) -> None:
    for pixels in (np.zeros((2, 1024), np.uint8), np.zeros((2, 1023, 3), np.uint8), np.zeros((2, 1024, 4), np.uint8)):
        Image.fromarray(pixels).save(cifar10 / BATCHES[1])
        one_line(cifar10, "cifar10", f"{BATCHES[1]} is damaged .its shape")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_any_damage_is_one_line_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    if name == "mnist":
        write_mnist(folder, random_images(2), random_images(2, 1))
        path = folder / data.draw(st.sampled_from(MNIST))
    else:
        for batch in BATCHES:
            Image.fromarray(np.zeros((1, 1024, 3), np.uint8)).save(folder / batch)
        for labels, count in zip(LABELS, (5, 1), strict=True):
            (folder / labels).write_text(json.dumps([0] * count))
        path = folder / data.draw(st.sampled_from([*BATCHES, *LABELS]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    message = ""
    try:
        loaded = load_images(folder, name)
    except UserError as error:
        message = str(error)
    if message:
        assert "\n" not in message
        assert path.name in message
    else:
        assert len(loaded.train) == len(loaded.train_labels)
        assert loaded.train_labels.max() < 10
