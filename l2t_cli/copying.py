"""Where a copy of something that comes with l2t goes."""

from __future__ import annotations

from pathlib import Path

from l2t_core.errors import UserError


def place_for(destination: Path, name: str, suffixes: tuple[str, ...], what: str) -> Path:
    """Return the file to write: ``destination``, or ``name`` in it where it is a folder.

    Raises:
        UserError: if it does not end as ``what`` ends.
    """
    target = destination / name if destination.is_dir() else destination
    if target.suffix not in suffixes:
        raise UserError(f"{target}: a {what} file ends in {suffixes[0]}; name it so")
    return target


def refuse_to_overwrite(target: Path, force: bool) -> None:
    """Refuse to write over a file, unless it is asked for.

    Raises:
        UserError: if it is there.
    """
    if target.exists() and not force:
        raise UserError(f"{target} exists; give --force to overwrite it, or another name")
