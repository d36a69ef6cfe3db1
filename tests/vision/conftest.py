"""Small MNIST-like folders, and students on data made on the spot."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idx_files import idx  # type: ignore[import-not-found]

from l2t_core.specs import OptimiserSpec, ScheduleSpec
from l2t_vision.data.sets import ImageData
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import ImageStudent


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """Return a folder with 60 training and 20 test images of 6 x 5 pixels in MNIST's format.

    Pixel (0, 0) of training image i is i. Two files are gzipped, two plain.
    """
    folder = tmp_path / "mnist"
    folder.mkdir()
    draw = np.random.default_rng(1)
    train = draw.integers(0, 256, (60, 6, 5))
    train[:, 0, 0] = np.arange(60)
    files = {
        "train-images-idx3-ubyte.gz": train,
        "train-labels-idx1-ubyte": np.arange(60) % 10,
        "t10k-images-idx3-ubyte": draw.integers(0, 256, (20, 6, 5)),
        "t10k-labels-idx1-ubyte.gz": np.arange(20) % 10,
    }
    for name, array in files.items():
        content = idx(array)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


@pytest.fixture
def make_student() -> Callable[..., ImageStudent]:
    """Return a function (shape, **settings of ImageSpec) -> student on 40 random images."""

    def make(shape: tuple[int, int, int] = (1, 8, 8), **settings: Any) -> ImageStudent:
        generator = torch.Generator().manual_seed(3)

        def images(count: int) -> torch.Tensor:
            return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)

        def labels(count: int) -> torch.Tensor:
            return torch.randint(0, 4, (count,), generator=generator)

        mean, deviation = torch.full((2, shape[0]), 128.0).double()
        data = ImageData(
            images(40), labels(40), images(30), labels(30), images(20), labels(20), 4,
            mean, deviation / 2, torch.eye(4).double(),
        )
        spec = ImageSpec(
            **{
                "hidden": 12,
                "batch_size": 8,
                "steps": 10,
                "dev_interval": 4,
                "optimiser": OptimiserSpec("momentum", 0.1),
                "schedule": ScheduleSpec("linear"),
                **settings,
            }
        )
        return ImageStudent(spec, data)

    return make
