"""Image data sets as tensors, in fixed splits: dev is cut off train once and never leaks.

Images are float32 [N, C, H, W], standardised by the training images' mean and deviation; labels
are long [N]. The splits are stratified by class and belong to the task: they never depend on a
run's seed.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.registry import Registry

SPLIT_SEED = 20181027
DIGITS_TEST_SIZE = 500

MNIST_FILES = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


@dataclass(frozen=True)
class ImageData:
    """Training, dev and test images [N, C, H, W] with their labels [N].

    ``mean`` and ``deviation`` are those of the training pixels as stored (0-255 for MNIST, 0-16
    for digits); all images are standardised by them.
    """

    train_x: Tensor
    train_y: Tensor
    dev_x: Tensor
    dev_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class RawImages:
    """A data set as it comes: unsigned bytes [N, C, H, W] and long labels [N]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


LOADERS: Registry[Callable[[Path], RawImages]] = Registry("image data set")


@LOADERS.register("digits")
def load_digits(folder: Path) -> RawImages:
    """Return scikit-learn's 1,797 handwritten digits, 8 by 8 (Alpaydin and Kaynak 1998).

    500 of them are the test set. The package holds them all, so ``folder`` is not used.
    """
    from sklearn.datasets import load_digits as from_sklearn

    found = from_sklearn()
    x = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(found.target).long()
    order = stratified_order(y, SPLIT_SEED)
    test, rest = order[:DIGITS_TEST_SIZE], order[DIGITS_TEST_SIZE:]
    return RawImages(x[rest], y[rest], x[test], y[test], 10)


@LOADERS.register("mnist")
def load_mnist(folder: Path) -> RawImages:
    """Return MNIST from the four IDX files in ``folder``, gzipped or plain.

    Raises:
        UserError: if the folder or a file is missing, cut short, or not of MNIST's kind.
    """
    if not folder.is_dir():
        raise UserError(
            f"no data folder {folder}; prepare it with `l2t data prepare mnist --out {folder}`"
        )
    paths = [find_idx(folder, name) for name in MNIST_FILES]
    arrays = [read_idx(p, dims) for p, dims in zip(paths, MNIST_FILES.values(), strict=True)]
    train_x, train_y, test_x, test_y = (torch.from_numpy(array) for array in arrays)
    for x, y, images, labels in (
        (train_x, train_y, paths[0], paths[1]),
        (test_x, test_y, paths[2], paths[3]),
    ):
        if len(x) != len(y) or not len(y):
            raise UserError(
                f"{images} holds {len(x)} images and {labels.name} {len(y)} labels; {_mend(folder)}"
            )
        if int(y.max()) > 9:
            raise UserError(
                f"{labels}: label {int(y.max())} is out of range, digits are 0 to 9; "
                f"{_mend(folder)}"
            )
    if train_x.shape[1:] != test_x.shape[1:]:
        raise UserError(
            f"{folder}: training images are {_size(train_x)} pixels and test images "
            f"{_size(test_x)}; {_mend(folder)}"
        )
    return RawImages(
        train_x.unsqueeze(1), train_y.long(), test_x.unsqueeze(1), test_y.long(), 10
    )


def find_idx(folder: Path, name: str) -> Path:
    """Return the file ``name`` in ``folder``, gzipped or plain.

    Raises:
        UserError: if neither is there.
    """
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(
        f"{folder} holds neither {name}.gz nor {name}; prepare a folder with "
        "`l2t data prepare mnist`"
    )


def idx_bytes(path: Path) -> bytes:
    """Return the uncompressed content of an IDX file.

    Raises:
        UserError: if it cannot be read or its compression is damaged.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read or is cut short ({error}); {_mend(path.parent)}"
        ) from error


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file of ``dimensions`` axes (LeCun's MNIST format).

    Raises:
        UserError: if it is no such file or has another length than its header says.
    """
    content = idx_bytes(path)
    start = 4 + 4 * dimensions
    # Two zeros, the type (8: unsigned byte), the number of axes; then each axis's length.
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise UserError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions; {_mend(path.parent)}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise UserError(
            f"{path} is {'cut short' if len(content) < expected else 'too long'}: "
            f"{len(content)} bytes, its header says {expected}; {_mend(path.parent)}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return a random order [N] of which every stretch has the classes in about equal shares.

    The members of a class of size n, shuffled, stand at (i + u) / n with one u in [0, 1) for each
    class: any stretch of the order holds its share of each class, give or take one.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        place[shuffled] = (torch.arange(len(members)) + offset) / len(members)
    return place.argsort()


def load_data(
    name: str, folder: Path, *, train_size: int, dev_size: int, label_noise: float
) -> ImageData:
    """Return a data set, split and standardised; ``train_size`` 0 takes all that dev leaves.

    Raises:
        UserError: if the name is unknown, the files unusable or the sizes impossible.
    """
    if dev_size <= 0:
        raise UserError(
            f"image.dev_size is {dev_size}: the dev set is empty, and the teacher learns from it; "
            "give it some hundreds of examples"
        )
    if train_size < 0:
        raise UserError(f"image.train_size is {train_size}; 0 takes all that dev leaves")
    if not 0.0 <= label_noise <= 1.0:
        raise UserError(f"image.label_noise is {label_noise}; it must lie in [0, 1]")
    raw = LOADERS.get(name)(folder)
    left = len(raw.train_y) - dev_size
    if left < max(1, train_size):
        raise UserError(
            f"{name} has {len(raw.train_y)} images outside its test set: image.dev_size {dev_size} "
            f"and image.train_size {train_size or 1} do not fit; make them smaller"
        )
    order = stratified_order(raw.train_y, SPLIT_SEED + 1)
    dev, train = order[:dev_size], order[dev_size : dev_size + (train_size or left)]
    train_x, train_y = raw.train_x[train], raw.train_y[train]
    mean, deviation = _pixel_statistics(train_x)

    def standardised(images: Tensor) -> Tensor:
        return images.float().sub_(mean).div_(deviation)

    return ImageData(
        standardised(train_x),
        with_label_noise(train_y, label_noise, raw.num_classes),
        standardised(raw.train_x[dev]),
        raw.train_y[dev],
        standardised(raw.test_x),
        raw.test_y,
        raw.num_classes,
        mean,
        deviation,
    )


def with_label_noise(labels: Tensor, fraction: float, num_classes: int) -> Tensor:
    """Return ``labels`` [N], each replaced with probability ``fraction`` by a uniform class.

    Symmetric noise: the drawn class may be the true one, so 1 - fraction * (K - 1) / K of the
    labels stay right. The same labels get the same noise whenever asked.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED + 2)
    noisy = torch.rand(len(labels), generator=generator) < fraction
    drawn = torch.randint(0, num_classes, (len(labels),), generator=generator)
    return torch.where(noisy, drawn, labels)


def _pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of unsigned bytes, exactly, from their histogram."""
    counts = torch.bincount(images.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = float((counts * values).sum() / counts.sum())
    variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
    return mean, math.sqrt(variance) or 1.0


def _mend(folder: Path) -> str:
    return f"prepare it again with `l2t data prepare mnist --out {folder}`"


def _size(images: Tensor) -> str:
    return " x ".join(str(length) for length in images.shape[1:])
