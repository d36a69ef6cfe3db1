"""Taking back an output folder that a failed command has just made."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FreshFolder:
    """An output folder as it was before a command used it; ``missing`` lists what to remove."""

    path: Path
    fresh: bool
    missing: list[Path]

    @classmethod
    def before(cls, path: Path) -> FreshFolder:
        """Remember whether ``path`` is there, and whether anything is in it."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        fresh = bool(missing) or (path.is_dir() and next(path.iterdir(), None) is None)
        return cls(path, fresh, missing)

    def take_back(self) -> None:
        """Remove what the command wrote, unless the folder held something before.

        What another process has removed meanwhile is gone, as it should be. A signal comes after:
        half a folder would be none of ours to go on with.
        """
        if not self.fresh or not self.path.is_dir():
            return
        with _undisturbed():
            with suppress(FileNotFoundError):
                self._empty()
            for folder in self.missing:
                with suppress(FileNotFoundError, NotADirectoryError):
                    if next(folder.iterdir(), None) is None:
                        folder.rmdir()

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block ends.

    By handlers, not by a mask: that is one thread's, and another of torch's would take the signal.
    """
    came: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other is disturbed
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        for late in came:
            signal.raise_signal(late)
