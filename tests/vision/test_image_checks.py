"""What is refused before any data is read, and data sets of the user's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l2t_core.errors import NoEffect, UserError
from l2t_core.specs import OptimiserSpec, ScheduleSpec
from l2t_vision.checks import problems
from l2t_vision.data.sets import load_data
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import build_student


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"data": "cifar"}, "image.data: unknown image data set 'cifar'"),
        ({"model": "resnet21"}, "image.model: unknown model 'resnet21'; did you mean 'resnet"),
        ({"noise": "pairs"}, "image.noise: unknown label noise 'pairs'"),
        ({"augment": "flip"}, "image.augment: unknown augmentation 'flip'"),
        ({"measure": "expect_accuracy"}, "did you mean 'expected_accuracy'"),
        ({"device": "gpu"}, "image.device is 'gpu'"),
        ({"depth": -1, "model": "densenet"}, "image.depth is -1; it must be between 0"),
        ({"depth": 4 * 10**12, "model": "densenet"}, "image.depth is 4000000000000; it must be"),
        ({"width": 2**62, "model": "wide-resnet"}, f"image.width is {2**62}; it must be between"),
        ({"depth": 20, "model": "resnet20"}, "image.depth has no effect with image.model=resnet20"),
        ({"width": 2}, "image.width has no effect with image.model=mlp"),
        ({"size": -2}, "image.size is -2"),
        ({"size": 32}, "image.size has no effect with image.data=digits; use images"),
        ({"train_size": -1}, "image.train_size is -1; it must be 0 (all that dev leaves) or more"),
        ({"dev_size": 0}, "image.dev_size is 0"),
        ({"data_seed": -1}, "image.data_seed is -1"),
        ({"label_noise": 1.5}, "image.label_noise is 1.5; it must be in [0, 1]"),
        ({"label_noise": float("nan")}, "image.label_noise is nan"),
        ({"imbalance": 0.01}, "image.imbalance is 0.01; it must be 1 (none) or more"),
        ({"imbalance": float("inf")}, "image.imbalance is inf"),
        ({"dropout": 1.0}, "image.dropout is 1.0"),
        ({"steps": 0}, "image.steps is 0"),
        ({"dev_interval": 0}, "image.dev_interval is 0; it must be between 1 and image.steps"),
        ({"steps": 99}, "image.dev_interval is 100; it must be between 1 and image.steps, 99"),
        ({"dev_batch": -1}, "image.dev_batch is -1; it must be between 0 (the whole dev set) and"),
        ({"dev_batch": 101}, "image.dev_batch is 101; it must be between 0 (the whole dev set)"),
        ({"model": "collections:net"}, "image.model collections:net cannot be imported"),
        ({"augment": "gone_away:cut"}, "image.augment gone_away:cut cannot be imported"),
        ({"data": "math:pi"}, "image.data math:pi is no function"),
        ({"measure": "math:pi"}, "image.measure math:pi is no function"),
        ({"schedule": ScheduleSpec("cosine", 1000)}, "image.schedule.warmup_steps is 1000"),
        ({"optimiser": OptimiserSpec("nesterov", momentum=1.0)}, "image.optimiser.momentum is 1.0"),
        ({"optimiser": OptimiserSpec(weight_decay=-1e-4)}, "image.optimiser.weight_decay"),
        (
            {"optimiser": OptimiserSpec("sgd", momentum=0.8)},
            "image.optimiser.momentum has no effect with image.optimiser.name=sgd; use momentum or "
            "nesterov, or leave it out",
        ),
    ],
)
def test_each_impossible_setting_is_one_line(settings: dict[str, Any], says: str) -> None:
    spec = ImageSpec(**{"dev_size": 100, **settings})
    found = problems(spec)
    assert says in found[0] and "\n" not in found[0]
    assert isinstance(found[0], NoEffect) == ("no effect" in says)
    with pytest.raises(UserError, match=re.escape(says)):
        build_student(spec)


def test_all_are_listed_at_once_and_none_where_there_is_none() -> None:
    assert len(problems(ImageSpec(model="lenett", steps=0, batch_size=-1, dev_size=9))) == 3
    own = {"model": "torch.nn:Linear", "data": "json:load", "augment": "torch:flip"}
    assert problems(ImageSpec(dev_size=100, dev_batch=100, steps=100, depth=3, **own)) == []
    assert problems(ImageSpec(dev_size=100, model="wide-resnet", depth=16, width=4)) == []


def test_names_of_the_core_are_looked_up_too() -> None:
    spec = ImageSpec(dev_size=100, optimiser=OptimiserSpec("sgdd"), schedule=ScheduleSpec("liner"))
    optimiser, schedule = problems(spec)
    assert optimiser.startswith("image.optimiser.name: ")
    assert schedule.startswith("image.schedule.name: ") and "did you mean 'linear'" in schedule
    with pytest.raises(UserError, match="did you mean 'sgd'"):
        build_student(spec)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("auto", "cpu"):
        student = build_student(ImageSpec(dev_size=700, hidden=4, device=name))
        assert student.data.train_x.device.type == "cpu"
        assert student.data.train_x.dtype == torch.uint8
    with pytest.raises(UserError, match=r"image\.device is cuda, but torch finds no GPU"):
        build_student(ImageSpec(dev_size=700, device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_sees_the_same_batches() -> None:
    batches = []
    for device in ("cpu", "cuda"):
        student = build_student(ImageSpec(dev_size=700, hidden=4, device=device, augment="crop"))
        student.reset(2)
        images, labels = student.batch(3)
        assert images.device.type == device
        batches.append((images.cpu(), labels.cpu()))
    assert torch.allclose(batches[0][0], batches[1][0], atol=1e-5)
    assert torch.equal(batches[0][1], batches[1][1])


OWN = """\
import numpy as np
import torch
from PIL import Image
class Grey:  # as torchvision's MNIST and its kin
    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        count = 40 if train else 10
        self.data = torch.arange(count).view(-1, 1, 1).expand(-1, 5, 6).to(torch.uint8)
        self.targets = torch.arange(count) % 4
