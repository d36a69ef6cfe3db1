"""One setting of the C library that long loops over big tensors want."""

from __future__ import annotations

import ctypes
import functools
import sys

# glibc's names for these are M_TRIM_THRESHOLD and M_MMAP_THRESHOLD; 32 MiB is the most it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 32 * 2**20
_NEVER = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Let the process keep memory that it frees, for the next step; tell whether it will.

    glibc gives blocks of more than 128 KiB back to the system and gets them anew at every step,
    page by page: a tenth to a quarter of a small convolutional net's training time.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MOST)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
