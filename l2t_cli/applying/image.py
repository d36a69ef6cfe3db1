"""Applying a teacher to an image recipe: a fresh student, plain training, test error."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2t_cli.applying.result import Score
from l2t_cli.applying.students import student_title
from l2t_cli.recipe_reading.loading import Recipe
from l2t_cli.screen.console import LogFormat
from l2t_cli.screen.progress import bar
from l2t_core.runs.files import SNAPSHOT, atomic_write

if TYPE_CHECKING:
    from l2t_core.teachers.applied import AppliedTeacher


def follow(student: Any, teacher: Path) -> AppliedTeacher:
    """Return the teacher in the file ``teacher`` for an image student.

    It sees dev as often, for its part of the run, as where it was trained.
    """
    from l2t_core.teachers.applied import AppliedTeacher

    steps = student.total_steps
    applied = AppliedTeacher.from_file(teacher, steps, student.fingerprint())
    assert applied.header is not None  # from_file always has one
    student.spec = replace(student.spec, dev_interval=applied.header.dev_interval_for(steps))
    return applied


class ImageApplication:
    """An image recipe's student, taught or trained by cross-entropy."""

    measure = "error %"
    lower_is_better = True
    worst = 100.0
    rate = "image.optimiser.lr"
    default_seed = 1

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.name = recipe.short_name
        self.may_change = tuple(f"image.{key}" for key in recipe.field.places)
        self.defaults = {"image": recipe.defaults()["image"]}
        self._student: Any = None

    def config(self) -> dict[str, Any]:
        """Return what identifies the student: its section of the recipe and what that names."""
        section = self.recipe.config()["image"]
        return {
            "recipe": self.recipe.name, "image": section, "content": self.student().content()
        }

    def check(self, teacher: Path) -> None:
        """Refuse a teacher that does not fit the classes."""
        from l2t_core.teachers.file import check_teacher

        check_teacher(teacher, self.student().fingerprint())

    def notes(self, teacher: Path, baseline: bool) -> list[str]:
        """Return what is odd about the data: a recipe is trained as it is written."""
        return [f"note: {text}" for text in self.student().notes()]

    def student(self) -> Any:
        """Return the student, built once: reset() makes it fresh for each seed."""
        if self._student is None:
            self._student = self.recipe.field.build_student(self.recipe.student)
        return self._student

    def plan(self, seed: int, teacher: Path | None, folder: Path) -> list[str]:
        """Return the plan in words: there is no command behind it."""
        loss = f"the loss that {teacher} writes" if teacher else "cross-entropy"
        return [
            f"train {self.name} for {self.student().total_steps} steps on {loss}, into {folder}"
        ]

    def begun(self, seed: int, teacher: Path | None, folder: Path) -> bool:
        """Tell whether there is a snapshot to go on from."""
        return (folder / SNAPSHOT).exists()

    def run(self, seed: int, teacher: Path | None, folder: Path, log_format: LogFormat) -> Score:
        """Train one student and read its error on the test set, once, at the end."""
        import torch

        from l2t_core.losses.steps import FixedLoss, Recorded
        from l2t_core.students.train import train_student
        from l2t_vision.student_file import student_content

        student = self.student()
        applied = follow(student, teacher) if teacher else None
        recorded = Recorded(applied or FixedLoss())
        snapshot = folder / SNAPSHOT
        with bar(student_title(teacher, seed), log_format, quiet=True) as update:

            def on_event(event: dict[str, Any]) -> None:
                update(event["step"] + 1, event["of"], f"train nll {event['train_nll']:.3f}")

            try:
                train_student(
                    student,
                    seed,
                    recorded,
                    snapshot=snapshot,
                    on_event=on_event,
                )
                student.at_end()
            except FloatingPointError as error:
                signature = self._signature(applied)
                return Score(None, signature, recorded.seconds(), diverged=str(error))
        error_rate = 100.0 * student.test_error()
        content = io.BytesIO()
        torch.save(student_content(student), content)
        atomic_write(folder / "student.pt", content.getvalue())
        return Score(error_rate, self._signature(applied), recorded.seconds())

    def _signature(self, applied: Any) -> str:
        from l2t_vision.identity import signature

        loss = f"{applied.spec.form}+{applied.spec.sigma}" if applied else "cross-entropy"
        digest = self.student().content()["data_sha256"]
        return signature(self.recipe.student, digest, {"loss": loss})
