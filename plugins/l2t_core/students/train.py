"""Training one student: under a frozen teacher, or by a fixed loss for comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.losses.steps import FixedLoss, StepLoss
from l2t_core.runs.files import sweep
from l2t_core.runs.folder import load_tensors_and_record, save_tensors_and_record
from l2t_core.students.life import Life, training_steps
from l2t_core.students.protocol import Student


def train_student(
    student: Student,
    seed: int,
    loss: StepLoss | None = None,
    *,
    snapshot: Path | None = None,
    snapshot_every: int = 500,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> None:
    """Train ``student`` from ``seed`` for all its steps; its module ends trained.

    Steps, batches and random numbers are the same whatever the ``loss``; None is cross-entropy.
    With a ``snapshot`` path the run saves itself every ``snapshot_every`` steps and continues from
    there to the same result, on as many threads: a sum that others share out has other last bits.
    The last one stays, for the caller to remove once what it makes of the student is written: a
    disk may be full.

    Raises:
        UserError: if the snapshot is damaged, another student's, or cannot be written.
        FloatingPointError: if the student diverges.
    """
    loss = loss or FixedLoss()
    life = Life(student)
    state = life.begin(seed)
    first = 0
    if snapshot and snapshot.parent.is_dir():
        sweep(snapshot.parent, [snapshot])  # one that was killed as it was written
    stored = load_tensors_and_record(snapshot) if snapshot else None
    if stored:
        tensors, record = stored
        try:
            if tensors["state"].shape != state.shape:
                raise ValueError
            # Into memory aligned like a new student's: read from a file it may be otherwise, and
            # products then round in another way.
            state.copy_(tensors["state"])
            count = len(life.buffers.tensors())
            life.buffers.load([tensors[f"buffer.{i}"] for i in range(count)])
            first = int(record["step"])
            loss.load_state_dict(record["applied"])
            # Older ones do not say.
            torch.set_num_threads(int(record.get("threads", torch.get_num_threads())))
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{snapshot} does not belong to this student; delete it to train it anew"
            ) from error
    life.show(state[0])
    spare = life.flat.empty(2, len(state))  # a step reads one state and writes the other
    steps = range(first, student.total_steps)
    for step, after, statistics in training_steps(
        life, loss, state, steps, lambda step: (spare[step % 2], None)
    ):
        on_event(
            {"event": "student_step", "step": step, "of": student.total_steps,
             "train_nll": statistics.nll, "train_accuracy": statistics.accuracy}
        )
        if snapshot and (step + 1) % snapshot_every == 0 and step + 1 < student.total_steps:
            _save_snapshot(snapshot, after, life.buffers.tensors(), step + 1, loss)


def _save_snapshot(
    path: Path, state: Tensor, buffers: list[Tensor], step: int, loss: StepLoss
) -> None:
    tensors = {"state": state}
    # Copies: a file has no place for two that share memory.
    tensors |= {f"buffer.{i}": b.clone() for i, b in enumerate(buffers)}
    record = {
        "step": step, "applied": loss.state_dict(), "threads": torch.get_num_threads(),
    }
    save_tensors_and_record(path, tensors, record)
