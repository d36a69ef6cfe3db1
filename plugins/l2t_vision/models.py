"""Image models, from (input shape [C, H, W], number of classes, recipe section) to a module."""

from __future__ import annotations

from collections.abc import Callable

from l2t_core.registry import Registry
from l2t_vision.recipe import ImageSpec
from torch import nn

MODELS: Registry[Callable[[tuple[int, int, int], int, ImageSpec], nn.Module]] = Registry("model")


@MODELS.register("mlp")
def mlp(shape: tuple[int, int, int], num_classes: int, spec: ImageSpec) -> nn.Module:
    """Return inputs - hidden - classes with ReLU; 784-500-10 has 397,510 parameters."""
    inputs = shape[0] * shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, spec.hidden),
        nn.ReLU(),
        nn.Dropout(spec.dropout),
        nn.Linear(spec.hidden, num_classes),
    )


@MODELS.register("lenet")
def lenet(shape: tuple[int, int, int], num_classes: int, spec: ImageSpec) -> nn.Module:
    """Return LeNet in the 20-50-``hidden`` form of Caffe: 431,080 parameters at 500 on MNIST."""
    height, width = ((shape[1] - 4) // 2 - 4) // 2, ((shape[2] - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(shape[0], 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * height * width, spec.hidden),
        nn.ReLU(),
        nn.Dropout(spec.dropout),
        nn.Linear(spec.hidden, num_classes),
    )
