"""Copies of teacher files in an output folder: what all of its students are taught by.

While a teacher's training goes on its file is replaced after every episode. Students that read it
one after the other would have different teachers, so they read a copy that stays as it is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from l2t_cli.screen import console
from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_write, file_digest

_RECORD = "teachers.json"


@dataclass(frozen=True)
class TeacherCopy:
    """A teacher file as the user ``given`` it, and its copy at ``path`` with what was in it then.

    ``changed`` tells whether there is another teacher in ``given`` by now.
    """

    given: Path
    path: Path
    sha256: str
    changed: bool

    def readable(self) -> Path:
        """Return the copy, or before it is written the user's own file."""
        return self.path if self.path.exists() else self.given

    def note(self) -> str:
        """Return one line where the copy is not what the user's file holds, else nothing."""
        if not self.changed:
            return ""
        return (
            f"{self.given} has changed since this began, which goes on with its copy "
            f"{console.shown(self.path)}; for the new one choose another --out"
        )


class TeacherCopies:
    """The teachers of an output folder, ``teacher-HASH.safetensors``, by the paths given for them.

    ``teachers.json`` remembers which path has which copy, so that a command that goes on has the
    teacher that it began with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: dict[str, TeacherCopy] = {}
        self._unwritten: dict[Path, bytes] = {}

    def take(self, given: Path) -> TeacherCopy:
        """Return the copy of ``given`` that is here, or the one that :meth:`write` will make.

        Raises:
            UserError: if there is neither a file nor a copy, or the copy is lost.
        """
        key = str(given.resolve())
        if key not in self._taken:
            content = given.read_bytes() if given.is_file() else None
            now = _sha256(content) if content is not None else ""
            known = self._record().get(key, now)
            if not known:
                raise UserError(
                    f"no teacher file at {given}; `l2t train-teacher` writes "
                    "teacher_best.safetensors"
                )
            path = self.folder / f"teacher-{known[:12]}.safetensors"
            if not path.is_file() or file_digest(path, "sha256") != known:
                if content is None or now != known:
                    raise UserError(
                        f"{path} is missing or damaged, and {given}, which it is the copy of, has "
                        "changed since; choose another --out"
                    )
                self._unwritten[path] = content
            changed = content is not None and now != known
            self._taken[key] = TeacherCopy(given, path, known, changed)
        return self._taken[key]

    def others(self, copy: TeacherCopy) -> list[str]:
        """Return the paths whose teacher here, by its content, is another than that of ``copy``."""
        return [path for path, sha256 in self._record().items() if sha256 != copy.sha256]

    def write(self) -> None:
        """Write the copies that are not there yet, and which path has which.

        Raises:
            UserError: if the folder cannot be written.
        """
        for path, content in self._unwritten.items():
            atomic_write(path, content)
        self._unwritten.clear()
        record = self._record()
        wanted = record | {key: copy.sha256 for key, copy in self._taken.items()}
        if wanted != record:
            atomic_write(self.folder / _RECORD, json.dumps(wanted, indent=2) + "\n")

    def _record(self) -> dict[str, str]:
        path = self.folder / _RECORD
        if not path.is_file():
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in record.items()}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); choose another --out") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
