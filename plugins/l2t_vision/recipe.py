"""The ``image`` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from l2t_core.specs import OptimiserSpec, ScheduleSpec


@dataclass
class ImageSpec:
    """An image student: data, model, optimiser and measure.

    ``data`` is digits, mnist, fashion-mnist, cifar10, cifar100, images (your own, one folder per
    class) or ``module:function`` (your own loader). ``folder`` empty means ``data/<data>`` where
    files are needed; for images it may be a tar archive. ``size`` cuts and scales your own images
    to a square of so many pixels; 0 takes them as they are, all alike.

    ``model`` is mlp, lenet, convnet, resnet8 to resnet110, wide-resnet, densenet or
    ``module:function``. ``hidden`` counts the units of mlp and lenet; ``depth`` and ``width`` are
    those of wide-resnet and densenet (there the growth rate), 0 for the paper's largest.

    ``dev_size`` images are cut off train, by ``data_seed``; ``train_size`` 0 means all that dev
    leaves. ``label_noise`` is the fraction of training labels made wrong: ``noise`` symmetric
    (any other class) or pair (the next class). ``imbalance`` is the first class's size over the
    last's. ``corrupt_dev`` does both to dev, too. ``trusted`` of the dev images are learnt from
    instead of looked at, with the labels that they have there; ``only_trusted``: nothing else is.
    ``augment`` is none, crop, crop-flip or ``module:function`` (your own, on batches of bytes).

    ``measure`` is M-tilde: expected_accuracy, smoothed_accuracy, margin or log_likelihood, on
    ``dev_batch`` dev examples per episode (0: all). ``dev_interval`` is in steps. ``device`` is
    auto (the GPU if there is one), cpu or cuda. ``precision`` (float32, bfloat16, float16) is the
    arithmetic of the student's steps, taught or not; parameters and evaluation are in float32.
    """

    data: str = "digits"
    folder: str = ""
    size: int = 0
    model: str = "mlp"
    hidden: int = 500
    depth: int = 0
    width: int = 0
    dropout: float = 0.0
    train_size: int = 0
    dev_size: int = 0
    data_seed: int = 20181027
    label_noise: float = 0.0
    noise: str = "symmetric"
    imbalance: float = 1.0
    corrupt_dev: bool = False
    trusted: int = 0
    only_trusted: bool = False
    augment: str = "none"
    batch_size: int = 100
    steps: int = 1000
    optimiser: OptimiserSpec = field(default_factory=OptimiserSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    measure: str = "smoothed_accuracy"
    dev_batch: int = 0
    dev_interval: int = 100
    device: str = "auto"
    precision: str = "float32"
