"""Data sets in the four IDX files of MNIST: MNIST itself and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch

from l2t_core.errors import UserError
from l2t_core.runs.files import DAMAGED
from l2t_vision.data.raw import RawImages, checked_splits, prepare_hint

IDX_FILES = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


def load_idx_set(folder: Path, name: str) -> RawImages:
    """Return the data set ``name`` of 10 classes from IDX files in ``folder``, gzipped or plain.

    Raises:
        UserError: if the folder or a file is missing, cut short, or not of that kind.
    """
    if not folder.is_dir():
        raise UserError(f"no data folder {folder}; {prepare_hint(name, folder, again=False)}")
    try:
        arrays = [read_idx(find_idx(folder, file), dims) for file, dims in IDX_FILES.items()]
        train_x, train_y, test_x, test_y = (torch.from_numpy(array) for array in arrays)
        train = (train_x.unsqueeze(1), train_y.long())
        return checked_splits(folder, train, (test_x.unsqueeze(1), test_y.long()), 10)
    except UserError as error:
        raise UserError(f"{error}; {prepare_hint(name, folder)}") from error


def find_idx(folder: Path, name: str) -> Path:
    """Return the file ``name`` in ``folder``, gzipped or plain.

    Raises:
        UserError: if neither is there.
    """
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(f"{folder} holds neither {name}.gz nor {name}")


def idx_bytes(path: Path) -> bytes:
    """Return the uncompressed content of an IDX file.

    Raises:
        UserError: if it cannot be read or its compression is damaged.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read or is cut short ({error})") from error


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file of ``dimensions`` axes (LeCun's MNIST format).

    Raises:
        UserError: if it is no such file or has another length than its header says.
    """
    content = idx_bytes(path)
    start = 4 + 4 * dimensions
    # Two zeros, the type (8: unsigned byte), the number of axes; then each axis's length.
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise UserError(f"{path} is no IDX file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise UserError(
            f"{path} is {'cut short' if len(content) < expected else 'too long'}: "
            f"{len(content)} bytes, its header says {expected}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
