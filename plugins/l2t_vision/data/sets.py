"""Image data sets as tensors, in fixed splits: dev is cut off train once and never leaks.

Images stay unsigned bytes [N, C, H, W] and are standardised batch by batch, by the mean and
deviation of the training images' channels; labels are long [N]. The splits are stratified by
class and belong to the task: they follow ``data_seed`` and never a run's seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.registry import Registry
from l2t_core.runs.files import from_home
from l2t_core.user_code import FAILURES, imported, is_import_path
from l2t_vision.data.cifar import CIFAR10, CIFAR100, load_cifar
from l2t_vision.data.corruption import label_confusion, long_tail, noisy_labels
from l2t_vision.data.idx import load_idx_set
from l2t_vision.data.image_folder import load_image_folder
from l2t_vision.data.raw import ImagesAndLabels, RawImages, checked_splits
from l2t_vision.recipe import ImageSpec

DIGITS_TEST_SEED = 20181027
DIGITS_TEST_SIZE = 500


@dataclass(frozen=True)
class ImageData:
    """Training, dev and test images, unsigned bytes [N, C, H, W], with their labels [N].

    ``mean`` and ``deviation`` [C] are those of the training pixels as stored (0-255, or 0-16 for
    digits). ``confusion`` [K, K], float64, is the share of training images of class k that are
    labelled j. ``class_names`` are the classes' folders; empty where they have none. ``notes`` are
    lines on what of the source is left out.
    """

    train_x: Tensor
    train_y: Tensor
    dev_x: Tensor
    dev_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    mean: Tensor
    deviation: Tensor
    confusion: Tensor
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def standardised(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return unsigned bytes [N, C, H, W] as numbers of mean 0 and deviation 1 on train."""
        mean, deviation = (
            values.to(dtype).view(-1, 1, 1) for values in (self.mean, self.deviation)
        )
        return images.to(dtype).sub_(mean).div_(deviation)

    def to(self, device: torch.device | str) -> ImageData:
        """Return the same data on ``device``."""
        moved = {
            item.name: getattr(self, item.name).to(device)
            for item in dataclasses.fields(self)
            if isinstance(getattr(self, item.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


# From (folder, recipe section) to the data set.
LOADERS: Registry[Callable[[Path, ImageSpec], RawImages]] = Registry("image data set")


@LOADERS.register("digits")
def load_digits(folder: Path, spec: ImageSpec) -> RawImages:
    """Return scikit-learn's 1,797 handwritten digits, 8 by 8 (Alpaydin and Kaynak 1998).

    500 of them are the test set, the same whatever the seed. The package holds them all, so
    ``folder`` is not used.
    """
    from sklearn.datasets import load_digits as from_sklearn

    found = from_sklearn()
    x = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(found.target).long()
    order = stratified_order(y, DIGITS_TEST_SEED)
    test, rest = order[:DIGITS_TEST_SIZE], order[DIGITS_TEST_SIZE:]
    return RawImages(x[rest], y[rest], x[test], y[test], 10)


LOADERS.register("mnist")(lambda folder, spec: load_idx_set(folder, "mnist"))
LOADERS.register("fashion-mnist")(lambda folder, spec: load_idx_set(folder, "fashion-mnist"))
LOADERS.register("cifar10")(lambda folder, spec: load_cifar(folder, CIFAR10))
LOADERS.register("cifar100")(lambda folder, spec: load_cifar(folder, CIFAR100))
LOADERS.register("images")(lambda folder, spec: load_image_folder(folder, spec.size))


def own_data(folder: Path, spec: ImageSpec) -> RawImages:
    """Return the data set of the user's own function ``spec.data``, ``module:function``.

    It is called as ``function(folder, train=True)`` and ``function(folder, train=False)`` and
    returns images and labels, as a pair or as attributes ``data`` and ``targets``; so do
    torchvision's classes: ``data: torchvision.datasets:KMNIST``. Images are unsigned bytes,
    [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 or 3.

    Raises:
        UserError: if there is no such function, or it returns something else.
    """
    function = imported(spec.data, "image.data")
    splits: list[ImagesAndLabels] = []
    for train in (True, False):
        try:
            found: Any = function(str(folder), train=train)
            images, labels = found if isinstance(found, tuple) else (found.data, found.targets)
            splits.append((_unsigned_bytes(images), _class_numbers(labels)))
        except FAILURES as error:
            raise UserError(
                f"image.data {spec.data} failed ({type(error).__name__}: {error}); it is called "
                "as function(folder, train=True) and returns images and labels"
            ) from error
    train_split, test_split = splits
    classes = max((int(y.max()) for _, y in splits if len(y)), default=0) + 1
    return checked_splits(f"image.data {spec.data}", train_split, test_split, classes)


def _class_numbers(labels: Any) -> Tensor:
    """Return labels [N] as whole numbers from 0 on."""
    tensor = torch.as_tensor(labels).flatten()
    whole = tensor.long()
    if not torch.equal(whole.to(tensor.dtype), tensor):
        raise TypeError("labels are not whole numbers")
    if bool((whole < 0).any()):
        raise TypeError(f"a label is {int(whole.min())}; classes are numbered from 0 on")
    return whole


def _unsigned_bytes(images: Any) -> Tensor:
    """Return images of the layouts above as unsigned bytes [N, C, H, W]."""
    tensor = torch.as_tensor(images)
    if tensor.dtype != torch.uint8:
        raise TypeError(f"images are {tensor.dtype}, expected unsigned bytes (uint8)")
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    elif tensor.ndim == 4 and tensor.shape[1] not in (1, 3):
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        raise TypeError(f"images have the shape {list(tensor.shape)}")
    return tensor.contiguous()


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


def load_data(spec: ImageSpec) -> ImageData:
    """Return the data set that ``spec`` names, split and corrupted as it says, on the CPU.

    Raises:
        UserError: if the name is unknown, the files unusable or the sizes impossible.
    """
    loader = own_data if is_import_path(spec.data) else LOADERS.get(spec.data)
    raw = loader(from_home(spec.folder or f"data/{spec.data}"), spec)
    left = len(raw.train_y) - spec.dev_size
    if left < max(1, spec.train_size):
        asked = f"image.dev_size {spec.dev_size} leaves none to learn from; make it"
        if spec.train_size:
            asked = f"image.dev_size {spec.dev_size} and image.train_size {spec.train_size} do not "
            asked += "fit; make them"
        raise UserError(
            f"{spec.data} has {len(raw.train_y)} images outside its test set: {asked} smaller"
        )
    order = stratified_order(raw.train_y, spec.data_seed + 1)
    dev, train = order.split([spec.dev_size, left])
    train, train_y = _corrupted(train[: spec.train_size or left], raw, spec, spec.data_seed + 2)
    dev_y = raw.train_y[dev]
    if spec.corrupt_dev:
        dev, dev_y = _corrupted(dev, raw, spec, spec.data_seed + 3)
    trusted, dev = dev[: spec.trusted], dev[spec.trusted :]
    trusted_y, dev_y = dev_y[: spec.trusted], dev_y[spec.trusted :]
    if not len(dev):
        raise UserError(
            f"image.trusted {spec.trusted} takes all that image.imbalance leaves of dev; make it "
            "smaller"
        )
    if spec.only_trusted:
        train, train_y = trusted, trusted_y
    else:
        train, train_y = torch.cat([train, trusted]), torch.cat([train_y, trusted_y])
    confusion = label_confusion(raw.train_y[train], train_y, raw.num_classes)
    train_x = raw.train_x[train]
    mean, deviation = _pixel_statistics(train_x)
    return ImageData(
        train_x, train_y, raw.train_x[dev], dev_y, raw.test_x, raw.test_y,
        raw.num_classes, mean, deviation, confusion, raw.class_names, raw.notes,
    )


def _corrupted(
    indices: Tensor, raw: RawImages, spec: ImageSpec, seed: int
) -> tuple[Tensor, Tensor]:
    """Return those of ``indices`` that stay, and their labels, wrong ones among them."""
    indices = indices[long_tail(raw.train_y[indices], spec.imbalance, raw.num_classes)]
    labels = noisy_labels(
        raw.train_y[indices], spec.label_noise, spec.noise, raw.num_classes,
        torch.Generator().manual_seed(seed),
    )
    return indices, labels


def _pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation [C] of unsigned bytes [N, C, H, W], exactly, from histograms."""
    values = torch.arange(256, dtype=torch.float64)
    found = []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
        found.append((mean, math.sqrt(variance) or 1.0))
    means, deviations = torch.tensor(found, dtype=torch.float64).unbind(1)
    return means, deviations
