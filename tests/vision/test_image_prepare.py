"""`l2t data prepare mnist`: from a folder, from mirrors, and offline."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from idx_files import idx  # type: ignore[import-not-found]
from official_data import folder_of, needs  # type: ignore[import-not-found]

from l2t_core.errors import UserError
from l2t_vision.data import prepare
from l2t_vision.data.idx import IDX_FILES
from l2t_vision.data.prepare import DATASETS, FASHION_MNIST, MNIST, prepare_idx
from l2t_vision.data.sets import load_data
from l2t_vision.recipe import ImageSpec


def prepare_mnist(out: Path, source: Path | None, on_event: Any) -> Path:
    return prepare_idx(prepare.MNIST, out, source, on_event)


def quiet(event: dict[str, Any]) -> None:
    pass


@pytest.fixture
def official(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose small files count as the official ones."""
    plain = {}
    for name in IDX_FILES:
        path = small_mnist / name
        packed = small_mnist / f"{name}.gz"
        content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
        plain[name] = hashlib.md5(content).hexdigest()
    changed = dataclasses.replace(MNIST, plain=plain)
    monkeypatch.setattr(prepare, "MNIST", changed)
    return small_mnist


@pytest.fixture
def mirrors(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return two folders that stand for the mirrors, both with all files gzipped."""
    folders = [tmp_path / "mirror-1", tmp_path / "mirror-2"]
    for folder in folders:
        prepare_mnist(folder, official, quiet)
    packed = {
        name: hashlib.md5((folders[0] / f"{name}.gz").read_bytes()).hexdigest()
        for name in IDX_FILES
    }
    addresses = tuple(folder.as_uri() for folder in folders)
    changed = dataclasses.replace(prepare.MNIST, packed=packed, mirrors=addresses)
    monkeypatch.setattr(prepare, "MNIST", changed)
    return folders


def test_from_a_folder_gzipped_or_plain(official: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages: list[dict[str, Any]] = []
    assert prepare_mnist(out, official, stages.append) == out
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{name}.gz" for name in IDX_FILES)
    assert [event["stage"] for event in stages] == list(IDX_FILES)
    data = load_data(ImageSpec(data="mnist", folder=str(out), dev_size=20))
    assert len(data.train_y) == 40


def test_a_second_time_nothing_is_written(official: Path, tmp_path: Path) -> None:
    out = prepare_mnist(tmp_path / "out", official, quiet)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    stages: list[dict[str, Any]] = []
    prepare_mnist(out, None, stages.append)
    assert stages == [] and {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_a_damaged_file_in_the_output_is_replaced(official: Path, tmp_path: Path) -> None:
    out = prepare_mnist(tmp_path / "out", official, quiet)
    damaged = out / "t10k-labels-idx1-ubyte.gz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-5])
    prepare_mnist(out, official, quiet)
    assert damaged.read_bytes() == whole


@pytest.mark.parametrize("mishap", ["missing", "other", "cut"])
def test_nothing_is_written_unless_all_files_are_right(
    official: Path, tmp_path: Path, mishap: str
) -> None:
    path = official / "t10k-labels-idx1-ubyte.gz"
    if mishap == "missing":
        path.unlink()
    elif mishap == "other":
        path.write_bytes(gzip.compress(idx(np.zeros(20))))
    else:
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte"):
        prepare_mnist(tmp_path / "out", official, quiet)
    assert not (tmp_path / "out").exists()


def test_from_the_first_mirror_with_progress(mirrors: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(mirrors[1])
    events: list[dict[str, Any]] = []
    out = prepare_mnist(tmp_path / "out", None, events.append)
    for name in IDX_FILES:
        size = (out / f"{name}.gz").stat().st_size
        arrived = [e for e in events if e["event"] == "download" and e["file"] == f"{name}.gz"]
        assert arrived[-1]["done"] == arrived[-1]["of"] == size
    assert load_data(ImageSpec(data="mnist", folder=str(out), dev_size=20))


def test_the_second_mirror_steps_in(mirrors: list[Path], tmp_path: Path) -> None:
    (mirrors[0] / "train-labels-idx1-ubyte.gz").unlink()
    wrong = mirrors[0] / "t10k-images-idx3-ubyte.gz"
    wrong.write_bytes(gzip.compress(b"something else"))
    out = prepare_mnist(tmp_path / "out", None, quiet)
    assert (out / wrong.name).read_bytes() == (mirrors[1] / wrong.name).read_bytes()
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{name}.gz" for name in IDX_FILES)


def test_offline_the_line_names_the_way_out(tmp_path: Path, monkeypatch) -> None:
    # Port 9 of this machine: refused at once, no name to look up.
    unreachable = ("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare, "MNIST", dataclasses.replace(MNIST, mirrors=unreachable))
    with pytest.raises(UserError, match=r"cannot download http://127.*--from"):
        prepare_mnist(tmp_path / "out", None, quiet)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(official: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        prepare_mnist(tmp_path / "out", official, quiet)


@needs("MNIST")
def test_real_mnist_passes_its_checksums(tmp_path: Path) -> None:
    out = DATASETS.get("mnist")(tmp_path / "mnist", folder_of("MNIST"), quiet)
    assert len(list(out.iterdir())) == 4


def test_fashion_mnist_is_asked_for_by_its_packed_checksum(
    small_mnist: Path, tmp_path: Path
) -> None:
    """No checksum of its plain files is published: only the .gz files count as official."""
    assert not FASHION_MNIST.plain and FASHION_MNIST.packed.keys() == IDX_FILES.keys()
    with pytest.raises(UserError, match=r"not fashion-mnist's train-images.*\.gz file again"):
        DATASETS.get("fashion-mnist")(tmp_path / "out", small_mnist, quiet)
    source = tmp_path / "packed"
    packed = {}
    source.mkdir()
    for name in IDX_FILES:
        path = small_mnist / name
        content = gzip.compress(path.read_bytes()) if path.exists() else (
            small_mnist / f"{name}.gz"
        ).read_bytes()
        (source / f"{name}.gz").write_bytes(content)
        packed[name] = hashlib.md5(content).hexdigest()
    official = dataclasses.replace(FASHION_MNIST, packed=packed)
    out = prepare_idx(official, tmp_path / "out", source, quiet)
    spec = ImageSpec(data="fashion-mnist", folder=str(out), dev_size=20)
    assert len(load_data(spec).train_y) == 40
    stages: list[dict[str, Any]] = []
    prepare_idx(official, out, None, stages.append)
    assert stages == []


def test_a_missing_fashion_mnist_is_asked_for_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"l2t data prepare fashion-mnist --out .*gone"):
        load_data(ImageSpec(data="fashion-mnist", folder=str(tmp_path / "gone"), dev_size=20))
