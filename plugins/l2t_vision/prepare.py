"""``l2t data prepare`` for image data: the official files, checked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2t_core.download import download
from l2t_core.errors import UserError
from l2t_core.files import atomic_write
from l2t_core.registry import Registry
from l2t_vision.data import find_idx, idx_bytes

OnEvent = Callable[[dict[str, Any]], None]
DATASETS: Registry[Callable[[Path, Path | None, OnEvent], Path]] = Registry("data set")

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
# Of the uncompressed files, which are the same whoever packed them.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# Of the files as the mirrors pack them. One checksum for both mirrors also makes sure that a
# download which one began and the other finished is whole.
PACKED_MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}


@DATASETS.register("mnist")
def prepare_mnist(out: Path, source_folder: Path | None, on_event: OnEvent) -> Path:
    """Put MNIST's four files into ``out``, gzipped, and return it.

    They come from ``source_folder`` (gzipped or plain) or from a mirror; those that ``out``
    already holds are kept. Events are ``{"event": "prepare", "stage": file}`` and, while a file
    arrives, ``{"event": "download", "file", "done", "of"}`` in bytes.

    Raises:
        UserError: if a file is missing, cannot be fetched, is not the official one, or ``out``
            cannot be written.
    """
    if source_folder is not None and not source_folder.is_dir():
        raise UserError(f"--from {source_folder}: no such folder")
    missing = [name for name in MD5 if not _is_official(out / f"{name}.gz", name)]
    if source_folder is None:
        for name in missing:
            on_event({"event": "prepare", "stage": name})
            _from_mirrors(name, out / f"{name}.gz", on_event)
        return out
    # All are checked before the first is written.
    packed = {name: _from_folder(name, source_folder) for name in missing}
    for name, content in packed.items():
        on_event({"event": "prepare", "stage": name})
        atomic_write(out / f"{name}.gz", content)
    return out


def _from_folder(name: str, folder: Path) -> bytes:
    """Return the official file ``name`` of ``folder``, gzipped."""
    path = find_idx(folder, name)
    content = idx_bytes(path)
    if not _matches(content, name):
        raise UserError(
            f"{path} is not MNIST's {name} (another checksum); get the official file again"
        )
    return path.read_bytes() if path.suffix == ".gz" else gzip.compress(content, mtime=0)


def _from_mirrors(name: str, target: Path, on_event: OnEvent) -> None:
    """Download the official file ``name`` to ``target`` from the first mirror that gives it."""

    def on_progress(done: int, total: int | None) -> None:
        on_event({"event": "download", "file": target.name, "done": done, "of": total})

    for mirror in MIRRORS:
        try:
            download(
                f"{mirror}/{target.name}", target, md5=PACKED_MD5[name], on_progress=on_progress
            )
            return
        except UserError:
            if mirror == MIRRORS[-1]:
                # A folder made for nothing would look like data; a part that arrived stays.
                with contextlib.suppress(OSError):
                    target.parent.rmdir()
                raise


def _is_official(path: Path, name: str) -> bool:
    """Tell whether ``path`` holds the official file; a damaged one counts as not there."""
    try:
        return path.is_file() and _matches(idx_bytes(path), name)
    except UserError:
        return False


def _matches(content: bytes, name: str) -> bool:
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == MD5[name]
