"""Image models: published sizes, shapes, second derivatives, models of the user's own."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2t_core.errors import UserError
from l2t_core.hypergradients.double_backward import probe
from l2t_vision.models.architectures import MODELS, SCALABLE, build_model
from l2t_vision.models.resnets import CifarResNet, WideResNet
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import build_student

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
DEEP = ("resnet32", "resnet44", "resnet56", "resnet110")  # as resnet8 and resnet20, only slower


def spec_of(model: str, depth: int = 0, width: int = 0, **settings: float) -> ImageSpec:
    return ImageSpec(model=model, depth=depth, width=width, **settings)  # type: ignore[arg-type]


def small(model: str, **settings: float) -> ImageSpec:
    """Return a small net of each kind."""
    return spec_of(model, *((10, 2) if model in SCALABLE else ()), hidden=11, **settings)


def parameters(spec: ImageSpec, shape: tuple[int, int, int], classes: int = 10) -> int:
    return sum(p.numel() for p in build_model(shape, classes, spec).parameters())


def resnet_by_hand(depth: int, classes: int) -> int:
    n = (depth - 2) // 6
    convolutions = 3 * 16 + 16 * 16 * 2 * n
    for inputs in (16, 32):
        convolutions += inputs * 2 * inputs + (2 * n - 1) * (2 * inputs) ** 2
    norms = 2 * (16 * (1 + 2 * n) + 32 * 2 * n + 64 * 2 * n)
    return 9 * convolutions + norms + 64 * classes + classes


def wide_resnet_by_hand(depth: int, width: int, classes: int) -> int:
    n, inputs, count = (depth - 4) // 6, 16, 3 * 16 * 9
    for outputs in (16 * width, 32 * width, 64 * width):
        shortcut = inputs * outputs
        first = 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs
        count += shortcut + first + (n - 1) * (4 * outputs + 18 * outputs * outputs)
        inputs = outputs
    return count + 2 * inputs + inputs * classes + classes


def densenet_by_hand(depth: int, growth: int, classes: int) -> int:
    channels, count = 2 * growth, 3 * 9 * 2 * growth
    for block in range(3):
        for _ in range((depth - 4) // 6):
            bottleneck = 4 * growth
            count += 2 * channels + channels * bottleneck
            count += 2 * bottleneck + 9 * bottleneck * growth
            channels += growth
        if block < 2:
            count += 2 * channels + channels * (channels // 2)
            channels //= 2
    return count + 2 * channels + channels * classes + classes


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("mlp", GREY, 397_510),
        ("lenet", GREY, 431_080),
        # 9*16 + 2*16 + 9*16*32 + 2*32 + 33*10
        ("convnet", GREY, 5_178),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, int, int], expected: int) -> None:
    assert parameters(spec_of(name), shape) == expected


@pytest.mark.parametrize(
    "depth, expected, published",  # in millions: He et al. 2016, table 6
    [(8, 75_290, None), (20, 269_722, 0.27), (32, 464_154, 0.46), (44, 658_586, 0.66),
     (56, 853_018, 0.85), (110, 1_727_962, 1.7)],
)
def test_cifar_resnets_have_their_published_size(
    depth: int, expected: int, published: float | None
) -> None:
    assert parameters(spec_of(f"resnet{depth}"), COLOUR) == expected
    assert resnet_by_hand(depth, 10) == expected
    if published:
        assert round(expected / 1e6, 2 if published < 1 else 1) == published
    assert parameters(spec_of(f"resnet{depth}"), COLOUR, 100) == expected + 90 * 65


@pytest.mark.parametrize(
    # Zagoruyko and Komodakis 2016, tables 3 and 4; that of WRN-40-10 is on the page of their code.
    "depth, width, expected, published",
    [(40, 1, 563_930, 0.6), (40, 4, 8_949_210, 8.9), (16, 8, 10_961_370, 11.0),
     (28, 10, 36_479_194, 36.5), (0, 0, 55_841_754, 55.8)],
)
def test_wide_resnets_have_their_published_size(
    depth: int, width: int, expected: int, published: float
) -> None:
    assert parameters(spec_of("wide-resnet", depth, width), COLOUR) == expected
    # WRN-40-1 keeps 16 channels in its first group and needs no convolution there.
    spared = 16 * 16 if width == 1 else 0
    assert wide_resnet_by_hand(depth or 40, width or 10, 10) - spared == expected
    assert round(expected / 1e6, 1) == published


@pytest.mark.parametrize(
    "depth, growth, expected, published",  # Huang et al. 2017, table 2
    [(40, 12, 176_122, None), (100, 12, 769_162, 0.8), (250, 24, 15_324_406, 15.3),
     (0, 0, 25_624_430, 25.6)],
)
def test_densenets_have_their_published_size(
    depth: int, growth: int, expected: int, published: float | None
) -> None:
    assert parameters(spec_of("densenet", depth, growth), COLOUR) == expected
    assert densenet_by_hand(depth or 190, growth or 40, 10) == expected
    if published:
        assert round(expected / 1e6, 1) == published


@pytest.mark.parametrize("shape", [(1, 16, 19), (3, 16, 16), (3, 33, 17)])
@pytest.mark.parametrize("name", [name for name in MODELS.names() if name not in DEEP])
def test_models_take_grey_and_colour_of_other_sizes(
    name: str, shape: tuple[int, int, int]
) -> None:
    model = build_model(shape, 7, small(name, dropout=0.5))
    assert model(torch.randn(4, *shape)).shape == (4, 7)


@pytest.mark.parametrize("name", ["resnet20", "wide-resnet", "densenet"])
def test_the_image_is_halved_twice(name: str) -> None:
    model = build_model(COLOUR, 10, small(name))
    seen = []
    last = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    last.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2:]))
    model(torch.randn(2, *COLOUR))
    assert seen == [(8, 8)]


@pytest.mark.parametrize(
    "name, side", [("lenet", 16), ("resnet20", 8), ("wide-resnet", 8), ("densenet", 8)]
)
def test_images_that_are_too_small_are_refused(name: str, side: int) -> None:
    assert build_model((1, side, side), 10, small(name))
    says = f"{name} needs images of at least {side} x {side} pixels, these are {side - 1} x {side}"
    with pytest.raises(UserError, match=says):
        build_model((1, side - 1, side), 10, small(name))


@pytest.mark.parametrize(
    "name, depth, width, says",
    [("wide-resnet", 41, 2, "6n \\+ 4 layers"), ("densenet", 101, 12, "not 101 and 12")],
)
def test_depths_that_there_are_not(name: str, depth: int, width: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_model(COLOUR, 10, spec_of(name, depth, width))
    with pytest.raises(UserError, match="6n \\+ 2 layers"):
        CifarResNet(COLOUR, 10, 21)


@pytest.mark.parametrize("name", [name for name in MODELS.names() if name not in DEEP])
def test_dropout_is_optional_and_only_in_training(name: str) -> None:
    x = torch.randn(2, 1, 20, 20)
    plain = build_model((1, 20, 20), 10, small(name, dropout=0.0))
    assert torch.equal(plain(x), plain(x))
    dropping = build_model((1, 20, 20), 10, small(name, dropout=0.5))
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))


@pytest.mark.parametrize("name", ["lenet", "resnet8", "wide-resnet", "densenet"])
def test_models_can_be_differentiated_twice(name: str) -> None:
    """The directional second derivative equals a difference of gradients, in float64."""
    torch.manual_seed(1)
    side = 16 if name == "lenet" else 8
    model = build_model((3, side, side), 5, small(name)).double()
    x, y = torch.randn(6, 3, side, side).double(), torch.arange(6) % 5
    weights = list(model.parameters())
    v = [torch.randn_like(w) for w in weights]

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    probe(model, loss)

    def slope() -> torch.Tensor:
        gradients = torch.autograd.grad(loss(), weights, create_graph=True)
        return sum((g * d).sum() for g, d in zip(gradients, v, strict=True))  # type: ignore[return-value]

    exact = torch.autograd.grad(slope(), weights)
    curvature = sum(float((s * d).sum()) for s, d in zip(exact, v, strict=True))
    sides, h = [], 1e-9  # so small that no ReLU's kink lies between the two sides
    for sign in (1, -1):
        with torch.no_grad():
            for w, d in zip(weights, v, strict=True):
                w.add_(d, alpha=sign * h)
        sides.append(float(slope().detach()))
        with torch.no_grad():
            for w, d in zip(weights, v, strict=True):
                w.sub_(d, alpha=sign * h)
    assert curvature == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-4)


def test_option_a_shortcuts_carry_the_image_unchanged() -> None:
    model = CifarResNet(COLOUR, 10, 8)
    block = model.stages[1]  # 16 to 32 channels
    nn.init.zeros_(block.norm2.weight)  # nothing but the shortcut is left
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_wide_shortcuts_see_the_activated_input() -> None:
    """Where channels change, both ways start from the first norm and ReLU."""
    block = WideResNet(COLOUR, 10, 10, 2).groups[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(4, 16, 8, 8)
    assert torch.allclose(block(x), block.shortcut(F.relu(block.norm1(x))))


OWN = """\
import random
import torch
from torch import nn
def net(num_classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], num_classes))
def plain(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(2).flatten(1))
def in_place(num_classes):
    return InPlace(48, num_classes)
