"""The student's state s_t, the teacher's only view of the student (L2T-DLF, section 3.2).

The same class follows a student while its teacher is trained and when a trained teacher is
applied, so both see the same features. All its content is plain Python numbers: it survives
half-precision runs and checkpoints of any framework, and no gradient flows through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from l2t_core.errors import UserError, suggestion
from l2t_core.losses.products import target_log_probs

IMAGE_FEATURES = (
    "progress",
    "train_nll",
    "train_accuracy",
    "dev_nll",
    "dev_accuracy",
    "class_accuracy",
)
NMT_FEATURES = (
    "progress",
    "train_nll",
    "train_accuracy",
    "dev_nll",
    "dev_accuracy",
    "log_learning_rate",
)
FEATURES = ("log_learning_rate", *IMAGE_FEATURES)

# Decay of the running training statistics: an average over about the last 20 steps.
RUNNING_DECAY = 0.95
# Up to this many classes each has its own dev-accuracy feature; above it min, mean and max.
CLASS_FEATURES_LIMIT = 100


@dataclass(frozen=True)
class TrainStatistics:
    """Of one committed training step: mean nll in nats per example (token), accuracy in [0, 1]."""

    nll: float
    accuracy: float


@dataclass(frozen=True)
class DevStatistics:
    """Of one pass over dev: mean nll in nats, accuracy in [0, 1], and accuracy by class."""

    nll: float
    accuracy: float
    class_accuracy: tuple[float, ...] = ()

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain Python values, for a checkpoint."""
        return {**asdict(self), "class_accuracy": list(self.class_accuracy)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> DevStatistics:
        """Return what :meth:`as_plain` was called on."""
        return cls(plain["nll"], plain["accuracy"], tuple(plain["class_accuracy"]))


def feature_count(feature_names: Sequence[str], num_classes: int) -> int:
    """Return F, the length of s_t, for these features and K = ``num_classes``.

    Raises:
        UserError: if a feature is unknown.
    """
    for name in feature_names:
        if name not in FEATURES:
            raise UserError(
                f"unknown state feature {name!r}{suggestion(name, FEATURES)} "
                f"(known: {', '.join(sorted(FEATURES))})"
            )
    per_class = num_classes if num_classes <= CLASS_FEATURES_LIMIT else 3
    return sum(per_class if name == "class_accuracy" else 1 for name in feature_names)


def train_statistics(log_probs: Tensor, targets: Tensor) -> TrainStatistics:
    """Return the statistics of a step from log-probabilities [N, K] and targets [N]."""
    with torch.no_grad():
        nll = -target_log_probs(log_probs, targets).mean()
        accuracy = (log_probs.argmax(1) == targets).float().mean()
    return TrainStatistics(float(nll), float(accuracy))


def dev_statistics(log_probs: Tensor, targets: Tensor, num_classes: int) -> DevStatistics:
    """Return dev statistics from log-probabilities [N, K] and targets [N], classes included."""
    whole = train_statistics(log_probs, targets)
    right = (log_probs.argmax(1) == targets).double()
    hits = torch.zeros(num_classes, dtype=torch.float64, device=targets.device)
    seen = torch.zeros_like(hits)
    hits.index_add_(0, targets, right)
    seen.index_add_(0, targets, torch.ones_like(right))
    by_class = (hits / seen.clamp(min=1)).tolist()
    return DevStatistics(whole.nll, whole.accuracy, tuple(by_class))


def mean_prediction(log_probs: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Return C: the mean probability of class j over the examples of class k, float64 [K, K].

    From log-probabilities [N, K] and targets [N]. Of a student that has learnt from wrong labels,
    on examples with right ones, it estimates how the labels were made wrong (Hendrycks et al.
    2018, equation 1). A class without examples has its own row of the identity.
    """
    total = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=targets.device)
    total.index_add_(0, targets, log_probs.double().exp())
    counts = torch.bincount(targets, minlength=num_classes).double().unsqueeze(1)
    own = torch.eye(num_classes, dtype=torch.float64, device=targets.device)
    return torch.where(counts > 0, total / counts.clamp(min=1), own)


class StudentState:
    """Running statistics of one student's life and the feature vector s_t made of them.

    Args:
        total_steps: T, the length of this student's training in steps.
        num_classes: K; nll is measured against log K, the nll of a uniform guess.
        feature_names: which features, in which order.

    Raises:
        UserError: if a feature is unknown, or there is one class only.
    """

    def __init__(self, total_steps: int, num_classes: int, feature_names: Sequence[str]) -> None:
        if num_classes < 2:
            raise UserError(f"num_classes is {num_classes}; it must be 2 or more")
        self.total_steps = total_steps
        self.num_classes = num_classes
        self.feature_names = tuple(feature_names)
        self.num_features = feature_count(feature_names, num_classes)
        # Before anything is observed the student is taken to guess uniformly.
        self._train: TrainStatistics | None = None
        self._dev: DevStatistics | None = None

    def observe_train(self, new: TrainStatistics) -> None:
        """Fold the statistics of a committed step into the running averages."""
        old = self._train
        if not (math.isfinite(new.nll) and math.isfinite(new.accuracy)):
            return
        if old is None:
            self._train = new
            return
        self._train = TrainStatistics(
            RUNNING_DECAY * old.nll + (1 - RUNNING_DECAY) * new.nll,
            RUNNING_DECAY * old.accuracy + (1 - RUNNING_DECAY) * new.accuracy,
        )

    def observe_dev(self, new: DevStatistics) -> None:
        """Replace the dev statistics by those of the latest pass."""
        if math.isfinite(new.nll) and math.isfinite(new.accuracy):
            self._dev = new

    def features(self, step: int, learning_rate: float) -> Tensor:
        """Return s_t [F] for 0-based ``step``, float32, every entry within [-1, 1]."""
        values: list[float] = []
        for name in self.feature_names:
            values.extend(self._feature(name, step, learning_rate))
        return torch.tensor(values, dtype=torch.float32)

    def _feature(self, name: str, step: int, learning_rate: float) -> list[float]:
        if name == "progress":
            return [_scaled(step / max(1, self.total_steps))]
        if name == "log_learning_rate":
            # Rates from 1e-6 to 1 cover what students use; six decades map onto [-1, 1].
            return [_scaled((math.log10(max(learning_rate, 1e-6)) + 6.0) / 6.0)]
        if name == "class_accuracy":
            return self._class_features()
        seen = self._train if name.startswith("train") else self._dev
        if name.endswith("accuracy"):
            return [_scaled(seen.accuracy if seen else 0.0)]
        # A uniform guess (nll = log K) sits at 0, certainty at -1, twice as bad as uniform at 1.
        return [_scaled(seen.nll / (2.0 * math.log(self.num_classes)) if seen else 0.5)]

    def _class_features(self) -> list[float]:
        by_class = list(self._dev.class_accuracy) if self._dev else []
        if self.num_classes <= CLASS_FEATURES_LIMIT:
            by_class = by_class or [0.0] * self.num_classes
            return [_scaled(accuracy) for accuracy in by_class]
        by_class = by_class or [0.0]
        mean = sum(by_class) / len(by_class)
        return [_scaled(min(by_class)), _scaled(mean), _scaled(max(by_class))]

    def state_dict(self) -> dict[str, Any]:
        """Return the running statistics as plain Python values."""
        dev = self._dev.as_plain() if self._dev else None
        return {"train": asdict(self._train) if self._train else None, "dev": dev}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        train, dev = state["train"], state["dev"]
        self._train = TrainStatistics(**train) if train else None
        self._dev = DevStatistics.from_plain(dev) if dev else None


def _scaled(fraction: float) -> float:
    """Map [0, 1] onto [-1, 1], clipped."""
    return max(-1.0, min(1.0, 2.0 * fraction - 1.0))
