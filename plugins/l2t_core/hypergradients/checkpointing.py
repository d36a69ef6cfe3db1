"""Which states of a student's life are kept for the way back, and where.

Walking T steps back needs the state before each of them. With c states kept at a time the rest
are recomputed in the order that binomial checkpointing prescribes (Griewank and Walther 2000,
"Algorithm 799: revolve"), which makes the fewest recomputed steps for any T and c: c >= T keeps
everything, c = sqrt(2 T) recomputes every step about once. States may also be spilled, to host
memory from a GPU or to a file, and then all of them are kept.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from l2t_core.errors import UserError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

SPILLS = ("auto", "none", "host", "file")
# Beyond so many recomputed steps a step, spilling to a file is what "auto" prefers.
_MOST_RECOMPUTATION = 2.0
# What the way back holds beside the trajectory, in states: measured, see docs/engine.md.
WORKING_STATES = 7


@dataclass(frozen=True)
class Plan:
    """How a trajectory of ``steps`` states of ``point_bytes`` each is held.

    ``slots`` states are held at a time: in place (where the student lives), but for
    ``spilled`` of them, which lie in host memory or in a file (``where``). ``recomputed`` counts
    the forward steps that are made again on the way back.
    """

    steps: int
    point_bytes: int
    slots: int
    where: str = "memory"
    spilled: int = 0
    recomputed: int = 0

    def describe(self) -> str:
        """Return the plan and its cost in one line."""
        beside = size_text(WORKING_STATES * self.point_bytes)
        return f"{self._held()}; about {WORKING_STATES} more ({beside}) to work with"

    def _held(self) -> str:
        held = (self.slots - self.spilled) * self.point_bytes
        size = f"{self.steps:,} states of {size_text(self.point_bytes)}"
        if self.spilled:
            return (
                f"{size}: {self.slots - self.spilled:,} in memory ({size_text(held)}), "
                f"{self.spilled:,} in {'a file' if self.where == 'file' else 'host memory'} "
                f"({size_text(self.spilled * self.point_bytes)}), nothing recomputed"
            )
        if not self.recomputed:
            return f"{size}: all kept ({size_text(held)}), nothing recomputed"
        return (
            f"{size}: {self.slots:,} kept at a time ({size_text(held)}), "
            f"{self.recomputed / self.steps:.2f} steps recomputed for each"
        )


def size_text(count: int) -> str:
    """Return ``count`` bytes as people write it, such as ``5.94 MiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count} B"


def parse_bytes(text: str) -> int:
    """Return the bytes that ``text`` such as ``512MiB`` means.

    Raises:
        UserError: if it is no size.
    """
    compact = str(text).replace(" ", "").upper()
    digits = compact.rstrip("KMGTIB")
    try:
        size = int(float(digits) * _UNITS[compact[len(digits):]])
    except (KeyError, ValueError, OverflowError):  # infinite: 1e999
        raise UserError(f"memory={text!r} is no size; write it like 512MiB or 2GiB") from None
    if size <= 0:
        raise UserError(f"memory={text!r} must be above zero; write it like 512MiB or 2GiB")
    return size


