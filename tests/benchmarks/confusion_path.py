"""The hypergradient on the straight way from cross-entropy to the true confusion of pair noise.

The form ``confusion`` with C^2 = (1 - a) I + a P, P the pairs that labels are mistaken in, and a
little on all other entries; one student each. M-tilde's derivatives by C are shown by kind of
entry, signed so that above zero means that it wants to grow::

    python tests/benchmarks/confusion_path.py mnist-mlp-noise40 image.noise=pair \\
      image.optimiser.lr=0.1
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from l2t_cli.recipe_reading.loading import load_recipe
from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.ways import exact
from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import build_teacher

LOSS, TEACHER = LossSpec("confusion"), TeacherSpec("static")


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file, with pair noise")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE")] = None,
    spread: Annotated[float, typer.Option(help="Deviation of C's other entries")] = 0.02,
) -> None:
    """Print dev measure and hypergradient at five points of the way."""
    loaded = load_recipe(recipe, overrides or [])
    student = loaded.field.build_student(loaded.student)
    engine = Engine(Life(student), LOSS, loaded.training)
    names, classes = student.default_features, student.num_classes
    own, pairs = torch.eye(classes), torch.eye(classes).roll(1, 1)  # of class k, label k + 1
    torch.manual_seed(0)
    for share in (0.0, 0.1, 0.2, 0.3, 0.4):
        teacher = build_teacher(TEACHER, LOSS, classes, feature_count(names, classes), seed=1)
        confusion = ((1 - share) * own + share * pairs).sqrt()
        confusion += spread * torch.randn(classes, classes) * (confusion == 0.0)
        parts = dict(teacher.named_parameters())
        parts["values.C"].data[0] = confusion
        outcome = exact(Episode(engine, names, 7, 0), teacher, lambda phase, step: None)
        pieces = outcome.estimates[0].split([p.numel() for p in parts.values()])
        by_c = dict(zip(parts, pieces, strict=True))["values.C"].reshape(classes, classes)
        by_c = by_c * confusion.sign()
        kinds = {"own": own, "pair": pairs, "other": 1 - own - pairs}
        told = [
            f"{name} {by_c[kind == 1].mean():+.4f} ± {by_c[kind == 1].std():.4f}"
            for name, kind in kinds.items()
        ]
        print(
            f"a = {share}: dev {outcome.true:.4f}, norm {outcome.estimates[0].norm():.3f}; "
            + ", ".join(told), flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