class Pairs:  # as most of torchvision's: (picture, label) by index, and nothing else
    def __getitem__(self, index):
        if index >= 20:
            raise IndexError(index)
        return Image.fromarray(np.full((5, 6, 3), index, np.uint8)), index % 2
def stacked(folder, train):
    images, labels = zip(*Pairs())
    chosen = np.arange(20) % 10 < 9 if train else np.arange(20) % 10 == 9
    return np.stack([np.asarray(image) for image in images])[chosen], np.array(labels)[chosen]
class Like:  # as torchvision's CIFAR10
    def __init__(self, root, train=True):
        count = 40 if train else 10
        self.data = np.full((count, 5, 6, 3), 1 if train else 2, np.uint8)
        self.data[:, 0, 1, 2] = np.arange(count)
        self.targets = [i % 4 for i in range(count)]
def pair(root, train):
    found = Like(root, train)
    return found.data[:, :, :, 0], found.targets
def floats(root, train):
    return np.zeros((5, 6, 6)), [0] * 5
def uneven(root, train):
    return np.zeros((5, 6, 6), np.uint8), [0, 1] * 2
def one_class(root, train):
    return np.zeros((5, 6, 6), np.uint8), [0] * 5
def none(root, train):
    return None
def failing(root, train):
    raise OSError(f"no {root}")
"""


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data_here.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_data")
def test_data_of_the_users_own() -> None:
    colour = load_data(ImageSpec(data="own_data_here:Like", dev_size=8))
    assert colour.train_x.shape == (32, 3, 5, 6) and colour.num_classes == 4
    blue = torch.cat([colour.train_x, colour.dev_x])[:, 2, 0, 1]
    assert np.array_equal(blue.sort().values.numpy(), np.arange(40))
    grey = load_data(ImageSpec(data="own_data_here:pair", dev_size=8))
    assert grey.test_x.shape == (10, 1, 5, 6) and grey.test_x.unique().tolist() == [2]
    tensors = load_data(ImageSpec(data="own_data_here:Grey", dev_size=8))
    assert torch.equal(tensors.train_x[:, 0, 0, 0].long() % 4, tensors.train_y)
    pairs = load_data(ImageSpec(data="own_data_here:stacked", dev_size=4))
    assert pairs.test_x[:, 0, 0, 0].tolist() == [9, 19] and pairs.train_x.shape == (14, 3, 5, 6)


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize(
    "name, says",
    [
        ("floats", "expected unsigned bytes"),
        ("uneven", "5 training images and 4 labels"),
        ("one_class", "holds one class only"),
        ("none", "failed .AttributeError"),
        ("failing", "failed .OSError: no somewhere"),
        ("absent", "cannot be imported"),
    ],
)
def test_own_data_that_cannot_be_used(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_data(ImageSpec(data=f"own_data_here:{name}", folder="somewhere", dev_size=8))


OWN_MEASURES = """
import torch

def share_below(log_probs, targets):
    own = log_probs.gather(1, targets.unsqueeze(1))
    return -torch.relu(0.7 + own).mean()

def broken(log_probs, targets):
    return targets.missing

def each(log_probs, targets):
    return log_probs.sum(1)

def hard(log_probs, targets):
    return (log_probs.argmax(1) == targets).double().mean()
"""


def test_a_measure_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_image_measures.py").write_text(OWN_MEASURES)
    named = {
        name: ImageSpec(dev_size=700, hidden=4, measure=f"own_image_measures:{name}")
        for name in ("share_below", "broken", "each", "hard")
    }
    student = build_student(named["share_below"])
    student.reset(1)
    value = student.smoothed_measure(0)
    own = student._log_probs(student.data.dev_x).gather(1, student.data.dev_y.unsqueeze(1))
    torch.testing.assert_close(value, -torch.relu(0.7 + own).mean())
    assert "code_sha256" in student.content()
    for name, says in (
        ("broken", "AttributeError"), ("each", "one number to maximise"),
        ("hard", "made of the log-probabilities"),
    ):
        with pytest.raises(UserError, match=says):
            build_student(named[name])
