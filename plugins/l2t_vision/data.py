"""Image data sets as tensors, in fixed splits: dev is cut off train once and never leaks.

Images are float32 [N, C, H, W], standardised by the training images' mean and deviation; labels
are long [N].
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from l2t_core.errors import UserError
from l2t_core.registry import Registry
from torch import Tensor

# The splits belong to the task, not to a run: they never depend on a run's seed.
SPLIT_SEED = 20181027


@dataclass(frozen=True)
class ImageData:
    """Training, dev and test images [N, C, H, W] with their labels [N]."""

    train_x: Tensor
    train_y: Tensor
    dev_x: Tensor
    dev_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


Raw = tuple[Tensor, Tensor, Tensor, Tensor]  # images, labels, test images, test labels
LOADERS: Registry[Callable[[Path], Raw]] = Registry("image data set")

MNIST_FILES = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


@LOADERS.register("digits")
def load_digits(folder: Path) -> Raw:
    """Return scikit-learn's 1,797 handwritten digits, 8 by 8 (Alpaydin and Kaynak 1998).

    A third is the test set; the package holds them all, so ``folder`` is not used.
    """
    from sklearn.datasets import load_digits as from_sklearn

    found = from_sklearn()
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 16.0
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, rest = order[:500], order[500:]
    return x[rest], y[rest], x[test], y[test]


@LOADERS.register("mnist")
def load_mnist(folder: Path) -> Raw:
    """Return MNIST from the four IDX files in ``folder``, gzipped or plain.

    Raises:
        UserError: if the folder or a file is missing, cut short or no MNIST file.
    """
    if not folder.is_dir():
        raise UserError(
            f"no data folder {folder}; prepare it with `l2t data prepare mnist --out {folder}`"
        )
    arrays = [read_idx(find_idx(folder, name), dims) for name, dims in MNIST_FILES.items()]
    train_x, train_y, test_x, test_y = (torch.from_numpy(a) for a in arrays)
    for name, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if len(x) != len(y) or not len(y) or int(y.max()) > 9:
            raise UserError(
                f"{folder}: {len(x)} {name} images do not go with its {len(y)} labels; prepare "
                "it again with `l2t data prepare mnist`"
            )
    return (
        train_x.float().unsqueeze(1) / 255.0, train_y.long(),
        test_x.float().unsqueeze(1) / 255.0, test_y.long(),
    )


def find_idx(folder: Path, name: str) -> Path:
    """Return the file ``name`` in ``folder``, gzipped or plain.

    Raises:
        UserError: if neither is there.
    """
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return path
    raise UserError(
        f"{folder} holds no {name}.gz; prepare it with `l2t data prepare mnist --out {folder}`"
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
        raise UserError(f"{path} is damaged or cut short ({error}); get it again") from error


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file of ``dimensions`` axes (LeCun's MNIST format).

    Raises:
        UserError: if it is no such file or cut short.
    """
    content = idx_bytes(path)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < 4 + 4 * dimensions:
        raise UserError(f"{path} is no IDX file of {dimensions} dimensions; get it again")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    expected = 4 + 4 * dimensions + int(np.prod(shape))
    if len(content) != expected:
        raise UserError(
            f"{path} is cut short: {len(content)} bytes instead of {expected}; get it again"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def load_data(
    name: str, folder: Path, *, train_size: int, dev_size: int, label_noise: float
) -> ImageData:
    """Return a data set, split and standardised; ``train_size`` 0 takes all that dev leaves.

    Raises:
        UserError: if the name is unknown, the files unusable or the sizes impossible.
    """
    x, y, test_x, test_y = LOADERS.get(name)(folder)
    if dev_size <= 0:
        raise UserError(
            f"image.dev_size is {dev_size}: the dev set is empty, and the teacher learns from it; "
            "give it some hundreds of examples"
        )
    left = len(y) - dev_size
    if left < max(1, train_size):
        raise UserError(
            f"{name} has {len(y)} training images: image.dev_size {dev_size} and "
            f"image.train_size {train_size or 1} do not fit; make them smaller"
        )
    if not 0.0 <= label_noise <= 1.0:
        raise UserError(f"image.label_noise is {label_noise}; it must lie in [0, 1]")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED + 1))
    dev, train = order[:dev_size], order[dev_size : dev_size + (train_size or left)]
    mean, deviation = x[train].mean(), x[train].std()
    classes = int(torch.cat([y, test_y]).max()) + 1
    return ImageData(
        (x[train] - mean) / deviation,
        with_label_noise(y[train], label_noise, classes),
        (x[dev] - mean) / deviation,
        y[dev],
        (test_x - mean) / deviation,
        test_y,
        classes,
    )


def with_label_noise(labels: Tensor, fraction: float, num_classes: int) -> Tensor:
    """Return ``labels`` with each replaced, with probability ``fraction``, by a uniform class."""
    generator = torch.Generator().manual_seed(SPLIT_SEED + 2)
    noisy = torch.rand(len(labels), generator=generator) < fraction
    drawn = torch.randint(0, num_classes, (len(labels),), generator=generator)
    return torch.where(noisy, drawn, labels)
