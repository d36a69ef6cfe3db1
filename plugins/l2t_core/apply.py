"""Training one student: under a frozen teacher, or by cross-entropy for comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2t_core.applied import AppliedTeacher
from l2t_core.run_folder import load_tensors_and_record, save_tensors_and_record
from l2t_core.student import Student
from l2t_core.unroll import Life, Point, taught_step


def train_student(
    student: Student,
    seed: int,
    applied: AppliedTeacher | None,
    *,
    snapshot: Path | None = None,
    snapshot_every: int = 500,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> None:
    """Train ``student`` from ``seed`` for all its steps; its module ends trained.

    ``applied`` None is cross-entropy with the same steps, batches and random numbers. With a
    ``snapshot`` path the run saves itself every ``snapshot_every`` steps, continues from there to
    the same result, and removes the snapshot at the end.

    Raises:
        UserError: if the snapshot is damaged or cannot be written.
        FloatingPointError: if the student diverges.
    """
    life = Life(student)
    state = life.begin(seed)
    first = 0
    stored = load_tensors_and_record(snapshot) if snapshot else None
    if stored:
        tensors, record = stored
        state = tensors["state"].to(state.device)
        buffers = [tensors[f"buffer.{i}"] for i in range(len(life.buffers))]
        life.restore(Point(state, buffers))
        first = int(record["step"])
        if applied is not None:
            applied.load_state_dict(record["applied"])
    for step in range(first, student.total_steps):
        state, statistics = taught_step(life, applied, state, step)
        on_event(
            {"event": "student_step", "step": step, "of": student.total_steps,
             "train_nll": statistics.nll, "train_accuracy": statistics.accuracy}
        )
        if not bool(state[0].isfinite().all()):
            raise FloatingPointError(f"the student diverged at step {step}")
        if snapshot and (step + 1) % snapshot_every == 0 and step + 1 < student.total_steps:
            _save_snapshot(snapshot, life.point(state), step + 1, applied)
    if snapshot:
        snapshot.unlink(missing_ok=True)


def _save_snapshot(
    path: Path, point: Point, step: int, applied: AppliedTeacher | None
) -> None:
    tensors = {"state": point.state}
    tensors |= {f"buffer.{i}": b for i, b in enumerate(point.buffers)}
    record = {"step": step, "applied": applied.state_dict() if applied else None}
    save_tensors_and_record(path, tensors, record)
