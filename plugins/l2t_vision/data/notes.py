"""What is odd about a data set's splits, though it can be trained on: for people to know."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from l2t_vision.data.sets import ImageData


def notes(data: ImageData, own: bool) -> list[str]:
    """Return its own, and a line for each split that lacks classes, or shares images with train.

    Shared images are looked for in the users' ``own`` data: the official sets hold some, and are
    what they are.
    """
    found = [*data.notes]
    for name, labels in (("training", data.train_y), ("dev", data.dev_y), ("test", data.test_y)):
        if missing := missing_classes(labels, data.num_classes):
            words = [data.class_names[k] for k in missing] if data.class_names else missing
            found.append(
                f"there are no {name} images of {_listed(words)} of {data.num_classes} classes"
                + ("" if data.class_names else ", counted from 0")
            )
    for name, images in (("dev", data.dev_x), ("test", data.test_x)) if own else ():
        if count := copies(images, data.train_x):
            found.append(
                f"{count} of {len(images)} {name} images are training images, too: their score is "
                "better than that of new ones; take the copies out"
            )
    return found


def missing_classes(labels: Tensor, num_classes: int) -> list[int]:
    """Return the classes of which ``labels`` [N] has none."""
    counts = torch.bincount(labels, minlength=num_classes)
    return [int(label) for label in (counts == 0).nonzero().squeeze(1)]


def copies(images: Tensor, others: Tensor) -> int:
    """Return how many of ``images`` [N, C, H, W] are among ``others`` [M, C, H, W], to the bit."""
    known = set(_digests(others))
    return sum(digest in known for digest in _digests(images))


def _digests(images: Tensor) -> list[bytes]:
    return [hashlib.sha256(image.tobytes()).digest() for image in images.cpu().numpy()]


def _listed(classes: Sequence[int | str]) -> str:
    """Return the first few of ``classes`` in words: ``2 (3, 7)`` or ``40 (0, 1, 2, 3, ...)``."""
    first = ", ".join(map(str, classes[:4]))
    return f"{len(classes)} ({first}{', ...' if len(classes) > 4 else ''})"
