"""Label noise and long tails: exact numbers, the same each time, on train unless asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from l2t_core.errors import UserError
from l2t_vision.checks import problems
from l2t_vision.data.corruption import label_confusion, long_tail, noisy_labels
from l2t_vision.data.sets import ImageData, load_data
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import build_student

LABELS = torch.arange(10).repeat(2000)


def noisy(rate: float, kind: str = "symmetric", seed: int = 3) -> torch.Tensor:
    return noisy_labels(LABELS, rate, kind, 10, torch.Generator().manual_seed(seed))


def transitions(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return how many labels of each class (row) became which (column)."""
    return (before * 10 + after).bincount(minlength=100).view(10, 10)


def test_symmetric_noise_makes_exactly_the_rate_wrong_in_each_class() -> None:
    found = transitions(LABELS, noisy(0.4))
    assert found.diagonal().tolist() == [1200] * 10
    # 800 wrong labels of a class over 9 others: 88.9 each, deviation 8.9.
    away = found[~torch.eye(10, dtype=torch.bool)]
    assert float((away - 88.9).abs().max()) < 5 * 8.9


def test_at_rate_one_no_label_stays() -> None:
    assert not bool((noisy(1.0) == LABELS).any())
    assert torch.equal(noisy(0.0), LABELS)


def test_pair_noise_names_the_next_class() -> None:
    found = transitions(LABELS, noisy(0.45, "pair"))
    for label in range(10):
        assert int(found[label, label]) == 1100 and int(found[label, (label + 1) % 10]) == 900


def test_the_confusion_counts_what_became_what() -> None:
    after = noisy(0.4)
    found = label_confusion(LABELS, after, 10)
    torch.testing.assert_close(found, transitions(LABELS, after).double() / 2000)
    # A class that is not there is taken to be labelled rightly.
    classes, labels = torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2])
    expected = [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert label_confusion(classes, labels, 3).tolist() == expected


def test_the_data_know_their_confusion() -> None:
    spec = ImageSpec(data="digits", dev_size=200, label_noise=0.25, noise="pair")
    found = load_data(spec).confusion
    assert float((found.diagonal() - 0.75).abs().max()) < 0.01
    assert float((found.roll(-1, 1).diagonal() - 0.25).abs().max()) < 0.01
    clean = load_data(ImageSpec(data="digits", dev_size=200)).confusion
    assert torch.equal(clean, torch.eye(10, dtype=torch.float64))


def test_noise_follows_its_seed_alone() -> None:
    assert torch.equal(noisy(0.4), noisy(0.4))
    assert not torch.equal(noisy(0.4), noisy(0.4, seed=4))


def test_numbers_are_rounded_class_by_class() -> None:
    labels = torch.tensor([0] * 7 + [1] * 3 + [2])
    wrong = noisy_labels(labels, 0.25, "pair", 3, torch.Generator().manual_seed(1)) != labels
    assert [int(wrong[labels == c].sum()) for c in range(3)] == [2, 1, 0]


def test_an_unknown_kind() -> None:
    with pytest.raises(UserError, match="did you mean 'symmetric'"):
        noisy(0.1, "symetric")


@pytest.mark.parametrize(
    "classes, size, imbalance, total, ends",
    # The sizes of the long-tailed CIFAR-10 and CIFAR-100 of Cui et al. 2019.
    [
        (10, 5000, 100, 12406, (5000, 50)),
        (10, 5000, 10, 20431, (5000, 500)),
        (100, 500, 100, 10847, (500, 5)),
        (100, 500, 10, 19573, (500, 50)),
        (10, 5000, 1, 50000, (5000, 5000)),
    ],
)
def test_long_tails_have_their_published_sizes(
    classes: int, size: int, imbalance: float, total: int, ends: tuple[int, int]
) -> None:
    labels = torch.arange(classes).repeat(size)
    kept = long_tail(labels, imbalance, classes)
    counts = labels[kept].bincount(minlength=classes)
    assert len(kept) == total and (int(counts[0]), int(counts[-1])) == ends
    assert torch.equal(kept, kept.sort().values)
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)


def test_what_is_a_whole_number_but_for_rounding_is_that_number() -> None:
    labels = torch.arange(2).repeat(98)
    assert 98 * 49.0**-1 < 2
    assert labels[long_tail(labels, 49, 2)].bincount().tolist() == [98, 2]


def test_a_class_never_vanishes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3)
    assert labels[long_tail(labels, 1000, 2)].bincount().tolist() == [50, 1]


