"""Image students trained on fixed losses: interrupted and resumed, and as a plain torch loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from l2t_core.losses.steps import Recorded, fixed_loss
from l2t_core.specs import OptimiserSpec
from l2t_core.students.train import train_student
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import ImageStudent, build_student

SPEC = ImageSpec(
    data="digits", hidden=8, dropout=0.2, dev_size=200, batch_size=16, steps=12, dev_interval=3,
    optimiser=OptimiserSpec("momentum", 0.1),
)


@pytest.fixture(scope="module")
def student() -> ImageStudent:
    return build_student(SPEC)


def fresh(student: ImageStudent) -> ImageStudent:
    return ImageStudent(student.spec, student.data)


@pytest.mark.parametrize("name", ["large_margin", "logit_adjusted", "sigmoid"])
def test_killed_and_resumed_is_the_same(student: ImageStudent, tmp_path: Path, name: str) -> None:
    def loss_of(other: ImageStudent) -> Recorded:
        return Recorded(fixed_loss(name, {"warmup": 0.5} if name == "sigmoid" else {}, other))

    def kill(event: dict) -> None:
        if event["step"] == 7:
            raise KeyboardInterrupt

    whole, parts = fresh(student), fresh(student)
    expected = loss_of(whole)
    train_student(whole, 4, expected)
    snapshot = tmp_path / "snapshot.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_student(
            parts, 4, loss_of(parts), snapshot=snapshot, snapshot_every=2, on_event=kill
        )
    again = fresh(student)
    found = loss_of(again)
    train_student(again, 4, found, snapshot=snapshot, snapshot_every=2)
    assert found.curve == expected.curve and [step for step, *_ in found.curve] == [3, 6, 9, 12]
    for a, b in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_class_shares_are_those_of_the_training_images(student: ImageStudent) -> None:
    shares, labels = student.class_shares(), student.data.train_y
    assert float(shares.sum()) == pytest.approx(1.0) and len(shares) == student.num_classes
    for k in range(student.num_classes):
        assert float(shares[k]) == pytest.approx(float((labels == k).double().mean()))


def test_label_smoothing_is_a_plain_torch_loop(student: ImageStudent) -> None:
    ours = fresh(student)
    train_student(ours, 5, fixed_loss("label_smoothing", {"eps": 0.2}, ours))
    theirs = fresh(student)
    theirs.reset(5)
    optimiser = torch.optim.SGD(theirs.module.parameters(), lr=0.1, momentum=0.9)
    theirs.module.train()
    for step in range(12):
        images, labels = theirs.batch(step)
        torch.manual_seed(theirs.step_seed(step))
        optimiser.zero_grad()
        F.cross_entropy(theirs.module(images), labels, label_smoothing=0.2).backward()
        optimiser.step()
    for a, b in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)
