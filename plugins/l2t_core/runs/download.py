"""Downloading official files: checked, resumed, and whole or not there at all."""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from l2t_core.errors import UserError
from l2t_core.runs.files import file_digest, open_locked

OnProgress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known
OnEvent = Callable[[dict[str, Any]], None]

_CHUNK = 1 << 16
_TIMEOUT_SECONDS = 30
# TLS can break in the middle of a file, which urllib does not wrap.
_NETWORK_ERRORS = (
    urllib.error.URLError,
    TimeoutError,
    ConnectionError,
    http.client.HTTPException,
    ssl.SSLError,
)


def download(
    url: str,
    to: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """Fetch ``url`` into the file ``to`` and return it.

    The part that has arrived stays in ``to.part`` and the next call goes on from there; ``to``
    appears only when it is whole and its checksum is right. A file that is there and right is
    not fetched again.

    Raises:
        UserError: if the address cannot be reached, another command is at it, the file cannot be
            written or its checksum is wrong (the wrong file is then removed).
    """
    part = to.with_name(to.name + ".part")
    try:
        if to.is_file() and _wrong_digest(to, sha256, md5) is None:
            return to
        to.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part) as handle:
            _fetch(url, handle, on_progress)
            wrong = _wrong_digest(part, sha256, md5)
            if not wrong:
                part.replace(to)
                return to
            part.unlink()
    except BlockingIOError:
        raise UserError(f"another command is downloading {to}; wait for it") from None
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{url} answered {error.code} {error.reason}; get the file by hand and give its "
            "folder with --from"
        ) from error
    except _NETWORK_ERRORS as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"cannot download {url} ({reason}); check the network and run the same command to "
            "go on, or give a folder that holds the files with --from"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write {to}: {error.strerror or error}; free some space there or choose "
            "another folder"
        ) from error
    raise UserError(f"{url} has another checksum than expected ({wrong}); try again later")


def fetch(
    addresses: Sequence[str], to: Path, on_event: OnEvent, *, name: str = "", md5: str | None = None
) -> Path:
    """Fetch the file ``to`` from the first of ``addresses`` that gives it, and return it.

    ``on_event`` receives ``{"event": "download", "file", "done", "of"}`` in bytes, where the file
    is called ``name``, by default as it is. A folder made for a file of which nothing arrives is
    removed: it would look like data.

    Raises:
        UserError: as :func:`download`, of the last address.
    """
    called = name or to.name

    def on_progress(done: int, total: int | None) -> None:
        on_event({"event": "download", "file": called, "done": done, "of": total})

    for address in addresses[:-1]:
        with contextlib.suppress(UserError):
            return download(address, to, md5=md5, on_progress=on_progress)
    try:
        return download(addresses[-1], to, md5=md5, on_progress=on_progress)
    except UserError:
        with contextlib.suppress(OSError):
            to.parent.rmdir()  # if it is empty
        raise


def refuse_no_folder(source: Path | None) -> None:
    """Refuse a ``--from`` that is given and no folder.

    Raises:
        UserError: naming it.
    """
    if source is not None and not source.is_dir():
        raise UserError(f"--from {source} is no folder; give the one with the files")


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """Open ``part``, for this process alone to add to; where nothing arrives it is removed.

    Raises:
        BlockingIOError: if another process has it open.
    """
    descriptor = open_locked(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with os.fdopen(descriptor, "ab") as handle:
        try:
            yield handle
        finally:
            with contextlib.suppress(OSError):
                handle.flush()
                if not os.fstat(descriptor).st_size:
                    part.unlink()


def _fetch(url: str, part: BinaryIO, on_progress: OnProgress) -> None:
    have = part.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to fetch
            return
        raise
    with response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length", "")
        done = have if resumed else 0
        total = done + int(length) if length.isdecimal() else None
        if not resumed:
            part.truncate(0)
        for chunk in iter(lambda: response.read(_CHUNK), b""):
            part.write(chunk)
            done += len(chunk)
            on_progress(done, total)
        part.flush()
        os.fsync(part.fileno())
        if total is not None and done < total:
            raise ConnectionError(f"the connection ended after {done} of {total} bytes")


def _wrong_digest(path: Path, sha256: str | None, md5: str | None) -> str | None:
    """Return the digest found if it is not the one expected, else None."""
    for algorithm, expected in (("sha256", sha256), ("md5", md5)):
        if expected and (found := file_digest(path, algorithm)) != expected:
            return found
    return None
