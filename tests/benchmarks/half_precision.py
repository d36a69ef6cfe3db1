"""How far off low precision is in one step of a recipe's student: its gradient, and H v.

Relative errors beside float32, v random; float16 also without the scaling that Life does::

    python tests/benchmarks/half_precision.py multi30k-de-en-finetune
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from l2t_cli.recipe_reading.loading import load_recipe
from l2t_core.hypergradients.second_derivatives import Exact
from l2t_core.losses.forms import neutral_coefficients
from l2t_core.losses.taught import step_loss
from l2t_core.specs import LossSpec
from l2t_core.students.life import Life

LOSS = LossSpec()


def derivatives(student: Any, precision: str, scaled: bool, step: int) -> list[torch.Tensor]:
    """Return the gradient [P] and H v [P] of one step at the student's initial parameters."""
    life = Life(student, precision)
    life.half &= scaled
    life.show(life.begin(1)[0])
    phi = neutral_coefficients(LOSS, student.num_classes)
    v = torch.randn(life.flat.vector.shape, generator=torch.Generator().manual_seed(1))
    curved, _ = Exact(life, LOSS, trace=False).at(step, phi, lambda _: 1e-4 * v)
    loss = step_loss(LOSS, *life.outputs(step), phi, step).mean()
    return [life.flat.gather(part).clone() for part in (life.gradients(loss), curved)]


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE")] = None,
    step: Annotated[int, typer.Option(help="Which step of the student's life")] = 3,
) -> None:
    """Print both errors for each precision."""
    loaded = load_recipe(recipe, overrides or [])
    student = loaded.field.build_student(loaded.student)
    exact = derivatives(student, "float32", True, step)
    for precision, scaled in (("bfloat16", True), ("float16", True), ("float16", False)):
        found = derivatives(student, precision, scaled, step)
        gradient, curved = (
            float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
        )
        name = precision if scaled else f"{precision} unscaled"
        print(f"{name:18} gradient off by {gradient:.2%}, H v by {curved:.2%}", flush=True)


if __name__ == "__main__":
    typer.run(main)