def make_plan(
    steps: int, point_bytes: int, budget: int, *, spill: str = "auto", on_gpu: bool = False,
    host_free: int = 0, file_free: int = 0,
) -> Plan:
    """Return how to hold ``steps`` states of ``point_bytes`` within ``budget`` bytes.

    In this order ``spill=auto`` takes what fits: everything kept; from a GPU, the rest in host
    memory (``host_free`` bytes); recomputation; the rest in a file (``file_free`` bytes) where
    recomputation would cost more than two steps for each. The result of the way back is the same
    to the bit whichever is taken.

    Raises:
        UserError: if nothing fits, naming the smallest budget that does.
    """
    if steps <= 0:
        return Plan(0, point_bytes, 0)
    slots = min(steps, budget // point_bytes)
    rest = steps - slots
    if not rest:
        return Plan(steps, point_bytes, steps)
    if spill == "host" and not on_gpu:
        raise UserError(
            "training.spill=host is for students on a GPU; on a CPU raise training.memory or use "
            "training.spill=file"
        )
    if slots < 1:
        unit, name = (2**20, "MiB") if point_bytes > 10 * 2**20 else (2**10, "KiB")
        raise UserError(
            f"training.memory: {size_text(budget)} cannot hold one of the trajectory's states; the "
            f"smallest budget that can is {math.ceil(point_bytes / unit)}{name} (and about "
            f"{WORKING_STATES} times as much is held beside it)"
        )
    room = {"host": host_free if on_gpu else 0, "file": file_free}
    for where in ("host", "file"):
        if spill == where and rest * point_bytes > room[where]:
            raise UserError(
                f"training.spill={where} needs {size_text(rest * point_bytes)} beyond "
                f"training.memory, {size_text(room[where])} are free; raise training.memory or use "
                "training.spill=none"
            )
    recomputed = recomputed_steps(steps, slots)
    too_much = recomputed > _MOST_RECOMPUTATION * steps
    # Half of what is free: other programs live here too.
    if spill == "host" or (spill == "auto" and rest * point_bytes < room["host"] / 2):
        return Plan(steps, point_bytes, steps, "host", rest)
    if spill == "file" or (spill == "auto" and too_much and rest * point_bytes < room["file"] / 2):
        return Plan(steps, point_bytes, steps, "file", rest)
    return Plan(steps, point_bytes, slots, recomputed=recomputed)


def _reach(slots: int, repetitions: int) -> int:
    """Return the steps that ``slots`` states can reverse if none is made more often than that."""
    if slots < 0 or repetitions < 0:
        return 0
    return math.comb(slots + repetitions, slots)


def _repetitions(steps: int, slots: int) -> int:
    if slots == 1:
        return max(0, steps - 1)
    repetitions = 0
    while _reach(slots, repetitions) < steps:
        repetitions += 1
    return repetitions


def split(steps: int, slots: int) -> int:
    """Return after how many of ``steps`` >= 2 the next state is kept, ``slots`` >= 2 in all.

    One of the slots holds the state before the first of the steps. Optimal: with r the smallest
    number of repetitions that suffices, the left part, which has all slots, must be reversible
    within r - 1 and the right part, which has one less, within r (Griewank and Walther 2000,
    section 2).
    """
    r = _repetitions(steps, slots)
    least = max(1, _reach(slots, r - 2), steps - _reach(slots - 1, r))
    most = min(steps - 1, _reach(slots, r - 1), steps - _reach(slots - 1, r - 1))
    return max(1, min(least, most))


def recomputed_steps(steps: int, slots: int) -> int:
    """Return the forward steps made again when ``steps`` are reversed with ``slots`` states.

    The forward run that fills the first states is not counted.
    """
    if steps <= 1:
        return 0
    r = _repetitions(steps, slots)
    return r * steps - _reach(slots + 1, r - 1) - first_kept(steps, slots)[-1]


def first_kept(steps: int, slots: int) -> list[int]:
    """Return which of ``steps`` states the forward run keeps, ascending; the first is 0."""
    kept, start, free = [0], 0, slots
    while steps - start > 1 and free > 1:
        if run := _single_steps(steps - start, free):
            kept.extend(range(start + 1, start + run + 1))
            start, free = start + run, free - run
            continue
        start += split(steps - start, free)
        kept.append(start)
        free -= 1
    return kept


def _single_steps(steps: int, slots: int) -> int:
    """Return how often in a row :func:`split` would say 1, where no step is made more than twice.

    Up to millions of times where most states fit, of which :func:`split` would take each anew.
    """
    if steps <= slots + 1:
        return min(steps, slots) - 1
    # After i such steps, steps - i are left for slots - i; 1 is enough as long as the rest of them
    # is within reach of two repetitions. Both sides fall with i, the reach faster.
    return bisect(
        range(slots - 1), False, key=lambda i: steps - i - 1 > _reach(slots - i - 1, 2)
    )


@dataclass(frozen=True)
class Recompute:
    """Make the steps from kept state ``start`` on and keep the one before step ``stop``."""

    start: int
    stop: int


@dataclass(frozen=True)
class Reverse:
    """Walk ``step`` back from kept state ``kept`` (``kept == step`` unless no slot was free)."""

    step: int
    kept: int


@dataclass(frozen=True)
class Release:
    """Give the slot of kept state ``start`` free."""

    start: int


def way_back(steps: int, slots: int) -> Iterator[Recompute | Reverse | Release]:
    """Yield what to do, in order, to walk ``steps`` back once :func:`first_kept` is kept."""
    # Each open segment is (start, stop) with its start kept.
    starts = first_kept(steps, slots)
    open_segments = list(zip(starts, [*starts[1:], steps], strict=True))
    while open_segments:
        start, stop = open_segments.pop()
        free = slots - len(open_segments)
        if stop - start == 1:
            yield Reverse(start, start)
            yield Release(start)
        elif free == 1:
            for step in reversed(range(start, stop)):
                yield Reverse(step, start)
            yield Release(start)
        else:
            middle = start + split(stop - start, free)
            yield Recompute(start, middle)
            open_segments += [(start, middle), (middle, stop)]
