"""The trials of an image recipe's comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2t_cli.applying.image import follow
from l2t_cli.comparing.trials import Result, Trial
from l2t_cli.recipe_reading.loading import Recipe
from l2t_core.runs.files import SNAPSHOT

if TYPE_CHECKING:
    from l2t_core.losses.steps import Recorded, StepLoss
    from l2t_core.students.state import DevStatistics


class ImageTrials:
    """Trains and measures an image recipe's students; see ``FieldTrials``."""

    measure = "error %"
    lower_is_better = True
    worst = 100.0
    dev_measure = "accuracy"
    curve = "dev accuracy"

    def __init__(self, recipe: Recipe) -> None:
        from l2t_vision.identity import signature

        self.recipe = recipe
        self.student = recipe.field.build_student(recipe.student)
        self.rate = float(recipe.student.optimiser.lr)
        self.steps = int(recipe.student.steps)
        self.one_a_core = self.student.data.train_x.device.type == "cpu"
        self.content = self.student.content()
        self.signature = signature(
            recipe.student, self.content["data_sha256"], {"optimiser.lr": "tuned"}
        )

    def check(self, teachers: Sequence[Path], losses: Sequence[str]) -> None:
        """Refuse teachers for other classes, and losses that the student cannot give."""
        from l2t_core.losses.steps import fixed_loss
        from l2t_core.teachers.file import check_teacher

        for teacher in teachers:
            check_teacher(teacher, self.student.fingerprint())
        for loss in losses:
            fixed_loss(loss, {}, self._student(self.student.spec))

    def notes(self) -> list[str]:
        """Return lines on what is odd about the splits of the data."""
        return list(self.student.notes())

    def identity(self) -> dict[str, Any]:
        """Return the image section without its rate, digests of what it names, the versions."""
        import torch

        from l2t_core import __version__

        section = self.recipe.config()["image"]
        del section["optimiser"]["lr"], section["folder"], section["device"]
        return {
            "field": "image",
            "image": section,
            "content": self.content,
            # Roundings differ.
            "device": self.student.data.train_x.device.type,
            "versions": {"l2t": __version__, "torch": torch.__version__},
        }

    def run(self, trial: Trial, folder: Path) -> Result:
        """Train one student; read its test error if it is a final one."""
        from l2t_core.losses.baselines import baseline
        from l2t_core.losses.steps import fixed_loss

        spec = self.student.spec
        spec = dataclasses.replace(
            spec, optimiser=dataclasses.replace(spec.optimiser, lr=trial.lr)
        )
        student = self._student(spec)
        seconds, before = 0.0, 0
        if first := "" if trial.teacher else baseline(trial.loss).first:
            snapshot = folder / "first.safetensors"
            recorded, _, diverged = _trained(
                student, trial.seed, fixed_loss(first, {}, student), snapshot
            )
            snapshot.unlink(missing_ok=True)  # a kill later on has it trained again, alike
            seconds, before = recorded.seconds(), recorded.step
            if diverged:
                return Result(seconds, 0, steps_before=before, diverged=diverged)
        loss = (
            follow(student, trial.teacher) if trial.teacher
            else fixed_loss(trial.loss, dict(trial.settings), student)
        )
        recorded, dev, diverged = _trained(student, trial.seed, loss, folder / SNAPSHOT)
        seconds += recorded.seconds()
        if dev is None:
            return Result(seconds, recorded.step, steps_before=before, diverged=diverged)
        curve = {step: accuracy for step, _, accuracy in recorded.curve}
        curve[spec.steps] = dev.accuracy  # looks need not end with the run
        return Result(
            seconds=seconds,
            steps=spec.steps,
            steps_before=before,
            dev=student.true_measure(),
            nll=dev.nll,
            test=100.0 * student.test_error() if trial.final else None,
            signature=self.signature,
            curve=[[step, accuracy] for step, accuracy in curve.items()],
        )

    def _student(self, spec: Any) -> Any:
        """Return a fresh student of ``spec`` on the data that is loaded already."""
        return type(self.student)(spec, self.student.data)


def _trained(
    student: Any, seed: int, loss: StepLoss, snapshot: Path
) -> tuple[Recorded, DevStatistics | None, str]:
    """Train ``student`` from ``seed`` by ``loss``.

    Return its record, and its statistics on dev at the end or what it diverged by.
    """
    from l2t_core.losses.steps import Recorded
    from l2t_core.students.train import train_student

    recorded = Recorded(loss)
    try:
        train_student(student, seed, recorded, snapshot=snapshot)
        return recorded, student.at_end(), ""
    except FloatingPointError as error:
        return recorded, None, str(error)
