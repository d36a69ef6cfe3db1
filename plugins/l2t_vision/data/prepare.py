"""``l2t data prepare`` for image data: the official files, checked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from l2t_core.errors import UserError
from l2t_core.registry import Registry
from l2t_core.runs.download import OnEvent, fetch, refuse_no_folder
from l2t_core.runs.files import atomic_write, file_digest
from l2t_vision.data.cifar import CIFAR10, CIFAR100, Cifar, find_form, load_cifar, read_files
from l2t_vision.data.idx import IDX_FILES, find_idx, idx_bytes

DATASETS: Registry[Callable[[Path, Path | None, OnEvent], Path]] = Registry("data set")


@dataclass(frozen=True)
class IdxSource:
    """Where the four IDX files of a data set come from, and the official MD5s.

    ``packed`` are those of the files as the mirrors pack them; one checksum for all mirrors also
    makes sure that a download which one began and another finished is whole. ``plain`` are those
    of the uncompressed files, which are the same whoever packed them; empty where none are
    published.
    """

    name: str
    mirrors: tuple[str, ...]
    packed: dict[str, str]
    plain: dict[str, str]


MNIST = IdxSource(
    "mnist",
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    ),
    packed={
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    plain={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
)
FASHION_MNIST = IdxSource(
    "fashion-mnist",
    (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    ),
    packed={
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    plain={},
)
CIFAR_SITE = "https://www.cs.toronto.edu/~kriz"


def prepare_idx(
    official: IdxSource, out: Path, source_folder: Path | None, on_event: OnEvent
) -> Path:
    """Put a data set's four IDX files into ``out``, gzipped, and return it.

    They come from ``source_folder`` (gzipped, or plain where checksums of plain files are
    published) or from a mirror; those that ``out`` already holds are kept. Events are
    ``{"event": "prepare", "stage": file}`` and, while a file arrives, ``{"event": "download",
    "file", "done", "of"}`` in bytes.

    Raises:
        UserError: if a file is missing, cannot be fetched, is not the official one, or ``out``
            cannot be written.
    """
    refuse_no_folder(source_folder)
    missing = [n for n in IDX_FILES if not _is_official(out / f"{n}.gz", n, official)]
    if source_folder is None:
        for name in missing:
            on_event({"event": "prepare", "stage": name})
            target = out / f"{name}.gz"
            addresses = [f"{mirror}/{target.name}" for mirror in official.mirrors]
            fetch(addresses, target, on_event, md5=official.packed[name])
        return out
    # All are checked before the first is written.
    packed = {name: _from_folder(name, source_folder, official) for name in missing}
    for name, content in packed.items():
        on_event({"event": "prepare", "stage": name})
        atomic_write(out / f"{name}.gz", content)
    return out


def prepare_cifar(kind: Cifar, out: Path, source_folder: Path | None, on_event: OnEvent) -> Path:
    """Put CIFAR-10 or CIFAR-100 into ``out``, in one of its official forms, and return it.

    Downloaded is the binary archive. ``source_folder`` may hold either archive or what one
    unpacks to. An archive and the Python form's files must have the official checksum; for the
    binary form's files none is published, they must have its layout. Events are as in
    :func:`prepare_idx`.

    Raises:
        UserError: if a file is missing, cannot be fetched, is not the official one, or ``out``
            cannot be written.
    """
    refuse_no_folder(source_folder)
    with contextlib.suppress(UserError):
        _check_cifar(out, kind)
        return out
    if source_folder is None:
        form = kind.forms[0]
        _refuse_before(out / form.archive, out, kind)
        on_event({"event": "prepare", "stage": form.archive})
        fetch([f"{CIFAR_SITE}/{form.archive}"], out / form.archive, on_event, md5=form.md5)
        return out
    try:
        form, place = find_form(source_folder, kind)
    except UserError as error:
        raise UserError(
            f"{error}; pictures in a folder for each class need no preparing: give their folder or "
            "tar archive as image.folder, with image.data=images"
        ) from error
    _check_cifar(source_folder, kind)
    _refuse_before(out / (form.archive if place.is_file() else form.folder), out, kind)
    if place.is_file():
        on_event({"event": "prepare", "stage": form.archive})
        atomic_write(out / form.archive, place.read_bytes())
        return out
    for name, content in read_files(place, form).items():
        on_event({"event": "prepare", "stage": name})
        atomic_write(out / form.folder / name, content)
    return out


for _source in (MNIST, FASHION_MNIST):
    DATASETS.register(_source.name)(partial(prepare_idx, _source))
for _kind in (CIFAR10, CIFAR100):
    DATASETS.register(_kind.name)(partial(prepare_cifar, _kind))


def _check_cifar(folder: Path, kind: Cifar) -> None:
    """Refuse a folder that does not hold ``kind`` as it was published."""
    form, place = find_form(folder, kind)
    if place.is_file():
        expected = {place: form.md5}
    else:
        expected = {place / name: md5 for name, md5 in form.files.items() if md5}
    for path, md5 in expected.items():
        if file_digest(path, "md5") != md5:
            raise UserError(
                f"{path} is not {kind.name}'s {path.name} (another checksum); get the official "
                "file again"
            )
    if not expected:
        raw = load_cifar(folder, kind)
        found = (len(raw.train_y), len(raw.test_y))
        if found != kind.sizes:
            raise UserError(
                f"{place} holds {found[0]:,} + {found[1]:,} images, {kind.name} has "
                f"{kind.sizes[0]:,} + {kind.sizes[1]:,}; get the official files again"
            )


def _refuse_before(coming: Path, out: Path, kind: Cifar) -> None:
    """Refuse to put ``coming`` beside other files in ``out``, damaged, that would be read first."""
    try:
        _, place = find_form(out, kind)
    except UserError:
        return
    if place != coming:
        raise UserError(
            f"{place} holds damaged files of {kind.name}, which would be read before "
            f"{coming.name}; remove them and give the command again"
        )


def _from_folder(name: str, folder: Path, official: IdxSource) -> bytes:
    """Return the official file ``name`` of ``folder``, gzipped."""
    path = find_idx(folder, name)
    if not _is_official(path, name, official):
        idx_bytes(path)  # damage is told from another file
        raise UserError(
            f"{path} is not {official.name}'s {name} (another checksum); get the official "
            f"{'file' if official.plain else '.gz file'} again"
        )
    content = path.read_bytes()
    return content if path.suffix == ".gz" else gzip.compress(content, mtime=0)


def _is_official(path: Path, name: str, official: IdxSource) -> bool:
    """Tell whether ``path`` holds the official file; a damaged one counts as not there."""
    if not path.is_file():
        return False
    if file_digest(path, "md5") == official.packed[name]:
        return True
    try:
        return bool(official.plain) and _md5(idx_bytes(path)) == official.plain[name]
    except UserError:
        return False


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
