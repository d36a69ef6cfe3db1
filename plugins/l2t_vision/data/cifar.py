"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their official forms: binary and Python's pickles.

Each form is read from its archive, from the folder that the archive unpacks to, or from the files
themselves. All give the same images in the same order.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from l2t_core.errors import UserError
from l2t_core.runs.files import DAMAGED
from l2t_vision.data.pickles import read_pickle
from l2t_vision.data.raw import ImagesAndLabels, RawImages, checked_splits, prepare_hint

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Form:
    """One form of a CIFAR set: its archive with the official MD5, and the files inside.

    ``folder`` is the one in the archive; ``train`` and ``test`` name its files, with their MD5
    where one is published. ``labels`` is the label's key in a pickle, or None where records are
    binary: ``label_bytes`` bytes, the last of which counts, then the pixels.
    """

    archive: str
    md5: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    labels: str | None = None
    label_bytes: int = 1

    @property
    def files(self) -> dict[str, str]:
        """All files with their MD5, or "" where none is published."""
        return {**self.train, **self.test}


@dataclass(frozen=True)
class Cifar:
    """A CIFAR set: its number of classes and its forms, the one to download first.

    ``sizes`` are the numbers of training and test images.
    """

    name: str
    num_classes: int
    forms: tuple[Form, ...]
    sizes: tuple[int, int] = (50_000, 10_000)


CIFAR10 = Cifar(
    "cifar10",
    10,
    (
        Form(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
            {f"data_batch_{number}.bin": "" for number in range(1, 6)},
            {"test_batch.bin": ""},
        ),
        Form(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar-10-batches-py",
            {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            {"test_batch": "40351d587109b95175f43aff81a1287e"},
            labels="labels",
        ),
    ),
)
CIFAR100 = Cifar(
    "cifar100",
    100,
    (
        Form(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-binary",
            {"train.bin": ""},
            {"test.bin": ""},
            label_bytes=2,  # the coarse label, then the fine one
        ),
        Form(
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-python",
            {"train": "16019d7e3df5f24257cddd939b257f8d"},
            {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            labels="fine_labels",
        ),
    ),
)


def load_cifar(folder: Path, kind: Cifar) -> RawImages:
    """Return CIFAR-10 or CIFAR-100 from ``folder``, in whichever form it holds.

    Raises:
        UserError: if the folder or a file is missing, damaged, or not of that kind.
    """
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}; {prepare_hint(kind.name, folder, again=False)}")
    try:
        form, place = find_form(folder, kind)
        contents = read_files(place, form)
        train, test = (
            _together([_records(contents[name], form, f"{place}: {name}") for name in files])
            for files in (form.train, form.test)
        )
        return checked_splits(folder, train, test, kind.num_classes)
    except UserError as error:
        raise UserError(f"{error}; {prepare_hint(kind.name, folder)}") from error


def find_form(folder: Path, kind: Cifar) -> tuple[Form, Path]:
    """Return the form that ``folder`` holds and its place: an archive, or the files' folder.

    Raises:
        UserError: if there is none of them whole.
    """
    for form in kind.forms:
        for place in (folder / form.folder, folder):
            if all((place / name).is_file() for name in form.files):
                return form, place
        if (folder / form.archive).is_file():
            return form, folder / form.archive
    names = [name for form in kind.forms for name in (form.archive, f"{form.folder}/")]
    raise UserError(f"{folder} holds none of {', '.join(names)} with all its files")


def read_files(place: Path, form: Form) -> dict[str, bytes]:
    """Return the files of ``form`` by name, from an archive or a folder.

    Raises:
        UserError: if one is missing or cannot be read.
    """
    try:
        if place.is_dir():
            return {name: (place / name).read_bytes() for name in form.files}
        found: dict[str, bytes] = {}
        with tarfile.open(place) as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == form.folder and name in form.files and member.isfile():
                    handle = archive.extractfile(member)
                    assert handle is not None  # it is a file
                    found[name] = handle.read()
    except DAMAGED as error:
        raise UserError(f"{place} cannot be read or is cut short ({error})") from error
    missing = [name for name in form.files if name not in found]
    if missing:
        raise UserError(f"{place} holds no {form.folder}/{missing[0]}")
    return found


def _together(parts: list[ImagesAndLabels]) -> ImagesAndLabels:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _records(content: bytes, form: Form, source: str) -> ImagesAndLabels:
    """Return the images [N, 3, 32, 32] and labels [N] of one file."""
    if form.labels is None:
        length = form.label_bytes + _PIXELS
        if not content or len(content) % length:
            raise UserError(f"{source} is cut short: {len(content)} bytes, records have {length}")
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, length)
        labels = records[:, form.label_bytes - 1].long()
        return records[:, form.label_bytes :].reshape(-1, 3, 32, 32).contiguous(), labels
    found = read_pickle(content, source)
    images, names = found.get("data"), found.get(form.labels)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != _PIXELS:
        raise UserError(f"{source} holds no array 'data' of {_PIXELS} bytes for each image")
    if not isinstance(names, list) or not all(
        type(label) is int and abs(label) < 2**31 for label in names
    ):
        raise UserError(f"{source} holds no list '{form.labels}' of whole numbers")
    if len(names) != len(images):
        raise UserError(f"{source} holds {len(images)} images and {len(names)} labels")
    return torch.from_numpy(images.copy()).view(-1, 3, 32, 32), torch.tensor(names)
