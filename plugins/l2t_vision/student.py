"""The image student: what the teacher core needs to know of an image task."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from l2t_core.errors import UserError
from l2t_core.students.devices import find_device
from l2t_core.students.flat import refill
from l2t_core.students.optimisers import build_optimiser
from l2t_core.students.schedules import learning_rate
from l2t_core.students.state import (
    IMAGE_FEATURES,
    DevStatistics,
    dev_statistics,
    mean_prediction,
)
from l2t_core.user_code import imported, is_import_path
from l2t_vision.checks import problems
from l2t_vision.data.augmentation import (
    AUGMENTATIONS,
    augmented,
    check_repeatable,
    own_augmented,
    seeded,
)
from l2t_vision.data.notes import notes
from l2t_vision.data.sets import ImageData, load_data
from l2t_vision.identity import content
from l2t_vision.measures import build_measure
from l2t_vision.models.architectures import build_model, check_own, evaluated
from l2t_vision.recipe import ImageSpec

# Numbers that come in at once where no gradient is needed: 2,000 images of MNIST, 510 of CIFAR.
_EVALUATION_SIZE = 2000 * 28 * 28
# torch takes seeds of 64 bits; a user's seed times the steps may exceed them.
_SEEDS = 2**63
# Crops and dropout of one step are drawn from different numbers.
_AUGMENTATION = 0x5DEECE66D

Batch = tuple[Tensor, Tensor]


class ImageStudent:
    """A classifier on an image data set; implements :class:`l2t_core.students.protocol.Student`.

    It lives where ``data`` does: its module and all batches are on the data's device.
    """

    measure_name = "accuracy"
    default_features = IMAGE_FEATURES
    flat_remedy = (
        "saturated? look at the measure first (image.measure), and if it is sound lower the "
        "student's learning rate, or training.lr"
    )
    fixed_shapes = True  # every batch has the same shape: derivatives may be recorded

    def __init__(self, spec: ImageSpec, data: ImageData) -> None:
        self.spec = spec
        self.data = data
        self.num_classes = data.num_classes
        self.total_steps = spec.steps
        self.precision = spec.precision
        self.optimiser = build_optimiser(spec.optimiser)
        self.smoothed = build_measure(spec.measure, data.num_classes)
        channels, height, width = data.train_x.shape[1:]
        self.make = lambda: build_model((channels, height, width), data.num_classes, spec)
        self.own_augmentation: Callable[[Tensor], Tensor] | None = None
        if is_import_path(spec.augment):
            self.own_augmentation = imported(spec.augment, "image.augment")
            check_repeatable(data.train_x[:8], self.own_augmentation, spec.augment)
        known = "none" if self.own_augmentation else spec.augment
        self.augmentation = AUGMENTATIONS.get(known)
        if is_import_path(spec.model):
            some = data.standardised(data.train_x[: spec.batch_size]).cpu()
            check_own(self.make(), some, spec.model)
        self.module: nn.Module = self.make().to(data.train_x.device)
        self.seed = 0
        self._epoch: tuple[int, int, Tensor] | None = None  # seed, epoch, permutation
        self._latest: tuple[tuple[int, int, torch.dtype], Batch] | None = None

    def reset(self, seed: int) -> None:
        """Fill the module with fresh parameters and buffers; batches follow ``seed`` too."""
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = self.make()
        refill(self.module, fresh)

    def indices(self, step: int) -> Tensor:
        """Return which training images [batch_size] make ``step``; epochs are permutations."""
        size = self.spec.batch_size
        per_epoch = len(self.data.train_y) // size
        epoch, position = divmod(step, per_epoch)
        if self._epoch is None or self._epoch[:2] != (self.seed, epoch):
            generator = torch.Generator().manual_seed((self.seed * 100_003 + epoch) % _SEEDS)
            order = torch.randperm(len(self.data.train_y), generator=generator)
            self._epoch = (self.seed, epoch, order)
        return self._epoch[2][position * size : (position + 1) * size]

    def batch(self, step: int) -> Batch:
        """Return the images [N, C, H, W] of ``step``, standardised and augmented, and labels [N].

        They follow the student's seed and the step alone: the same whenever asked, on any device.
        """
        key = (self.seed, step, self._dtype())
        # The way back asks for each batch more than once.
        if self._latest is None or self._latest[0] != key:
            chosen = self.indices(step).to(self.data.train_x.device)
            images, seed = self.data.train_x[chosen], self.step_seed(step) ^ _AUGMENTATION
            if self.own_augmentation is not None:
                images = own_augmented(images, self.own_augmentation, self.spec.augment, seed)
            generator = torch.Generator().manual_seed(seed)
            images = augmented(self._images(images), self.augmentation, generator)
            self._latest = (key, (images, self.data.train_y[chosen]))
        return self._latest[1]

    def _dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def _images(self, images: Tensor) -> Tensor:
        return self.data.standardised(images, self._dtype())

    def step_seed(self, step: int) -> int:
        """Return the dropout seed of ``step``."""
        return (self.seed * 1_000_003 + step) % _SEEDS

    def predict(self, batch: Batch) -> Batch:
        """Return log-probabilities [N, K] and labels [N] in training mode."""
        images, labels = batch
        self.module.train()
        # In full precision: on a CPU autocast would leave the logarithms to eight bits.
        return torch.log_softmax(self.module(images), 1, self._dtype()), labels

    def learning_rate(self, step: int) -> float:
        """Return the rate of ``step``."""
        return learning_rate(
            self.spec.schedule, self.spec.optimiser.lr, step, self.total_steps
        )

    def _evaluated(self, images: Tensor) -> Tensor:
        """Return logits [N, K] of unsigned bytes, without dropout."""
        return evaluated(self.module, self._images(images), self.spec.model)

    def _log_probs(self, images: Tensor) -> Tensor:
        """Return log-probabilities [N, K] of unsigned bytes, without dropout and gradient."""
        size = max(1, _EVALUATION_SIZE // images[0].numel())
        with torch.no_grad():
            chunks = [self._evaluated(chunk) for chunk in images.split(size)]
        return torch.log_softmax(torch.cat(chunks), 1)

    def dev_statistics(self, step: int) -> DevStatistics | None:
        """Return statistics over the whole dev set every ``dev_interval`` steps."""
        if (step + 1) % self.spec.dev_interval:
            return None
        return self._on_dev()

    def _on_dev(self) -> DevStatistics:
        return dev_statistics(self._log_probs(self.data.dev_x), self.data.dev_y, self.num_classes)

    def at_end(self) -> DevStatistics:
        """Return statistics over the whole dev set, of the student as it was trained.

        Raises:
            FloatingPointError: if its nll is not finite: of finite parameters the logits may
                overflow, and argmax would take what is no number for a class.
        """
        found = self._on_dev()
        if not math.isfinite(found.nll):
            raise FloatingPointError("the student diverged at its last step")
        return found

    def dev_interval(self) -> int:
        """Return the steps between dev refreshes."""
        return self.spec.dev_interval

    def smoothed_measure(self, seed: int) -> Tensor:
        """Return M-tilde on ``dev_batch`` dev examples drawn by ``seed``, or on all."""
        images, labels = self.data.dev_x, self.data.dev_y
        if 0 < self.spec.dev_batch < len(labels):
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(labels), generator=generator)[: self.spec.dev_batch]
            images, labels = images[chosen], labels[chosen]
        log_probs = torch.log_softmax(self._evaluated(images), 1)
        if not is_import_path(self.spec.measure):
            return self.smoothed(log_probs, labels)
        with seeded(seed, images.device):  # one of the user's own may draw
            return self.smoothed(log_probs, labels)

    def true_measure(self) -> float:
        """Return dev accuracy in [0, 1]."""
        return _accuracy(self._log_probs(self.data.dev_x), self.data.dev_y)

    def test_error(self) -> float:
        """Return test error in [0, 1]; to be read once, when everything is decided."""
        return 1.0 - _accuracy(self._log_probs(self.data.test_x), self.data.test_y)

    def class_shares(self) -> Tensor:
        """Return each class's share of the training images, float64 [K]."""
        counts = torch.bincount(self.data.train_y, minlength=self.num_classes).double()
        return counts / counts.sum()

    def label_confusion(self) -> Tensor:
        """Return T: the share of training images of class k that are labelled j, float64 [K, K]."""
        return self.data.confusion

    def dev_confusion(self) -> Tensor:
        """Return what dev images of each class are taken for on average, float64 [K, K]."""
        log_probs = self._log_probs(self.data.dev_x)
        return mean_prediction(log_probs, self.data.dev_y, self.num_classes)

    def fingerprint(self) -> dict[str, str | int]:
        """Return what a teacher must fit: the number of classes."""
        return {"kind": "classes", "num_classes": self.num_classes}

    def notes(self) -> list[str]:
        """Return lines on what is odd about the splits of the data."""
        own = self.spec.data == "images" or is_import_path(self.spec.data)
        return notes(self.data, own)

    def content(self) -> dict[str, str]:
        """Return digests of what the recipe's section names without holding it."""
        return content(self.spec, self.data, self.module)


def _accuracy(log_probs: Tensor, labels: Tensor) -> float:
    return float((log_probs.argmax(1) == labels).double().mean())


def build_student(spec: ImageSpec) -> ImageStudent:
    """Return the student that a recipe's ``image`` section describes.

    Raises:
        UserError: if a name is unknown, a setting impossible or the data unusable.
    """
    if wrong := problems(spec):
        raise UserError(wrong[0])
    device = find_device("image.device", spec.device)
    data = load_data(spec)
    if spec.batch_size > len(data.train_y):
        raise UserError(
            f"image.batch_size is {spec.batch_size}, there are only {len(data.train_y)} training "
            "images; make it smaller"
        )
    return ImageStudent(spec, data.to(device))
