"""Crops and mirror images: what they are, and that a step's batch is always the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from l2t_core.errors import UserError
from l2t_core.students.train import train_student
from l2t_vision.data.augmentation import (
    AUGMENTATIONS,
    Augmentation,
    augmented,
    own_augmented,
    seeded,
)
from l2t_vision.student import ImageStudent

Make = Callable[..., ImageStudent]


def moved(images: torch.Tensor, how: Augmentation, seed: int = 1) -> torch.Tensor:
    return augmented(images, how, torch.Generator().manual_seed(seed))


def moves_of(image: torch.Tensor, result: torch.Tensor, padding: int) -> set[tuple[int, int, bool]]:
    """Return all (down, right, mirrored) that turn ``image`` into ``result``, by trying each."""
    height, width = image.shape[1:]
    padded = F.pad(image, [padding] * 4)
    found = set()
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            crop = padded[:, down : down + height, right : right + width]
            for mirrored in (False, True):
                if torch.equal(crop.flip(2) if mirrored else crop, result):
                    found.add((down, right, mirrored))
    return found


@pytest.mark.parametrize("name, mirrors", [("crop", False), ("crop-flip", True)])
def test_each_image_is_a_crop_of_its_padded_self(name: str, mirrors: bool) -> None:
    images = torch.randn(60, 3, 7, 9)
    result = moved(images, AUGMENTATIONS.get(name))
    found = [moves_of(a, b, 4) for a, b in zip(images, result, strict=True)]
    assert all(len(each) == 1 for each in found)
    together = set().union(*found)
    assert {mirrored for _, _, mirrored in together} == ({False, True} if mirrors else {False})
    assert {down for down, _, _ in together} == {right for _, right, _ in together} == set(range(9))


def test_moves_are_even() -> None:
    images = torch.arange(1.0, 6.0).view(1, 1, 1, 5).expand(9000, 1, 1, 5)
    result = moved(images, Augmentation(1, True))
    places, counts = result.flatten(1).unique(dim=0, return_counts=True)
    # 3 vertical shifts, of which 2 leave the single row; 3 horizontal ones, each mirrored or not.
    assert len(places) == 7
    assert sorted(counts.tolist())[:-1] == pytest.approx([500] * 6, rel=0.2)
    assert int(counts.max()) == pytest.approx(6000, rel=0.05)


def test_no_augmentation_changes_nothing() -> None:
    images = torch.randn(4, 1, 5, 5)
    assert moved(images, AUGMENTATIONS.get("none")) is images


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_the_batch_of_a_step_is_the_same_whenever_asked(make_student: Make, augment: str) -> None:
    student = make_student(shape=(3, 8, 8), augment=augment)
    student.reset(5)
    forward = [[t.clone() for t in student.batch(step)] for step in range(12)]
    torch.manual_seed(99)  # the global random numbers have no part in it
    for step in reversed(range(12)):
        again = student.batch(step)
        assert torch.equal(again[0], forward[step][0]) and torch.equal(again[1], forward[step][1])
    fresh = make_student(shape=(3, 8, 8), augment=augment)
    fresh.reset(5)
    assert torch.equal(fresh.batch(7)[0], forward[7][0])
    fresh.reset(6)
    assert not torch.equal(fresh.batch(7)[0], forward[7][0])


def test_the_same_images_are_moved_otherwise_in_the_next_epoch(make_student: Make) -> None:
    student = make_student(batch_size=40, augment="crop")  # an epoch is one batch
    student.reset(1)
    batches = []
    for step in range(2):
        order = student.indices(step).argsort()
        batches.append(student.batch(step)[0][order])
    assert float((batches[0] == batches[1]).flatten(1).all(1).float().mean()) < 0.2


def test_dev_and_test_are_never_augmented(make_student: Make) -> None:
    plain, moving = (make_student(augment=augment) for augment in ("none", "crop-flip"))
    for student in (plain, moving):
        student.reset(3)
    assert torch.equal(plain.smoothed_measure(1), moving.smoothed_measure(1))
    assert plain.dev_statistics(3) == moving.dev_statistics(3)
    assert plain.test_error() == moving.test_error()
    assert not torch.equal(plain.batch(0)[0], moving.batch(0)[0])


def test_training_on_moved_images_can_be_repeated(make_student: Make) -> None:
    ends = []
    for _ in range(2):
        student = make_student(shape=(3, 8, 8), model="convnet", augment="crop-flip", dropout=0.3)
        train_student(student, 4, None)
        ends.append(torch.cat([p.detach().flatten() for p in student.module.parameters()]))
    assert torch.equal(*ends)


OWN = """\
import random
import numpy as np
import torch

