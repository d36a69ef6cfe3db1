"""Downloading official files: checked, resumed, and whole or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from l2t_core.errors import UserError

OnProgress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known

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


def file_digest(path: Path, algorithm: str) -> str:
    """Return the hexadecimal digest of a file's content."""
    digest = hashlib.new(algorithm)
    with path.open("rb") as handle:
        for chunk in iter(lambda: handle.read(_CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


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
        UserError: if the address cannot be reached, the file cannot be written or its checksum
            is wrong (the wrong file is then removed).
    """
    if to.exists() and _wrong_digest(to, sha256, md5) is None:
        return to
    part = to.with_name(to.name + ".part")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, on_progress)
        wrong = _wrong_digest(part, sha256, md5)
        if not wrong:
            part.replace(to)
            return to
        part.unlink()
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


def _fetch(url: str, part: Path, on_progress: OnProgress) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to fetch
            return
        raise
    with response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        done = have if resumed else 0
        total = done + int(length) if length else None
        with part.open("ab" if resumed else "wb") as handle:
            for chunk in iter(lambda: response.read(_CHUNK), b""):
                handle.write(chunk)
                done += len(chunk)
                on_progress(done, total)
            handle.flush()
            os.fsync(handle.fileno())
        if total is not None and done < total:
            raise ConnectionError(f"the connection ended after {done} of {total} bytes")


def _wrong_digest(path: Path, sha256: str | None, md5: str | None) -> str | None:
    """Return the digest found if it is not the one expected, else None."""
    for algorithm, expected in (("sha256", sha256), ("md5", md5)):
        if expected and (found := file_digest(path, algorithm)) != expected:
            return found
    return None
