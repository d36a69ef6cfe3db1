"""Image data: the IDX reader, the splits, label noise, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idx_files import idx  # type: ignore[import-not-found]
from official_data import folder_of, needs  # type: ignore[import-not-found]

from l2t_core.errors import UserError
from l2t_vision.data.idx import read_idx
from l2t_vision.data.sets import ImageData, load_data, stratified_order
from l2t_vision.recipe import ImageSpec


def load(folder: Path, **changes: Any) -> ImageData:
    settings = {"data": "mnist", "folder": str(folder), "dev_size": 20, **changes}
    return load_data(ImageSpec(**settings))


def test_idx_files_are_read_as_they_are(tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4)
    for name, content in (("plain", idx(array)), ("packed.gz", gzip.compress(idx(array)))):
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(read_idx(tmp_path / name, 3), array)


def test_a_mnist_folder_gzipped_or_plain(small_mnist: Path) -> None:
    data = load(small_mnist)
    assert data.train_x.shape == (40, 1, 6, 5) and data.train_x.dtype == torch.uint8
    assert data.dev_x.shape == (20, 1, 6, 5) and data.test_x.shape == (20, 1, 6, 5)
    assert data.num_classes == 10 and data.test_y.tolist() == [i % 10 for i in range(20)]


def test_a_folder_at_home(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(small_mnist.parent))
    data = load(Path("~") / small_mnist.name)
    assert torch.equal(data.train_x, load(small_mnist).train_x)
    with pytest.raises(UserError, match="~nobody-here"):
        load(Path("~nobody-here/mnist"))


def test_images_are_standardised_by_the_training_images(small_mnist: Path) -> None:
    data = load(small_mnist)
    x = data.standardised(data.train_x)
    assert x.dtype == torch.float32 and data.train_x.dtype == torch.uint8
    assert abs(float(x.mean())) < 1e-5 and abs(float(x.std(correction=0)) - 1) < 1e-5
    double = data.standardised(data.dev_x, torch.float64)
    by_hand = (data.dev_x.double() - data.train_x.double().mean()) / data.train_x.double().std(
        correction=0
    )
    assert torch.allclose(double, by_hand, atol=1e-12)


def identities(images: torch.Tensor) -> set[int]:
    return set(images[:, 0, 0, 0].tolist())


def test_dev_never_leaks_into_train(small_mnist: Path) -> None:
    data = load(small_mnist)
    train, dev = identities(data.train_x), identities(data.dev_x)
    assert len(dev) == 20 and len(train) == 40 and not train & dev
    fewer = load(small_mnist, train_size=10)
    assert identities(fewer.dev_x) == dev
    assert identities(fewer.train_x) < train


def test_the_data_seed_moves_dev_and_leaves_test_alone(small_mnist: Path) -> None:
    first, again, other = load(small_mnist), load(small_mnist), load(small_mnist, data_seed=7)
    assert torch.equal(first.dev_x, again.dev_x) and torch.equal(first.train_x, again.train_x)
    assert identities(other.dev_x) != identities(first.dev_x)
    assert not identities(other.dev_x) & identities(other.train_x)
    assert torch.equal(other.test_x, first.test_x)


def test_every_stretch_of_the_order_is_stratified() -> None:
    labels = torch.cat([torch.zeros(600), torch.ones(300), torch.full((100,), 2)]).long()
    order = stratified_order(labels, seed=4)
    assert sorted(order.tolist()) == list(range(1000))
    for start, stop in ((0, 50), (137, 437), (900, 1000)):
        counts = labels[order[start:stop]].bincount(minlength=3)
        for count, share in zip(counts.tolist(), (0.6, 0.3, 0.1), strict=True):
            assert abs(count - share * (stop - start)) <= 2
    assert not torch.equal(order, stratified_order(labels, seed=5))


def test_digits_come_stratified_and_whole() -> None:
    data = load_data(ImageSpec(data="digits", dev_size=700))
    assert [len(y) for y in (data.train_y, data.dev_y, data.test_y)] == [597, 700, 500]
    for labels in (data.train_y, data.dev_y, data.test_y):
        shares = labels.bincount(minlength=10) / len(labels)
        assert float((shares - 0.1).abs().max()) < 0.01
    together = torch.cat([data.train_x, data.dev_x, data.test_x]).flatten(1)
    # 1,797 images of which none repeats: three disjoint parts of the whole.
    assert len(together.unique(dim=0)) == 1797


def test_the_test_set_of_digits_is_always_the_same() -> None:
    one, other = (load_data(ImageSpec(dev_size=700, data_seed=seed)) for seed in (1, 2))
    assert torch.equal(one.test_x, other.test_x) and torch.equal(one.test_y, other.test_y)
    assert not torch.equal(one.dev_x, other.dev_x)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"dev_size": 60}, "image.dev_size 60 leaves none to learn from; make it smaller"),
        ({"dev_size": 30, "train_size": 31}, "has 60 images outside its test set: .* do not fit"),
    ],
)
def test_impossible_sizes(small_mnist: Path, changes: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(small_mnist, **changes)


def test_an_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'mnist'"):
        load(tmp_path, data="mnits")


LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    "name, content, says",
    [
        (LABELS, idx(np.arange(60) % 10)[:-1], "cut short: 67 bytes, its header says 68"),
        (LABELS, idx(np.arange(60) % 10) + b"\0", "too long"),
        (LABELS, idx(np.full(60, 57)), "label 57 is out of range"),
        (LABELS, idx(np.zeros(59)), "60 training images and 59 labels"),
        (LABELS, idx(np.zeros((60, 1))), "no IDX file of bytes in 1 dimensions"),
        (LABELS, b"\0\0\x08\x01\0", "no IDX file"),
        (LABELS, b"", "no IDX file"),
        (LABELS, b"<html>not found</html>", "no IDX file"),
        (IMAGES, idx(np.zeros((60, 5, 5))), "images are 1 x 5 x 5 and test images 1 x 6 x 5"),
        (f"{LABELS}.gz", gzip.compress(idx(np.zeros(60)))[:-9], "cut short"),
        (f"{LABELS}.gz", b"\x1f\x8b\x08garbage", "cannot be read"),
    ],
)
def test_damaged_files_are_named_with_the_mend(
    small_mnist: Path, name: str, content: bytes, says: str
) -> None:
    for old in small_mnist.glob(f"{name.removesuffix('.gz')}*"):
        old.unlink()
    (small_mnist / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        load(small_mnist)
    line = str(raised.value)
    assert says in line and str(small_mnist) in line
    assert "`l2t data prepare mnist" in line


def test_missing_folder_and_file(small_mnist: Path) -> None:
    with pytest.raises(UserError, match=r"l2t data prepare mnist --out .*gone"):
        load(small_mnist / "gone")
    (small_mnist / LABELS).unlink()
    with pytest.raises(UserError, match="neither train-labels-idx1-ubyte"):
        load(small_mnist)


@needs("MNIST")
def test_real_mnist() -> None:
    data = load(folder_of("MNIST"), dev_size=10000)
    assert data.train_x.shape == (50000, 1, 28, 28) and len(data.test_y) == 10000
    # The constants that everybody uses for MNIST, here of 50,000 of its images.
    assert float(data.mean / 255) == pytest.approx(0.1307, abs=2e-4)
    assert float(data.deviation / 255) == pytest.approx(0.3081, abs=2e-4)
    assert data.test_y[:6].tolist() == [7, 2, 1, 0, 4, 1]


@pytest.mark.parametrize(
    "labels, says",
    [
        ("[0.5, 1.0]", "labels are not whole numbers"),
        ("[-1, 1]", "a label is -1; classes are numbered from 0 on"),
    ],
)
def test_labels_of_ones_own_data_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, says: str
) -> None:
    code = (
        "import torch\n"
        "def load(folder, train):\n"
        f"    return torch.zeros(2, 3, 3, dtype=torch.uint8), torch.tensor({labels})\n"
    )
    module = f"own_labels_{len(labels)}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=says):
        load(tmp_path, data=f"{module}:load")


def test_ones_own_data_that_say_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pixels alike, which no deviation divides, and a class that the test set alone has."""
    code = (
        "import torch\n"
        "def load(folder, train):\n"
        "    labels = torch.tensor([0, 1] * 3 if train else [0, 2])\n"
        "    return torch.full((len(labels), 3, 3), 7, dtype=torch.uint8), labels\n"
    )
    (tmp_path / "own_that_say_little.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    data = load(tmp_path, data="own_that_say_little:load", dev_size=2)
    assert data.num_classes == 3
    assert (float(data.mean), float(data.deviation)) == (7.0, 1.0)
    assert not bool(data.standardised(data.train_x).any())