def wrong(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes + 1))
def failing(num_classes):
    raise KeyError("weights")
def number(num_classes):
    return num_classes
class Tossing(nn.Module):
    def __init__(self, num_classes, toss):
        super().__init__()
        self.toss, self.last = toss, nn.Linear(64, num_classes)
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, x):
        self.calls += self.training
        return self.last(x.flatten(1)) * (1 + self.training * (self.toss() < 0.5))
def own_coin(num_classes):
    return Tossing(num_classes, random.random)
def torchs_coin(num_classes):
    return Tossing(num_classes, lambda: torch.rand(()))
class Folds(nn.Linear):  # two images and more of a size that the last layer takes for one
    def forward(self, x):
        return super().forward(x.reshape(max(2, len(x) // 2), -1)[:, :64])
def folds(num_classes):
    return Folds(64, num_classes)
class FewOnly(nn.Linear):
    def forward(self, x):
        if len(x) > 2:
            raise SystemExit(3)
        return super().forward(x.flatten(1))
def few_only(num_classes):
    return FewOnly(64, num_classes)
class Evaluates(nn.Linear):  # few images only, or not with a gradient
    def forward(self, x):
        if not self.training and len(x) > 2 and (self.few or torch.is_grad_enabled()):
            raise ValueError("not now\\nnor ever")
        return super().forward(x.flatten(1))
def trains_only(num_classes):
    model = Evaluates(64, num_classes)
    model.few = True
    return model
def measures_only(num_classes):
    model = trains_only(num_classes)
    model.few = False
    return model
class Decides(nn.Linear):
    def forward(self, x):
        return nn.functional.one_hot(super().forward(x.flatten(1)).argmax(1), 6).float()
def decides(num_classes):
    return Decides(16, num_classes)
def frozen(num_classes):
    return Decides(16, num_classes).requires_grad_(False)
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models_here.py").write_text(OWN)
    (tmp_path / "own_script_here.py").write_text("import sys\nsys.exit('usage: script DATA')\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_models")
def test_models_of_the_users_own() -> None:
    model = build_model((3, 4, 4), 6, spec_of("own_models_here:net"))
    assert model.training and model(torch.randn(2, 3, 4, 4)).shape == (2, 6)
    assert build_model((3, 4, 4), 6, spec_of("own_models_here:plain"))


@pytest.mark.usefixtures("own_models")
def test_an_own_model_that_works_in_place_leaves_the_batch_alone() -> None:
    model = build_model((3, 4, 4), 6, spec_of("own_models_here:in_place"))
    x = torch.ones(2, 3, 4, 4)
    assert torch.equal(model(x), model(x)) and torch.equal(x, torch.ones_like(x))


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    "path, says",
    [
        ("own_models_here:nett", "cannot be imported"),
        ("no_such_module_here:net", "No module named 'no_such_module_here'"),
        ("own_script_here:net", "cannot be imported .SystemExit: usage: script DATA"),
        ("own_models_here:nn.functional.math", "is no function"),
        ("own_models_here:plain", "does not take images of 1 x 4 x 4"),
        ("own_models_here:wrong", "does not take images of 1 x 4 x 4"),
        ("own_models_here:failing", "could not be built .KeyError"),
        ("own_models_here:number", "returned a int, not an nn.Module"),
        ("own_models_here:decides", "no derivative leads from its logits to its parameters"),
    ],
)
def test_own_models_that_do_not_fit(path: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_model((1, 4, 4), 6, spec_of(path))


@pytest.mark.usefixtures("own_models")
def test_a_model_without_trainable_parameters_is_told_by_the_engine() -> None:
    assert build_model((1, 4, 4), 6, spec_of("own_models_here:frozen"))


@pytest.mark.usefixtures("own_models")
def test_an_own_model_has_to_be_the_same_when_a_step_is_replayed() -> None:
    sound = ImageSpec(dev_size=100, model="own_models_here:torchs_coin")
    student = build_student(sound)
    assert student.module.calls == 0  # its buffers are as they were
    random.seed(1)
    with pytest.raises(UserError, match="own_coin gave two results for the same images"):
        build_student(replace(sound, model="own_models_here:own_coin"))


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    "path, says",
    [
        ("own_models_here:folds", r"gives \[4, 10\] for 8 images, expected logits \[8, 10\]"),
        ("own_models_here:few_only", r"fails in training on 8 images \(SystemExit: 3\)"),
        (
            "own_models_here:trains_only",
            r"fails in evaluation on 8 images \(ValueError: not now\)",
        ),
    ],
)
def test_an_own_model_that_fits_few_images_only(path: str, says: str) -> None:
    with pytest.raises(UserError, match=f"image.model {path} {says}"):
        build_student(ImageSpec(dev_size=100, batch_size=8, model=path))


@pytest.mark.usefixtures("own_models")
def test_an_own_model_that_fails_later_in_evaluation() -> None:
    path = "own_models_here:measures_only"
    student = build_student(ImageSpec(dev_size=100, model=path))
    assert student.true_measure() >= 0.0
    says = rf"{path} fails in evaluation on 100 images \(ValueError: not now\)$"
    with pytest.raises(UserError, match=says):
        student.smoothed_measure(1)


@pytest.mark.usefixtures("own_models")
def test_want_of_memory_is_not_taken_for_a_mistake_in_an_own_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = build_student(ImageSpec(dev_size=100, model="own_models_here:measures_only"))

    def greedy(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")

    monkeypatch.setattr(student.module, "forward", greedy)
    with pytest.raises(RuntimeError, match="9 TB"):
        student.true_measure()


@pytest.mark.usefixtures("own_models")
def test_an_own_model_with_another_number_of_classes() -> None:
    with pytest.raises(UserError, match=r"gives \[2, 7\] for 2 images, expected logits \[2, 6\]"):
        build_model((3, 4, 4), 6, spec_of("own_models_here:wrong"))