def noisy(images):
    assert images.dtype == torch.uint8
    return images.add_(torch.randint(0, 3, images.shape, dtype=torch.uint8))

class Mirror:
    def __call__(self, images):
        return images.flip(3)

mirror = Mirror()

def by_python(images):
    return images + random.randrange(1, 200)

def by_numpy(images):
    return images + np.random.randint(1, 200)

calls = []

def forgetful(images):
    calls.append(len(images))
    return images.flip(3) if len(calls) > 4 else images

def cut(images):
    return images[:, :, 1:]

def lighter(images):
    return images / 2

def broken(images):
    return images.view(3)
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the functions above where a user has theirs."""
    (tmp_path / "own_augmentation.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_code")
def test_an_augmentation_of_ones_own_is_replayed(make_student: Make) -> None:
    student = make_student(augment="own_augmentation:noisy")
    student.reset(5)
    before = torch.get_rng_state()
    data = student.data.train_x.clone()
    forward = [student.batch(step)[0].clone() for step in range(12)]
    assert all(torch.equal(student.batch(s)[0], forward[s]) for s in reversed(range(12)))
    # Neither the data nor anyone else's random numbers are touched.
    assert torch.equal(data, student.data.train_x)
    assert torch.equal(before, torch.get_rng_state())
    plain = make_student()
    plain.reset(5)
    added = [(f - plain.batch(s)[0]) * 64 for s, f in enumerate(forward)]  # bytes
    assert {int(v) for a in added for v in a.round().unique() if v >= 0} == {0, 1, 2}
    assert not torch.equal(added[0], added[5])  # the same images, an epoch later
    assert plain.test_error() == student.test_error()


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize("name", ["by_python", "by_numpy"])
def test_random_numbers_of_python_and_numpy_are_replayed(make_student: Make, name: str) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    student = make_student(augment=f"own_augmentation:{name}")
    student.reset(5)
    forward = [student.batch(step)[0].clone() for step in range(12)]
    assert all(torch.equal(student.batch(s)[0], forward[s]) for s in reversed(range(12)))
    assert before == (random.getstate(), np.random.get_state()[1].tolist())
    plain = make_student()
    plain.reset(5)
    steps = [f - plain.batch(s)[0] for s, f in enumerate(forward)]
    assert len({round(float(step.max()), 3) for step in steps}) > 2  # not always the same draw


def test_all_of_a_seed_counts_for_numpy() -> None:
    """It takes 32 bits at a time, and seeds of a run's students have more."""
    images = torch.zeros(2, 1, 5, 5, dtype=torch.uint8)

    def drawn(seed: int) -> torch.Tensor:
        def draw(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(np.random.randint(0, 256, images.shape, dtype=np.uint8))

        return own_augmented(images, draw, "own:draw", seed)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(1 + 2**32))


def test_images_are_not_moved_by_the_numbers_that_dropout_draws(make_student: Make) -> None:
    student = make_student(augment="crop", batch_size=40)
    student.reset(5)
    plain = make_student(batch_size=40)
    plain.reset(5)
    with seeded(student.step_seed(3), torch.device("cpu")):
        others = augmented(
            plain.batch(3)[0], AUGMENTATIONS.get("crop"), torch.default_generator
        )
    assert not torch.equal(student.batch(3)[0], others)


@pytest.mark.usefixtures("own_code")
def test_an_object_may_augment(make_student: Make) -> None:
    student, plain = make_student(augment="own_augmentation:mirror"), make_student()
    for each in (student, plain):
        each.reset(2)
    assert torch.equal(student.batch(3)[0], plain.batch(3)[0].flip(3))


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("forgetful", "two results from one seed"),
        ("cut", r"returned \[8, 1, 7, 8\] for images of \[8, 1, 8, 8\]"),
        ("lighter", "torch.float32; it must keep images unsigned bytes"),
        ("broken", "failed"),
        ("gone", "cannot be imported"),
    ],
)
def test_what_cannot_augment_is_one_line(make_student: Make, name: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        make_student(augment=f"own_augmentation:{name}")
    assert "\n" not in str(error.value)
