"""Writing CIFAR files in their official forms: binary records and pickles of Python 2."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import numpy as np


def binary(images: np.ndarray, *labels: list[int]) -> bytes:
    """Return records of one byte for each list of labels, then the pixels [3, 32, 32]."""
    columns = [np.array(each, np.uint8)[:, None] for each in labels]
    return np.concatenate([*columns, images.reshape(len(images), -1)], 1).tobytes()


def python_pickle(images: np.ndarray, **labels: list[int]) -> bytes:
    """Return a pickle of protocol 2 as Python 2's cPickle wrote the official ones."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = number(len(images)) + number(images[0].size) + b"\x86"
    kind = (
        b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
        + b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
        + b"(" + number(1) + shape + kind + b"\x89" + text(images.tobytes()) + b"tb"
    )
    pairs = text(b"batch_label") + text(b"testing batch 1 of 1") + text(b"data") + array
    for key, values in labels.items():
        pairs += text(key.encode()) + b"](" + b"".join(number(v) for v in values) + b"e"
    return b"\x80\x02}(" + pairs + b"u."


def archive(path: Path, files: dict[str, bytes]) -> Path:
    """Write a gzipped tar archive of ``files`` by name, with an entry for their folder."""
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(next(iter(files)).split("/")[0])
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path
