"""Text files by name out of an archive, a folder that holds it, or what it unpacks to."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from l2t_core.errors import UserError
from l2t_core.runs.files import DAMAGED


def read_texts(source: Path, names: Sequence[str], inner: str) -> dict[str, str]:
    """Return the text of each of the files ``names``, by name.

    ``source`` is a tar archive of any compression, or a folder; the files may stand in a folder
    within. ``inner`` is the end of the path of the archive itself, which a larger archive or a
    folder may hold.

    Raises:
        UserError: if a file is missing, the archive is damaged, or a text is not UTF-8.
    """
    found = _from_folder(source, names, inner) if source.is_dir() else _open(source, names, inner)
    missing = [name for name in names if name not in found]
    if missing:
        more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{source} holds no {missing[0]}{more}; give the official archive "
            f"{PurePosixPath(inner).name} or the folder that it unpacks to"
        )
    texts: dict[str, str] = {}
    for name in names:
        try:
            texts[name] = found[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source}: {name} is no UTF-8 text ({error.reason} at byte {error.start}); get "
                "the official archive again"
            ) from None
    return texts


def _from_folder(folder: Path, names: Sequence[str], inner: str) -> dict[str, bytes]:
    """Return the files in ``folder``, in a folder within, or in the archive that it holds."""
    archive = PurePosixPath(inner)
    places = [folder, folder / archive.name.split(".")[0], folder.joinpath(*archive.parts[:-1])]
    for place in places:
        if any((place / name).is_file() for name in names):
            return {
                name: _bytes(place / name) for name in names if (place / name).is_file()
            }
    for place in places:
        if (place / archive.name).is_file():
            return _open(place / archive.name, names, inner)
    return {}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _open(path: Path, names: Sequence[str], inner: str) -> dict[str, bytes]:
    try:
        with path.open("rb") as handle:
            return _members(handle, names, inner)
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is damaged or no tar archive ({reason}); get the official archive again"
        ) from None


def _members(handle: BinaryIO, names: Sequence[str], inner: str) -> dict[str, bytes]:
    """Return the members called ``names`` in any folder of the archive ``handle``."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=handle, mode="r:*") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            if (name := PurePosixPath(member.name).name) in names:
                found[name] = content.read()
            elif f"/{member.name}".endswith(f"/{inner}"):
                found |= _members(content, names, inner)  # type: ignore[arg-type]
        # To the very end, where the compression's own checksum stands.
        while archive.fileobj is not None and archive.fileobj.read(1 << 20):
            pass
    return found
