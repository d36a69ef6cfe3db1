"""Telling a process that is gone from one that is slow, where no connection is closed.

A machine that loses its power or its network closes nothing: collectives would wait for it as
long as they wait for a student that takes days. So every process says in the run's store, from a
thread of its own, that it is still there, however long its student takes.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Protocol

EVERY = 20.0  # seconds between two beats
# So many beats, a quarter of an hour, may be missed. Counted by a process's own beats, not by the
# clock: one that was stopped with all others (Ctrl-Z) has not waited for them.
MOST_MISSED = 45
_LAST_BEAT = 5.0  # seconds to wait for a thread that is to end


class Store(Protocol):
    """What is used of a torch.distributed store."""

    def set(self, key: str, value: str) -> None:
        """Put ``value`` under ``key``."""

    def get(self, key: str) -> bytes:
        """Return the value under ``key``, once there is one; may never return."""


class Heartbeat:
    """Beats for process ``rank`` of ``world`` and listens for the others, in two threads.

    ``store`` must be this object's alone. ``on_silence`` is called once, in one of the threads,
    with the numbers of those that have not been heard for ``MOST_MISSED`` beats: all others where
    the store itself does not answer.
    """

    def __init__(
        self, store: Store, rank: int, world: int, on_silence: Callable[[list[int]], None]
    ) -> None:
        self._store, self._rank, self._on_silence = store, rank, on_silence
        self._missed = {other: 0 for other in range(world) if other != rank}
        self._seen: dict[int, bytes] = {}
        self._beats = 0
        self._over = threading.Event()
        # Apart, as the store may never answer: its host may be what is gone.
        self._threads = [
            threading.Thread(target=self._repeat, args=(turn,), daemon=True)
            for turn in (self.beat, self.listen)
        ]

    def start(self) -> None:
        """Start the threads."""
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads: none may be in the store when the interpreter ends."""
        atexit.unregister(self.stop)
        self._over.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_LAST_BEAT)

    def beat(self) -> None:
        """Say that this process is there, and look which others have said so since the last time.

        Raises:
            RuntimeError: if the store is gone.
        """
        self._beats += 1
        self._store.set(str(self._rank), str(self._beats))
        for other in self._missed:
            value = self._store.get(str(other))
            if value != self._seen.get(other):
                self._seen[other], self._missed[other] = value, 0

    def listen(self) -> None:
        """Count one more beat of silence of all others, and say whose there are too many."""
        for other in self._missed:
            self._missed[other] += 1
        if silent := [other for other, missed in self._missed.items() if missed > MOST_MISSED]:
            self._over.set()
            self._on_silence(silent)

    def _repeat(self, turn: Callable[[], None]) -> None:
        while not self._over.wait(EVERY):
            try:
                turn()
            except RuntimeError:  # no store any more; if the run is not over, it gets silent
                return
