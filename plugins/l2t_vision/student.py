"""The image student: what the teacher core needs to know of an image task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from l2t_core.errors import UserError
from l2t_core.flat import refill
from l2t_core.measures import expected_accuracy, log_likelihood, margin_surrogate
from l2t_core.optimisers import build_optimiser
from l2t_core.registry import Registry
from l2t_core.schedules import SCHEDULES, learning_rate
from l2t_core.student_state import IMAGE_FEATURES, DevStatistics, dev_statistics
from l2t_vision.data import ImageData, load_data
from l2t_vision.models import MODELS
from l2t_vision.recipe import ImageSpec

MEASURES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("image measure")
MEASURES.register("expected_accuracy")(expected_accuracy)
MEASURES.register("log_likelihood")(log_likelihood)
MEASURES.register("margin")(margin_surrogate)

# Images per forward pass where no gradient is needed.
_EVALUATION_CHUNK = 2000
# torch takes seeds of 64 bits; a user's seed times the steps may exceed them.
_SEEDS = 2**63


class ImageStudent:
    """A classifier on an image data set; implements :class:`l2t_core.student.Student`.

    It lives where ``data`` does: its module and all batches are on the data's device.
    """

    measure_name = "accuracy"
    default_features = IMAGE_FEATURES

    def __init__(self, spec: ImageSpec, data: ImageData) -> None:
        self.spec = spec
        self.data = data
        self.num_classes = data.num_classes
        self.total_steps = spec.steps
        self.optimiser = build_optimiser(spec.optimiser)
        self.smoothed = MEASURES.get(spec.measure)
        channels, height, width = data.train_x.shape[1:]
        self.make = lambda: MODELS.get(spec.model)(
            (channels, height, width), data.num_classes, spec
        )
        self.module: nn.Module = self.make().to(data.train_x.device)
        self.seed = 0
        self._epoch: tuple[int, int, Tensor] | None = None  # seed, epoch, permutation

    def reset(self, seed: int) -> None:
        """Fill the module with fresh parameters and buffers; batches follow ``seed`` too."""
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = self.make()
        refill(self.module, fresh)

    def batch(self, step: int) -> Tensor:
        """Return the indices [batch_size] of ``step``; each epoch is a fresh permutation."""
        size = self.spec.batch_size
        per_epoch = len(self.data.train_y) // size
        epoch, position = divmod(step, per_epoch)
        if self._epoch is None or self._epoch[:2] != (self.seed, epoch):
            generator = torch.Generator().manual_seed((self.seed * 100_003 + epoch) % _SEEDS)
            order = torch.randperm(len(self.data.train_y), generator=generator)
            self._epoch = (self.seed, epoch, order)
        return self._epoch[2][position * size : (position + 1) * size]

    def step_seed(self, step: int) -> int:
        """Return the dropout seed of ``step``."""
        return (self.seed * 1_000_003 + step) % _SEEDS

    def predict(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [N, K] and labels [N] in training mode."""
        self.module.train()
        outputs = self.module(self.data.train_x[batch])
        return torch.log_softmax(outputs, 1), self.data.train_y[batch]

    def learning_rate(self, step: int) -> float:
        """Return the rate of ``step``."""
        return learning_rate(
            self.spec.schedule, self.spec.optimiser.lr, step, self.total_steps
        )

    def _log_probs(self, images: Tensor) -> Tensor:
        """Return log-probabilities [N, K] in evaluation mode, without gradient."""
        self.module.eval()
        with torch.no_grad():
            chunks = [self.module(c) for c in images.split(_EVALUATION_CHUNK)]
        return torch.log_softmax(torch.cat(chunks), 1)

    def dev_statistics(self, step: int) -> DevStatistics | None:
        """Return statistics over the whole dev set every ``dev_interval`` steps."""
        if (step + 1) % self.spec.dev_interval:
            return None
        return dev_statistics(self._log_probs(self.data.dev_x), self.data.dev_y, self.num_classes)

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
        self.module.eval()
        return self.smoothed(torch.log_softmax(self.module(images), 1), labels)

    def true_measure(self) -> float:
        """Return dev accuracy in [0, 1]."""
        return _accuracy(self._log_probs(self.data.dev_x), self.data.dev_y)

    def test_error(self) -> float:
        """Return test error in [0, 1]; to be read once, when everything is decided."""
        return 1.0 - _accuracy(self._log_probs(self.data.test_x), self.data.test_y)

    def fingerprint(self) -> dict[str, str | int]:
        """Return what a teacher must fit: the number of classes."""
        return {"kind": "classes", "num_classes": self.num_classes}


def _accuracy(log_probs: Tensor, labels: Tensor) -> float:
    return float((log_probs.argmax(1) == labels).double().mean())


def build_student(spec: ImageSpec) -> ImageStudent:
    """Return the student that a recipe's ``image`` section describes.

    Raises:
        UserError: if a name is unknown, a setting impossible or the data unusable.
    """
    _check(spec)
    data = load_data(
        spec.data,
        Path(spec.folder or f"data/{spec.data}"),
        train_size=spec.train_size,
        dev_size=spec.dev_size,
        label_noise=spec.label_noise,
    )
    if spec.batch_size > len(data.train_y):
        raise UserError(
            f"image.batch_size is {spec.batch_size}, there are only {len(data.train_y)} training "
            "images; make it smaller"
        )
    return ImageStudent(spec, data)


def _check(spec: ImageSpec) -> None:
    """Refuse unknown names and impossible numbers before any data is read."""
    MODELS.get(spec.model)
    MEASURES.get(spec.measure)
    SCHEDULES.get(spec.schedule.name)
    if not 0.0 < spec.optimiser.lr < float("inf"):
        raise UserError(f"image.optimiser.lr is {spec.optimiser.lr}; it must be above 0")
    build_optimiser(spec.optimiser)
    for name in ("steps", "batch_size", "dev_interval", "hidden"):
        if getattr(spec, name) < 1:
            raise UserError(f"image.{name} is {getattr(spec, name)}; it must be at least 1")
    if spec.dev_batch < 0:
        raise UserError(f"image.dev_batch is {spec.dev_batch}; 0 takes the whole dev set")
    if not 0.0 <= spec.dropout < 1.0:
        raise UserError(f"image.dropout is {spec.dropout}; it must lie in [0, 1)")
