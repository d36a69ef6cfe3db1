"""What the command line left when it ran inside the test process; a tiny recipe and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DIGITS = """\
field: image
description: the smallest run that is one
image:
  data: digits
  model: mlp
  hidden: 16
  dev_size: 300
  batch_size: 32
  steps: 24
  dev_interval: 8
  dev_batch: 64
  optimiser: {name: momentum, lr: 0.1, momentum: 0.9}
  schedule: {name: linear}
  measure: log_likelihood
loss: {form: diagonal, sigma: softplus}
teacher: {slots: 2}
training: {episodes: 2, lr: 0.003, seed: 3}
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the one line of a user's mistake, after checking that it is one."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("l2t: error: "), self.err
        return lines[0]


Run = Callable[..., Outcome]


def write_teacher(
    path: Path, classes: int, form: str = "diagonal", **fingerprint: str
) -> Path:
    """Write a static teacher of students with so many classes and 24 steps, dev seen every 8."""
    from l2t_core.specs import LossSpec, TeacherSpec
    from l2t_core.teachers.architectures import build_teacher
    from l2t_core.teachers.file import TeacherHeader, save_teacher

    spec, loss = TeacherSpec("static", features=["progress"]), LossSpec(form)
    fits = {**fingerprint, "num_classes": classes}
    teacher = build_teacher(spec, loss, classes, 1, seed=1)
    save_teacher(path, teacher, TeacherHeader(spec, loss, classes, 24, 8, fits))
    return path
