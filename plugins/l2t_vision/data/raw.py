"""A data set as it comes, before anything is cut off, drawn or standardised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from l2t_core.errors import UserError

ImagesAndLabels = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RawImages:
    """Training and test images, unsigned bytes [N, C, H, W], with their long labels [N].

    ``class_names`` are what its source calls the classes, in order; empty where it has numbers.
    ``notes`` are lines on what of the source is not among them.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def checked_splits(
    source: Path | str, train: ImagesAndLabels, test: ImagesAndLabels, num_classes: int,
    class_names: tuple[str, ...] = (),
) -> RawImages:
    """Return the data set from ``source``, once images and labels are found to fit.

    Raises:
        UserError: if there is one class only, a split is empty, its labels are not those of its
            images or out of range, or the images of the two splits differ in size.
    """
    if num_classes < 2:
        raise UserError(f"{source} holds one class only; two or more are needed")
    for split, (x, y) in (("training", train), ("test", test)):
        if len(x) != len(y) or not len(y):
            raise UserError(f"{source}: {len(x)} {split} images and {len(y)} labels")
        wrong = [int(label) for label in (y.min(), y.max()) if not 0 <= label < num_classes]
        if wrong:
            raise UserError(
                f"{source}: {split} label {wrong[0]} is out of range, {num_classes} classes are "
                f"0 to {num_classes - 1}"
            )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise UserError(
            f"{source}: training images are {_size(train[0])} and test images {_size(test[0])}"
        )
    return RawImages(*train, *test, num_classes, class_names)


def prepare_hint(name: str, folder: Path, again: bool = True) -> str:
    """Return what to do about a data set that is missing or damaged."""
    return f"prepare it {'again ' if again else ''}with `l2t data prepare {name} --out {folder}`"


def _size(images: Tensor) -> str:
    return " x ".join(str(length) for length in images.shape[1:])