def load(small_mnist: Path, **changes: Any) -> ImageData:
    settings = {"data": "mnist", "folder": str(small_mnist), "dev_size": 20, **changes}
    return load_data(ImageSpec(**settings))


def names(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_train_only_unless_dev_is_asked_for_and_never_test(small_mnist: Path) -> None:
    clean = load(small_mnist)
    worse = load(small_mnist, label_noise=0.5, imbalance=4.0)
    assert torch.equal(clean.dev_y, worse.dev_y) and torch.equal(clean.dev_x, worse.dev_x)
    truth = dict(zip(names(clean.train_x), clean.train_y.tolist(), strict=True))
    kept = [truth[name] for name in names(worse.train_x)]
    # 4 images of each class, 4 ** (-k / 9) of which stay: 4, 3.43, ..., 1.
    sizes = [4, 3, 2, 2, 2, 1, 1, 1, 1, 1]
    assert torch.tensor(kept).bincount().tolist() == sizes
    wrong = sum(a != b for a, b in zip(kept, worse.train_y.tolist(), strict=True))
    assert wrong == 2 + 2 + 1 + 1 + 1 + 5  # halves are rounded up
    both = load(small_mnist, label_noise=0.5, imbalance=4.0, corrupt_dev=True)
    assert torch.equal(both.train_y, worse.train_y) and torch.equal(both.train_x, worse.train_x)
    true_dev = dict(zip(names(clean.dev_x), clean.dev_y.tolist(), strict=True))
    # 2 images of each class: 2, then 1 of each other.
    kept = [true_dev[name] for name in names(both.dev_x)]
    assert torch.tensor(kept).bincount().tolist() == [2, *[1] * 9]
    changed = [a != b for a, b in zip(kept, both.dev_y.tolist(), strict=True)]
    assert sum(changed) == 10  # one of the two, and half of one, rounded up, of each other
    for data in (worse, both):
        assert torch.equal(data.test_x, clean.test_x) and torch.equal(data.test_y, clean.test_y)


def test_trusted_images_are_learnt_from_with_their_right_labels(small_mnist: Path) -> None:
    worse = load(small_mnist, label_noise=1.0)
    both = load(small_mnist, label_noise=1.0, trusted=10)
    only = load(small_mnist, label_noise=1.0, trusted=10, only_trusted=True)
    for data in (both, only):
        assert torch.equal(data.dev_x, worse.dev_x[10:])
        assert torch.equal(data.dev_y, worse.dev_y[10:])
        assert torch.equal(data.test_x, worse.test_x) and torch.equal(data.test_y, worse.test_y)
    assert torch.equal(only.train_x, worse.dev_x[:10])
    assert torch.equal(only.train_y, worse.dev_y[:10])
    assert sorted(only.train_y.tolist()) == list(range(10))  # of each class one
    assert torch.equal(both.train_x, torch.cat([worse.train_x, only.train_x]))
    assert torch.equal(both.train_y, torch.cat([worse.train_y, only.train_y]))
    assert torch.equal(only.confusion, torch.eye(10, dtype=torch.float64))
    # Of each class 4 wrong labels and 1 right one.
    torch.testing.assert_close(both.confusion.diagonal(), torch.full((10,), 0.2).double())
    pixels = only.train_x.double()
    torch.testing.assert_close(only.mean, pixels.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trusted": 20}, r"trusted is 20.*below image\.dev_size, 20"),
        ({"trusted": -1}, "trusted is -1"),
        ({"only_trusted": True}, "only_trusted is True.*nothing would be left"),
    ],
)
def test_trusted_images_have_to_be_there(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_student(ImageSpec(**{"dev_size": 20, **settings}))


def test_more_trusted_images_than_dev_has_is_said_and_nothing_else() -> None:
    (problem,) = problems(ImageSpec(dev_size=20, trusted=900))
    assert problem.startswith("image.trusted is 900")


def test_a_tail_of_dev_may_leave_nothing_to_look_at(small_mnist: Path) -> None:
    with pytest.raises(UserError, match=r"image\.trusted 15 takes all"):
        load(small_mnist, imbalance=4.0, corrupt_dev=True, trusted=15)


def test_the_data_seed_draws_other_noise(small_mnist: Path) -> None:
    first = load(small_mnist, label_noise=1.0)
    assert torch.equal(first.train_y, load(small_mnist, label_noise=1.0).train_y)
    other = load(small_mnist, label_noise=1.0, data_seed=5)
    assert not torch.equal(first.train_y, other.train_y)
