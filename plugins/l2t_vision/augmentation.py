"""The standard augmentation of small images: random crops after padding, and mirroring.

He et al. 2016, section 4.2: 4 pixels are padded on each side, and a crop of the old size is taken
from the padded image or its mirror image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_core.registry import Registry


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
