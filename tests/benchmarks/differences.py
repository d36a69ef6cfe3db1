"""How far hypergradients by differences are from exact ones, both in float32, over one life.

For the students of hypergradient.py, from the same weights and batches, beside what an episode's
row tells: the error of H v at the last step, and of the last steps' hypergradient::

    python tests/benchmarks/differences.py --students mlp,lenet,transformer,lstm --steps 100
    python tests/benchmarks/differences.py --students resnet8 --steps 40
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from hypergradient_methods import make_teacher
from hypergradient_students import SEED, TASKS, SyntheticStudent

from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.ways import Outcome, exact
from l2t_core.specs import TrainingSpec
from l2t_core.students.life import Life

WAYS = ("finite-difference", "one-sided-difference")


def outcome(student: str, steps: int, hvp: str) -> Outcome:
    """Return what one life of ``student`` gives."""
    fresh = SyntheticStudent(TASKS[student], steps)
    spec = TrainingSpec(memory="4GiB", spill="none", hvp=hvp)
    engine = Engine(Life(fresh), fresh.loss, spec)
    episode = Episode(engine, fresh.default_features, SEED, SEED)
    return exact(episode, make_teacher(fresh), lambda phase, step: None)


def main(
    students: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(TASKS),
    steps: Annotated[int, typer.Option(min=1, help="T.")] = 100,
) -> None:
    """Hold hypergradients by differences against exact ones."""
    torch.set_num_threads(1)
    for student in students.split(","):
        reference = outcome(student, steps, "exact").estimates[0].double()
        for way in WAYS:
            found = outcome(student, steps, way)
            off = (found.estimates[0].double() - reference).norm() / reference.norm()
            seen = found.way_back
            print(
                f"{student:12} {way:22} off by {off:.4f}; hvp_error {seen.hvp_error:.4f}, "
                f"tail_error {seen.tail_error:.4f}", flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
