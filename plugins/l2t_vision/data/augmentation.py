"""The standard augmentation of small images: random crops after padding, and mirroring.

He et al. 2016, section 4.2: 4 pixels are padded on each side, and a crop of the old size is taken
from the padded image or its mirror image.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.own_functions import comes_to_the_same
from l2t_core.registry import Registry
from l2t_core.user_code import FAILURES


@dataclass(frozen=True)
class Augmentation:
    """How far images may be shifted, in pixels, and whether half of them are mirrored."""

    padding: int
    mirrors: bool


AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation")
AUGMENTATIONS.register("none")(Augmentation(0, False))
AUGMENTATIONS.register("crop")(Augmentation(4, False))
AUGMENTATIONS.register("crop-flip")(Augmentation(4, True))


def augmented(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Return standardised ``images`` [N, C, H, W], each shifted and perhaps mirrored.

    What is shifted in is 0, the training images' mean. The numbers are drawn on the CPU, so that
    they are the same for images on any device.
    """
    if how == Augmentation(0, False):
        return images
    count, channels, height, width = images.shape
    span = 2 * how.padding + 1
    down, right = torch.randint(0, span, (2, count, 1), generator=generator)
    rows = torch.arange(height) + down  # [N, H], in the padded image
    columns = torch.arange(width) + right
    if how.mirrors:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    places = rows.unsqueeze(2) * (width + 2 * how.padding) + columns.unsqueeze(1)
    places = places.view(count, 1, -1).to(images.device).expand(-1, channels, -1)
    padded = F.pad(images, [how.padding] * 4).flatten(2)
    return padded.gather(2, places).view_as(images)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random numbers of torch, ``random`` and NumPy, and take them back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: without a GPU it formats its caller's stack, the most of the cost.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # it takes words of 32 bits
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def own_augmented(
    images: Tensor, function: Callable[[Tensor], Tensor], path: str, seed: int
) -> Tensor:
    """Return what the user's ``function``, named by ``path``, makes of bytes [N, C, H, W].

    It draws from the random numbers of torch, Python and NumPy, which are those of ``seed``
    meanwhile and afterwards as they were.

    Raises:
        UserError: if it fails or returns something else than such images.
    """
    with seeded(seed, images.device):
        try:
            found = function(images.clone())
        except FAILURES as error:
            raise UserError(
                f"image.augment {path} failed ({type(error).__name__}: {error}); it is called with "
                "images, unsigned bytes [N, C, H, W], and returns as many of the same size"
            ) from error
    if not (isinstance(found, Tensor) and found.shape == images.shape):
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"image.augment {path} returned {got} for images of {list(images.shape)}; it must "
            "keep their number and size"
        )
    if found.dtype != torch.uint8:
        raise UserError(
            f"image.augment {path} returned {found.dtype}; it must keep images unsigned bytes: "
            "they are standardised afterwards"
        )
    return found


def check_repeatable(images: Tensor, function: Callable[[Tensor], Tensor], path: str) -> None:
    """Refuse a function that makes something else of the same images and seed.

    Raises:
        UserError: so that no way back is walked on other batches than the way there.
    """
    if not comes_to_the_same(lambda: own_augmented(images, function, path, seed=1)):
        raise UserError(
            f"image.augment {path} gave two results from one seed, and a step must see the same "
            "images whenever it is replayed; draw from torch.rand and the like, random or "
            "numpy.random, not from a generator of your own or the time"
        )
