"""Files: written so that a kill leaves old content or new, read where they may be damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import lzma
import os
import tarfile
import tempfile
import time
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from l2t_core.errors import UserError

# All that tarfile and the decompressors raise on what is cut short or something else. (A hard
# link's missing target is a KeyError, text that is no UTF-8 a ValueError.)
DAMAGED = (tarfile.TarError, EOFError, KeyError, zlib.error, lzma.LZMAError, OSError, ValueError)
# In a student's folder: itself on its way, until its result is written.
SNAPSHOT = "snapshot.safetensors"
_FULL = "free some space there or "
_MENDS = {
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: "allow larger files (`ulimit -f`) or ",
}
_LONG_AGO = 3600.0  # seconds; another process may be writing what is younger
_TRIES = 10  # at making a folder that others remove meanwhile


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` through a temporary file beside it and a rename.

    Text is in UTF-8, with what is left of names that are not in escapes.

    Raises:
        UserError: if the folder cannot be created or written, or the disk is full.
    """
    with atomic_file(path) as handle:
        handle.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Give a temporary file beside ``path`` that takes its place when the block ends well.

    Raises:
        UserError: if the folder cannot be created or written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        with_usual_permissions(temporary).replace(path)
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "")
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; {mend}choose another output folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def with_usual_permissions(path: Path) -> Path:
    """Give a file or folder of ``tempfile``, which makes them private, those of any other."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    return path


def is_unfinished(path: Path, of: Path) -> bool:
    """Tell whether ``path`` is what a write of the file ``of`` makes before it is whole."""
    return path.name.startswith(f".{of.name}.")


def sweep(folder: Path, files: Collection[Path]) -> None:
    """Remove from ``folder`` what killed writes of ``files`` left unfinished, long untouched."""
    for left in folder.iterdir():
        with contextlib.suppress(OSError):
            unfinished = any(is_unfinished(left, file) for file in files)
            if unfinished and time.time() - left.stat().st_mtime > _LONG_AGO:
                left.unlink()


def lock(handle: int) -> None:
    """Lock the open file ``handle`` until the last copy of it is closed.

    The lock ends with the processes that have it, however they end; a file system without locks
    gives none.

    Raises:
        BlockingIOError: if another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def open_locked(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open ``path`` and return the descriptor that keeps it locked, as :func:`lock` does.

    Raises:
        BlockingIOError: if another process has it locked.
        OSError: if it cannot be opened.
    """
    while True:
        handle = os.open(path, flags, 0o666)
        try:
            lock(handle)
            # The one who had it may have moved or removed it before we locked what we opened.
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def claim(folder: Path) -> int:
    """Make ``folder`` and return the descriptor that keeps it locked until it is closed.

    Two commands at work in one folder would write over each other.

    Raises:
        UserError: if it cannot be made, or another command is at work there.
    """
    try:
        for left in reversed(range(_TRIES)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return open_locked(folder)
            except FileNotFoundError:  # another command has just taken it back
                if not left:
                    raise
    except BlockingIOError:
        raise UserError(
            f"another command is at work in {folder}; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; choose another --out"
        ) from error
    raise AssertionError("the last try returns or raises")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make ``folder`` and keep it locked, as :func:`claim` does, until the block ends.

    Raises:
        UserError: if it cannot be made, or another command is at work there.
    """
    handle = claim(folder)
    try:
        yield
    finally:
        os.close(handle)


def file_digest(path: Path, algorithm: str) -> str:
    """Return the hexadecimal digest of a file's content."""
    digest = hashlib.new(algorithm)
    with path.open("rb") as handle:
        for chunk in iter(lambda: handle.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def from_home(path: str | Path) -> Path:
    """Return ``path`` with a ``~`` in front as the home folder, which no shell expands in a recipe.

    Where there is no such user it stays as it is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
