"""``l2t data prepare`` for image data: the official files, checked."""

from __future__ import annotations

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
DATASETS: Registry[Callable[[Path, "Path | None", OnEvent], Path]] = Registry("data set")

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
# Of the uncompressed files: the gzip wrappers differ from mirror to mirror.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@DATASETS.register("mnist")
def prepare_mnist(out: Path, source_folder: Path | None, on_event: OnEvent) -> Path:
    """Put MNIST's four files into ``out``, from ``source_folder`` or from a mirror.

    Raises:
        UserError: if a file is missing, cannot be fetched, is not the official one, or ``out``
            cannot be written.
    """
    if source_folder is not None and not source_folder.is_dir():
        raise UserError(f"--from {source_folder}: no such folder")
    for name, expected in MD5.items():
        target = out / f"{name}.gz"
        if target.exists() and _md5(target) == expected:
            continue
        on_event({"event": "prepare", "stage": name})
        if source_folder is None:
            _from_mirrors(name, target, on_event)
        else:
            source = find_idx(source_folder, name)
            _check(source, expected)
            content = source.read_bytes()
            plain = content[:2] != b"\x1f\x8b"
            atomic_write(out / name if plain else target, content)
    return out


def _md5(path: Path) -> str:
    return hashlib.md5(idx_bytes(path), usedforsecurity=False).hexdigest()


def _check(path: Path, expected: str) -> None:
    if _md5(path) != expected:
        raise UserError(f"{path} is not the official MNIST file (another checksum); get it again")


def _from_mirrors(name: str, target: Path, on_event: OnEvent) -> None:
    def on_progress(done: int, total: int | None) -> None:
        on_event({"event": "download", "file": target.name, "done": done, "of": total})

    for mirror in MIRRORS:
        arrived = target.with_name(target.name + ".download")
        try:
            download(f"{mirror}/{target.name}", arrived, on_progress=on_progress)
            _check(arrived, MD5[name])
            arrived.replace(target)
            return
        except UserError:
            arrived.unlink(missing_ok=True)
            if mirror == MIRRORS[-1]:
                raise
