"""Image models, from (input shape [C, H, W], number of classes, recipe section) to a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from l2t_core.errors import UserError
from l2t_core.registry import Registry
from l2t_vision.recipe import ImageSpec

Shape = tuple[int, int, int]
MODELS: Registry[Callable[[Shape, int, ImageSpec], nn.Module]] = Registry("model")


@MODELS.register("mlp")
def mlp(shape: Shape, num_classes: int, spec: ImageSpec) -> nn.Module:
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
def lenet(shape: Shape, num_classes: int, spec: ImageSpec) -> nn.Module:
    """Return LeNet in the 20-50-``hidden`` form that Caffe distributes.

    As there, no non-linearity follows the convolutions but max pooling. With 500 hidden units on
    1 x 28 x 28 it has 520 + 25,050 + 400,500 + 5,010 = 431,080 parameters, the number published
    for this form (Han et al. 2015, "Learning both weights and connections", table 1: 431K).

    Raises:
        UserError: if the images are smaller than 16 x 16.
    """
    height, width = (((length - 4) // 2 - 4) // 2 for length in shape[1:])
    if height < 1 or width < 1:
        raise UserError(
            f"image.model lenet needs images of at least 16 x 16 pixels, these are {shape[1]} x "
            f"{shape[2]}; use mlp"
        )
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


@MODELS.register("convnet")
def convnet(shape: Shape, num_classes: int, spec: ImageSpec) -> nn.Module:
    """Return two 3 x 3 convolutions with batch norm, 16 and 32 channels, pooled over the image.

    Works on images of any size. ``hidden`` has no part in it.
    """
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(spec.dropout),
        nn.Linear(32, num_classes),
    )
