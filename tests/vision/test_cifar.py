"""CIFAR-10 and CIFAR-100 in every official form, and pickles that mean harm."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cifar_files import archive, binary, python_pickle  # type: ignore[import-not-found]

from l2t_core.errors import UserError
from l2t_vision.data.cifar import CIFAR10, CIFAR100, Cifar, load_cifar
from l2t_vision.data.pickles import read_pickle
from l2t_vision.data.prepare import prepare_cifar
from l2t_vision.data.sets import load_data
from l2t_vision.recipe import ImageSpec

IMAGES = np.random.default_rng(4).integers(0, 256, (60, 3, 32, 32)).astype(np.uint8)
FINE = [(7 * i) % 10 for i in range(60)]


def files_of(kind: Cifar, pickled: bool) -> dict[str, bytes]:
    """Return the files of a small set: 10 images in each, in the official order."""
    form = kind.forms[pickled]
    found = {}
    names = list(form.files)
    size = 60 // len(names)
    for position, name in enumerate(names):
        part = slice(position * size, (position + 1) * size)
        images, fine = IMAGES[part], FINE[part]
        coarse = [label // 5 for label in fine]
        if kind is CIFAR10:
            content = (
                python_pickle(images, labels=fine) if pickled else binary(images, fine)
            )
        elif pickled:
            content = python_pickle(images, coarse_labels=coarse, fine_labels=fine)
        else:
            content = binary(images, coarse, fine)
        found[f"{form.folder}/{name}"] = content
    return found


def write(folder: Path, kind: Cifar, pickled: bool, how: str) -> Path:
    """Write a small CIFAR set into ``folder`` as an archive, unpacked, or as bare files."""
    folder.mkdir(exist_ok=True)
    form, files = kind.forms[pickled], files_of(kind, pickled)
    if how == "archive":
        archive(folder / form.archive, {**files, f"{form.folder}/readme.html": b"<html>"})
        return folder
    for name, content in files.items():
        path = folder / (name if how == "unpacked" else Path(name).name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize("how", ["archive", "unpacked", "bare"])
@pytest.mark.parametrize("pickled", [False, True], ids=["binary", "python"])
@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_every_form_gives_the_same_images(
    tmp_path: Path, kind: Cifar, pickled: bool, how: str
) -> None:
    raw = load_cifar(write(tmp_path / "data", kind, pickled, how), kind)
    train = 50 if kind is CIFAR10 else 30
    assert raw.num_classes == kind.num_classes and raw.train_x.dtype == torch.uint8
    assert np.array_equal(raw.train_x.numpy(), IMAGES[:train])
    assert np.array_equal(raw.test_x.numpy(), IMAGES[train:])
    assert raw.train_y.tolist() == FINE[:train] and raw.test_y.tolist() == FINE[train:]


def test_a_recipe_reads_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", CIFAR100, False, "unpacked")
    data = load_data(ImageSpec(data="cifar100", folder=str(folder), dev_size=10))
    assert data.num_classes == 100 and data.train_x.shape == (20, 3, 32, 32)
    assert data.mean.shape == (3,)
    channels = data.standardised(data.train_x).transpose(0, 1).flatten(1)
    assert torch.allclose(channels.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(channels.std(1, correction=0), torch.ones(3), atol=1e-5)


class Harmful:
    """Pickles as a call of ``os.mkdir``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_means_harm_executes_nothing(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "executed"
    content = pickle.dumps({"data": Harmful(trace), "labels": [1]}, protocol=protocol)
    folder = write(tmp_path / "data", CIFAR10, True, "bare")
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_cifar(folder, CIFAR10)
    line = str(raised.value)
    assert "data_batch_2" in line and "mkdir" in line and "nothing in it was executed" in line
    assert "\n" not in line and not trace.exists()
    pickle.loads(content)  # it would have
    assert trace.exists()


GETATTR = b"cbuiltins\ngetattr\n(cnumpy\nndarray\nU\x04dumptR."
NUMPY_CODE = b"cnumpy.testing\nrundocs\n(U\x04a.pytR."


@pytest.mark.parametrize(
    "content, says",
    [
        (GETATTR, "builtins.getattr"),
        (NUMPY_CODE, "numpy.testing.rundocs"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
        # Changing a class that is shared: BUILD on the class itself.
        (b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.", "missing"),
        (b"\x80\x02P1\n.", ""),
        (b"", ""),
        (b"\x80\x02K\x01.", "holds a int"),
        (python_pickle(IMAGES[:2], labels=[1, 2])[:-40], ""),
        (python_pickle(IMAGES[:2], labels=[1, 2]).replace(b"u1", b"O8"), "unsigned bytes"),
        (b"(" * 100_000, ""),
    ],
)
def test_other_pickles_are_refused(content: bytes, says: str) -> None:
    with pytest.raises(UserError, match="nothing in it was executed") as raised:
        read_pickle(content, "batch")
    assert says in str(raised.value)


def test_the_pickles_here_are_pickles() -> None:
    """What stands for Python 2's pickles is read in the same way by Python's own reader."""
    content = python_pickle(IMAGES[:3], fine_labels=[1, 2, 300])
    theirs, ours = pickle.loads(content, encoding="latin1"), read_pickle(content, "batch")
    assert theirs.keys() == ours.keys() and ours["fine_labels"] == [1, 2, 300]
    assert np.array_equal(theirs["data"], ours["data"])


def test_pickles_that_python_3_wrote_again_are_read() -> None:
    for protocol in (2, 3, 4):
        entry = {b"data": IMAGES[:3].reshape(3, -1), "labels": [1, 2, 3]}
        found = read_pickle(pickle.dumps(entry, protocol=protocol), "batch")
        assert np.array_equal(found["data"], entry[b"data"]) and found["labels"] == [1, 2, 3]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("data_batch_3.bin", binary(IMAGES[:2], [1, 2])[:-1], "records have 3073"),
        ("data_batch_3.bin", b"", "cut short"),
        ("test_batch.bin", binary(IMAGES[:2], [1, 10]), "label 10 is out of range"),
    ],
)
def test_damaged_records(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    folder = write(tmp_path / "data", CIFAR10, False, "unpacked")
    (folder / "cifar-10-batches-bin" / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        load_cifar(folder, CIFAR10)
    assert f"`l2t data prepare cifar10 --out {folder}`" in str(raised.value)


@pytest.mark.parametrize(
    "entry, says",
    [
        ({"data": IMAGES[:2].reshape(2, -1)}, "no list 'labels'"),
        ({"data": IMAGES[:2], "labels": [1, 2]}, "no array 'data' of 3072"),
        ({"data": IMAGES[:2].reshape(2, -1), "labels": [1]}, "2 images and 1 labels"),
        ({"data": IMAGES[:2].reshape(2, -1), "labels": [1, 2**70]}, "no list 'labels'"),
        ({"data": IMAGES[:2].reshape(2, -1), "labels": [1, -1]}, "label -1 is out of range"),
    ],
)
def test_pickles_of_something_else(tmp_path: Path, entry: dict[str, Any], says: str) -> None:
    folder = write(tmp_path / "data", CIFAR10, True, "bare")
    (folder / "test_batch").write_bytes(pickle.dumps(entry, protocol=2))
    with pytest.raises(UserError, match=says):
        load_cifar(folder, CIFAR10)


def test_missing_files_and_damaged_archives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data folder .*l2t data prepare cifar10"):
        load_cifar(tmp_path / "gone", CIFAR10)
    folder = write(tmp_path / "data", CIFAR10, False, "archive")
    path = folder / "cifar-10-binary.tar.gz"
    whole = path.read_bytes()
    for content in (whole[:-200], b"no archive", whole[:500]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read or is cut short"):
            load_cifar(folder, CIFAR10)
    files = files_of(CIFAR10, False)
    del files["cifar-10-batches-bin/data_batch_4.bin"]
    archive(path, files)
    with pytest.raises(UserError, match=r"no cifar-10-batches-bin/data_batch_4\.bin"):
        load_cifar(folder, CIFAR10)
    path.unlink()
    with pytest.raises(UserError, match=r"none of cifar-10-binary.tar.gz, cifar-10-batches-bin/"):
        load_cifar(folder, CIFAR10)


def quiet(event: dict[str, Any]) -> None:
    pass


def small_official(kind: Cifar, folder: Path) -> Cifar:
    """Return ``kind`` with the checksums and the sizes of the small files under ``folder``."""

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    forms = []
    for form in kind.forms:
        sums = {n: md5(folder / form.folder / n) for n, known in form.files.items() if known}
        train = {name: sums.get(name, "") for name in form.train}
        test = {name: sums.get(name, "") for name in form.test}
        packed = md5(folder / form.archive)
        forms.append(dataclasses.replace(form, train=train, test=test, md5=packed))
    return dataclasses.replace(kind, forms=tuple(forms), sizes=(50, 10))


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """Return a folder with both forms of CIFAR-10, packed and unpacked."""
    folder = tmp_path / "everything"
    for pickled in (False, True):
        for how in ("archive", "unpacked"):
            write(folder, CIFAR10, pickled, how)
    return folder


@pytest.mark.parametrize("how", ["archive", "unpacked", "bare"])
@pytest.mark.parametrize("pickled", [False, True], ids=["binary", "python"])
def test_prepared_from_a_folder(
    tmp_path: Path, everything: Path, pickled: bool, how: str
) -> None:
    kind = small_official(CIFAR10, everything)
    source, out = write(tmp_path / "source", CIFAR10, pickled, how), tmp_path / "out"
    if how == "archive":  # an archive holds the time at which it was packed
        archive_ = CIFAR10.forms[pickled].archive
        (source / archive_).write_bytes((everything / archive_).read_bytes())
    stages: list[dict[str, Any]] = []
    assert prepare_cifar(kind, out, source, stages.append) == out
    assert len(stages) == (1 if how == "archive" else 6)
    assert np.array_equal(load_cifar(out, CIFAR10).train_x.numpy(), IMAGES[:50])
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    prepare_cifar(kind, out, None, quiet)  # whole already: nothing is fetched or written
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_downloaded_as_the_binary_archive(
    tmp_path: Path, everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l2t_vision.data.prepare.CIFAR_SITE", everything.as_uri())
    kind, events = small_official(CIFAR10, everything), []
    out = prepare_cifar(kind, tmp_path / "out", None, events.append)
    assert [p.name for p in out.iterdir()] == ["cifar-10-binary.tar.gz"]
    arrived = [event for event in events if event["event"] == "download"]
    size = (out / "cifar-10-binary.tar.gz").stat().st_size
    assert arrived[-1]["done"] == arrived[-1]["of"] == size
    assert np.array_equal(load_cifar(out, CIFAR10).test_x.numpy(), IMAGES[50:])


@pytest.mark.parametrize("how", ["archive", "unpacked"])
def test_files_that_are_not_the_official_ones(tmp_path: Path, how: str) -> None:
    source = write(tmp_path / "source", CIFAR10, True, how)
    with pytest.raises(UserError, match="another checksum"):
        prepare_cifar(CIFAR10, tmp_path / "out", source, quiet)
    assert not (tmp_path / "out").exists()


def test_whole_records_that_are_too_few_are_not_the_official_files(
    tmp_path: Path, everything: Path
) -> None:
    kind = small_official(CIFAR10, everything)
    source = write(tmp_path / "source", CIFAR10, False, "unpacked")
    path = source / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[: 7 * 3073])  # of ten
    with pytest.raises(UserError, match=r"holds 47 \+ 10 images, cifar10 has 50 \+ 10;"):
        prepare_cifar(kind, tmp_path / "out", source, quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("download", [True, False])
def test_good_files_are_not_put_behind_damaged_ones(
    tmp_path: Path, everything: Path, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    monkeypatch.setattr("l2t_vision.data.prepare.CIFAR_SITE", everything.as_uri())
    kind, out = small_official(CIFAR10, everything), write(tmp_path / "out", CIFAR10, False, "bare")
    (out / "data_batch_2.bin").write_bytes(b"cut")
    source = None if download else everything
    with pytest.raises(UserError, match=r"out holds damaged files of cifar10, .*; remove them"):
        prepare_cifar(kind, out, source, quiet)
    assert len([*out.iterdir()]) == 6
    for path in out.iterdir():
        path.unlink()
    prepare_cifar(kind, out, source, quiet)
    assert len(load_cifar(out, CIFAR10).train_y) == 50


def test_damaged_files_are_written_anew(tmp_path: Path, everything: Path) -> None:
    kind = small_official(CIFAR10, everything)
    out = write(tmp_path / "out", CIFAR10, False, "unpacked")
    (out / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(b"cut")
    prepare_cifar(kind, out, everything, quiet)
    assert len(load_cifar(out, CIFAR10).train_y) == 50


def test_a_folder_of_something_else_points_to_the_other_way(tmp_path: Path) -> None:
    (tmp_path / "cifar10-jpeg.tar.xz").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of cifar-10-binary.*image\.data=images"):
        prepare_cifar(CIFAR10, tmp_path / "out", tmp_path, quiet)


def test_offline_the_line_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Port 9 of this machine: refused at once, no name to look up.
    monkeypatch.setattr("l2t_vision.data.prepare.CIFAR_SITE", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"cannot download http://127.*--from"):
        prepare_cifar(CIFAR100, tmp_path / "out", None, quiet)
    assert not (tmp_path / "out").exists()
