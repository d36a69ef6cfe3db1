"""Reading pickles of arrays without executing anything.

A pickle is a program that may call any function it names. Here every name is looked up in a short
table of inert classes that only note what they are given, and anything else is refused.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

from l2t_core.errors import UserError


class _Inert:
    """Takes arguments and state and does nothing with them."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Inert):
    """An array of unsigned bytes in the making: numpy's own classes trust what they are told."""

    def array(self) -> np.ndarray:
        """Return the array.

        Raises:
            ValueError: if the state is not that of a C-ordered array of unsigned bytes.
        """
        _, shape, kind, fortran, data = self.state
        if not isinstance(kind, _Type) or kind.arguments[0] not in ("u1", b"u1") or fortran:
            raise ValueError("an array of something else than unsigned bytes")
        content = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(content, bytes) or len(content) != math.prod(shape):
            raise ValueError("an array whose bytes do not fill its shape")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Type(_Inert):
    """numpy.dtype."""


class _Kind(_Inert):
    """numpy.ndarray, which is named but never called."""


class _Bytes(_Inert):
    """How Python 3 writes bytes for Python 2: as text and its encoding."""

    def __new__(cls, text: str, encoding: str) -> Any:
        return str(text).encode("latin1")


_NAMES: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Kind,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        found = _NAMES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def read_pickle(content: bytes, source: str) -> dict[str, Any]:
    """Return a pickled dictionary of plain values and arrays of unsigned bytes.

    Pickles of Python 2 and 3 are read; keys come out as text.

    Raises:
        UserError: if it is damaged, no dictionary, or names anything but arrays.
    """
    try:
        found = _Unpickler(io.BytesIO(content), encoding="latin1").load()
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a dictionary")
        return {_text(key): _plain(value) for key, value in found.items()}
    # Damaged pickles fail in every way there is.
    except Exception as error:
        raise UserError(
            f"{source} is no pickle of plain arrays ({str(error) or type(error).__name__}); "
            "nothing in it was executed"
        ) from error


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.array()
    if isinstance(value, _Inert):
        raise ValueError("it holds an unfinished array")
    return value
