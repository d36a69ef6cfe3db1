"""The ``image`` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from l2t_core.specs import OptimiserSpec, ScheduleSpec


@dataclass
class ImageSpec:
    """An image student: data, model, optimiser and measure.

    ``data`` is digits or mnist; ``folder`` empty means ``data/<data>`` where files are needed.
    ``model`` is mlp, lenet or convnet, with ``hidden`` units (mlp, lenet) and ``dropout`` before
    the last layer. ``train_size`` 0 means all that dev leaves. ``label_noise`` is the fraction of
    training labels replaced by a uniformly drawn class. ``measure`` is M-tilde:
    expected_accuracy, margin or log_likelihood, on ``dev_batch`` dev examples per episode (0:
    all). ``dev_interval`` is in steps.
    """

    data: str = "digits"
    folder: str = ""
    model: str = "mlp"
    hidden: int = 500
    dropout: float = 0.0
    train_size: int = 0
    dev_size: int = 0
    label_noise: float = 0.0
    batch_size: int = 100
    steps: int = 1000
    optimiser: OptimiserSpec = field(default_factory=OptimiserSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    measure: str = "log_likelihood"
    dev_batch: int = 0
    dev_interval: int = 100
