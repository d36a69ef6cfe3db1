"""MNIST with other numbers of classes, for teachers that fit any: its first five digits, and pairs.

    PYTHONPATH=tests/benchmarks l2t compare mnist-mlp-noise40 image.data=other_classes:pairs ...

A pair is two digits side by side, each at half its width: a hundred classes, 60,000 images to
learn from, 10,000 for the test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from l2t_vision.data.idx import find_idx, read_idx

Images = tuple[np.ndarray, np.ndarray]


def _mnist(folder: str, train: bool) -> Images:
    part = "train" if train else "t10k"
    images = read_idx(find_idx(Path(folder), f"{part}-images-idx3-ubyte"), 3)
    return images, read_idx(find_idx(Path(folder), f"{part}-labels-idx1-ubyte"), 1)


def five(folder: str, train: bool) -> Images:
    """Return bytes [N, 28, 28] and labels [N] of the digits 0 to 4."""
    images, labels = _mnist(folder, train)
    return images[labels < 5], labels[labels < 5]


def pairs(folder: str, train: bool) -> Images:
    """Return bytes [N, 28, 28] and labels [N] from 0 to 99: ten times the left digit, the right."""
    images, labels = _mnist(folder, train)
    narrow = images.reshape(-1, 28, 14, 2).mean(3).round().astype(np.uint8)
    first, second = np.random.default_rng(int(train)).integers(0, len(labels), (2, len(labels)))
    both = np.concatenate([narrow[first], narrow[second]], 2)
    return both, 10 * labels[first].astype(np.int64) + labels[second]
