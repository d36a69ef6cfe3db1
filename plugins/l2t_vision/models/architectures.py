"""Image models, from (input shape [C, H, W], number of classes, recipe section) to a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from l2t_core.errors import UserError, is_for_want_of_memory
from l2t_core.own_functions import comes_to_the_same
from l2t_core.registry import Registry
from l2t_core.user_code import FAILURES, imported, is_import_path
from l2t_vision.models.densenets import DenseNet
from l2t_vision.models.resnets import CifarResNet, Shape, WideResNet
from l2t_vision.recipe import ImageSpec

MODELS: Registry[Callable[[Shape, int, ImageSpec], nn.Module]] = Registry("model")
# Those for which image.depth and image.width mean something, with the paper's largest of each:
# DenseNet-BC of L=190 and growth rate k=40, and WRN-40-10.
_SCALABLE = {"densenet": (DenseNet, 190, 40), "wide-resnet": (WideResNet, 40, 10)}
SCALABLE = tuple(_SCALABLE)


def build_model(shape: Shape, num_classes: int, spec: ImageSpec) -> nn.Module:
    """Return the model that ``spec.model`` names, freshly initialised from torch's random numbers.

    A name like ``module:function`` is a function of the user's own, called as
    ``function(num_classes=K)``, and with ``shape=(C, H, W)`` too if it has a parameter of that
    name. It returns a module from images [N, C, H, W] to logits [N, K]; torchvision's models do:
    ``model: torchvision.models:resnet18``.

    Raises:
        UserError: if the name is unknown or the model does not fit the images.
    """
    if is_import_path(spec.model):
        return _own_model(shape, num_classes, spec.model)
    return MODELS.get(spec.model)(shape, num_classes, spec)


def _own_model(shape: Shape, num_classes: int, path: str) -> nn.Module:
    function = imported(path, "image.model")
    arguments: dict[str, object] = {"num_classes": num_classes}
    try:
        if "shape" in inspect.signature(function).parameters:
            arguments["shape"] = shape
        model = function(**arguments)
    except FAILURES as error:
        raise UserError(
            f"image.model {path} could not be built ({type(error).__name__}: {error}); it is "
            "called with num_classes, and with shape if it has such a parameter"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"image.model {path} returned a {type(model).__name__}, not an nn.Module")
    model.eval()
    try:
        with torch.enable_grad():
            outputs = model(torch.zeros(2, *shape))
    except FAILURES as error:
        raise UserError(
            f"image.model {path} does not take images of {_size(shape)} ({_said(error)})"
        ) from error
    _check_logits(path, outputs, 2, num_classes)
    if any(p.requires_grad for p in model.parameters()) and not outputs.requires_grad:
        raise UserError(
            f"image.model {path}: no derivative leads from its logits to its parameters"
        )
    # The way back sees a batch again: a model that works in place gets its own copy each time.
    model.register_forward_pre_hook(lambda _, inputs: tuple(x.clone() for x in inputs))
    # Of other numbers of images, too: one that puts some of them together fits two by chance.
    model.register_forward_hook(
        lambda _, inputs, outputs: _check_logits(path, outputs, len(inputs[0]), num_classes)
    )
    return model.train()


def _check_logits(path: str, outputs: object, images: int, num_classes: int) -> None:
    if not isinstance(outputs, Tensor) or outputs.shape != (images, num_classes):
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(
            f"image.model {path} gives {found} for {images} images, expected logits "
            f"[{images}, {num_classes}]"
        )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _logits(model: nn.Module, images: Tensor, path: str) -> Tensor:
    """Return logits [N, K] in the mode that ``model`` is in."""
    try:
        found: Tensor = model(images)
    except FAILURES as error:
        if isinstance(error, UserError) or is_for_want_of_memory(error):
            raise
        mode = "training" if model.training else "evaluation"
        raise UserError(
            f"image.model {path} fails in {mode} on {len(images)} images ({_said(error)})"
        ) from error
    return found


def evaluated(model: nn.Module, images: Tensor, path: str) -> Tensor:
    """Return logits [N, K] of images [N, C, H, W] in evaluation; ``path`` is ``image.model``.

    Raises:
        UserError: if the model is one of the user's own and fails.
    """
    model.eval()
    return _logits(model, images, path) if is_import_path(path) else model(images)


def check_own(model: nn.Module, images: Tensor, path: str) -> None:
    """Refuse a model of the user's own that fails, or sees the same images and seed differently.

    ``images`` [N, C, H, W], one step's, are where ``model`` is; its buffers stay as they were. All
    are seen once in training and in evaluation, two of them often.

    Raises:
        UserError: so that no way back is walked through another model than the way there; if it
            fails.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def logits(seen: Tensor) -> Tensor:
        with torch.no_grad():
            found = _logits(model.train(), seen, path)
        model.load_state_dict(before)
        return found

    logits(images)
    if not comes_to_the_same(lambda: logits(images[:2])):
        raise UserError(
            f"image.model {path} gave two results for the same images and torch.manual_seed, and a "
            "step must be the same whenever it is replayed; draw from torch.rand and the like"
        )
    with torch.no_grad():
        evaluated(model, images, path)


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
    _refuse_below(16, shape, "lenet")
    height, width = (((length - 4) // 2 - 4) // 2 for length in shape[1:])
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


def _resnet(depth: int, shape: Shape, num_classes: int, spec: ImageSpec) -> nn.Module:
    _refuse_below(8, shape, f"resnet{depth}")
    return CifarResNet(shape, num_classes, depth, spec.dropout)


for _depth in (8, 20, 32, 44, 56, 110):
    MODELS.register(f"resnet{_depth}")(partial(_resnet, _depth))


def _scalable(name: str, shape: Shape, num_classes: int, spec: ImageSpec) -> nn.Module:
    net, depth, width = _SCALABLE[name]
    _refuse_below(8, shape, name)
    return net(shape, num_classes, spec.depth or depth, spec.width or width, spec.dropout)


for _name in SCALABLE:
    MODELS.register(_name)(partial(_scalable, _name))


def _refuse_below(side: int, shape: Shape, name: str) -> None:
    if min(shape[1:]) < side:
        raise UserError(
            f"image.model {name} needs images of at least {side} x {side} pixels, these are "
            f"{shape[1]} x {shape[2]}; use mlp"
        )


def _size(shape: Shape) -> str:
    return " x ".join(str(length) for length in shape)
