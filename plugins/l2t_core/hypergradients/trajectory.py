"""The kept states of one student's life: in memory, in host memory beside a GPU, or in a file."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.hypergradients.checkpointing import Plan, size_text
from l2t_core.students.flat import FlatParameters


class Slots:
    """Memory for states [R, P], each with the gradient [P] of the step that leaves it if asked.

    Reused from episode to episode: the first touch of fresh memory costs more than a step of a
    small student. The states that a plan spills are those of the earliest steps, which are
    needed last. Steps count from the first one that is walked back.

    Raises:
        UserError: if there is no such memory, or no room for the file.
    """

    def __init__(
        self, flat: FlatParameters, rows: int, with_gradient: bool, plan: Plan, folder: Path
    ) -> None:
        self.plan, self.state_rows = plan, rows
        rows_held = rows + int(with_gradient)
        self._block = _claim(flat, max(1, plan.slots - plan.spilled), rows_held)
        self._free = list(range(len(self._block)))
        self._at: dict[int, int] = {}
        self._fetched = -1
        # Two, because a step reads one state while it writes the next.
        self._scratch = flat.empty(2, rows_held if plan.spilled else rows)
        self._away = _make_store(self._block, plan, folder) if plan.spilled else None

    def passing(self, step: int) -> Tensor:
        """Return [R, P] to write a state before ``step`` into that is not kept.

        It lasts until that of the next step but one is written.
        """
        self._fetched = -1
        return self._scratch[step % 2, : self.state_rows]

    def claim(self, step: int) -> Tensor:
        """Return [rows, P] to write the state before ``step`` and its gradient into."""
        self._fetched = -1
        if step < self.plan.spilled:
            return self._scratch[step % 2]
        self._at[step] = self._free.pop()
        return self._block[self._at[step]]

    def seal(self, step: int) -> None:
        """Take note that what :meth:`claim` gave for ``step`` is written."""
        if self._away is not None and step < self.plan.spilled:
            self._away.put(step, self._scratch[step % 2])

    def being_written(self, step: int) -> Tensor:
        """Return what :meth:`claim` gave for ``step``, until it is sealed."""
        if step < self.plan.spilled:
            return self._scratch[step % 2]
        return self._block[self._at[step]]

    def fetch(self, step: int) -> Tensor:
        """Return [rows, P] of the state before ``step``; it may be changed until released."""
        if step in self._at:
            return self._block[self._at[step]]
        assert self._away is not None
        if self._fetched != step:
            self._away.get(step, self._scratch[step % 2])
            self._fetched = step
        return self._scratch[step % 2]

    def release(self, step: int) -> None:
        """Give the memory of ``step`` free."""
        if step in self._at:
            self._free.append(self._at.pop(step))

    def clear(self) -> None:
        """Forget all states: a life that was cut short leaves some."""
        for step in list(self._at):
            self.release(step)


def _claim(flat: FlatParameters, count: int, rows: int) -> Tensor:
    """Return memory for ``count`` states, [count, rows, P]."""
    try:
        return flat.empty(count, rows)
    except (OSError, RuntimeError) as error:  # the system's refusal, or torch's
        size = size_text(count * rows * flat.size * flat.vector.element_size())
        raise UserError(
            f"training.memory: {size} for the trajectory's states are not to be had here "
            f"({str(error).splitlines()[0][:120]}); lower training.memory"
        ) from error


class _HostStore:
    """States of a GPU student in pinned host memory."""

    def __init__(self, like: Tensor, count: int) -> None:
        pinned, shape = torch.cuda.is_available(), (count, *like.shape[1:])
        try:
            self._block = torch.empty(shape, dtype=like.dtype, pin_memory=pinned, device="cpu")
        except RuntimeError as error:  # torch rounds up to a power of two, which may be too much
            size = size_text(math.prod(shape) * like.element_size())
            raise UserError(
                f"training.spill: {size} of pinned host memory are not to be had here "
                f"({str(error).splitlines()[0][:120]}); use training.spill=file or none"
            ) from error

    def put(self, index: int, value: Tensor) -> None:
        self._block[index].copy_(value, non_blocking=True)

    def get(self, index: int, out: Tensor) -> None:
        out.copy_(self._block[index], non_blocking=True)


class _FileStore:
    """States in an unlinked file: gone with the process, however that ends."""

    def __init__(self, like: Tensor, count: int, folder: Path) -> None:
        self._folder = folder
        self._row_size = like.shape[-1] * like.element_size()
        self._size = like.shape[1] * self._row_size
        # A row at a time: there is no need for one more state.
        self._staging = torch.empty(like.shape[-1], dtype=like.dtype)
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="trajectory-")  # noqa: SIM115
            # Claim the room now: a full disk should not end the run in an hour.
            claim = getattr(os, "posix_fallocate", None)  # which macOS lacks
            if claim is not None:
                claim(self._file.fileno(), 0, count * self._size)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> UserError:
        return UserError(
            f"cannot spill the trajectory to a file in {self._folder} ({error.strerror}); free "
            "some room, raise training.memory or use training.spill=none"
        )

    def _bytes(self) -> memoryview:
        # As bytes: numpy has no bfloat16.
        return memoryview(self._staging.view(torch.uint8).numpy())  # type: ignore[arg-type]

    def put(self, index: int, value: Tensor) -> None:
        for place, row in enumerate(value):
            self._staging.copy_(row)
            try:
                self._all(os.pwrite, self._bytes(), index, place)
            except OSError as error:
                raise self._refusal(error) from error

    def get(self, index: int, out: Tensor) -> None:
        def read(fd: int, view: memoryview, offset: int) -> int:
            return os.preadv(fd, [view], offset)

        for place, row in enumerate(out):
            self._all(read, self._bytes(), index, place)
            row.copy_(self._staging)

    def _all(self, move: object, view: memoryview, index: int, place: int) -> None:
        done, start = 0, index * self._size + place * self._row_size
        while done < self._row_size:  # a call may move less than asked, 2 GiB at most
            moved = move(self._file.fileno(), view[done:], start + done)  # type: ignore[operator]
            if moved == 0:
                raise OSError(0, "the file is cut short")
            done += moved


def _make_store(block: Tensor, plan: Plan, folder: Path) -> _HostStore | _FileStore:
    if plan.where == "host":
        return _HostStore(block, plan.spilled)
    return _FileStore(block, plan.spilled, folder)
