"""A teacher of form ``confusion`` that begins where gold loss correction ends.

A student of cross-entropy tells what it takes the dev images of each class for; C^2 begins there,
the rest at cross-entropy, and the hypergradient of M-tilde goes on from it::

    python tests/benchmarks/confusion_start.py mnist-mlp-noise40 image.noise=pair \\
      image.optimiser.lr=0.1 training.lr=0.003 training.episodes=12 --out runs/confusion-start
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from l2t_cli.recipe_reading.loading import load_recipe
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.students.train import train_student
from l2t_core.teachers.architectures import Teacher, build_teacher
from l2t_core.training import episodes as training

LOSS, TEACHER = LossSpec("confusion"), TeacherSpec("static", init_scale=0.0)


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file, with wrong labels")],
    out: Annotated[Path, typer.Option(help="The run's folder")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE")] = None,
) -> None:
    """Print the dev measure of each episode's student; the first one's is gold correction's."""
    torch.set_num_threads(1)
    loaded = load_recipe(recipe, overrides or [])
    student = loaded.field.build_student(loaded.student)
    train_student(student, 1)
    print(f"cross-entropy: dev {student.true_measure():.4f}", flush=True)
    confusion = student.dev_confusion()

    def begun(*given: Any) -> Teacher:
        teacher = build_teacher(*given)
        dict(teacher.named_parameters())["values.C"].data[0] = confusion.sqrt()
        return teacher

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "episode":
            print(
                f"after {event['episode']} updates: dev {event['dev_measure']:.4f}, largest growth "
                f"{event['largest']:.3g}", flush=True,
            )

    with mock.patch.object(training, "build_teacher", begun):
        training.train_teacher(
            student, LOSS, TEACHER, loaded.training, open_run(out, loaded.config()), record={},
            on_event=tell,
        )


if __name__ == "__main__":
    typer.run(main)
