"""Print the peak memory, in MiB, of a process that walks one life of so many steps back.

``python episode_memory.py STEPS SPILL POINTS``: a student with 24 MiB of state (Adam's moments
count) and a table of 8 MiB that it never changes, on a trajectory of 120 MiB, its measure read at
so many points. Then the part of it that came on top of the student.
"""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor, nn
from toy_students import ToyStudent  # type: ignore[import-not-found]

from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.ways import exact
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import build_teacher


class Large(nn.Module):
    """1000 -> 2000 -> 3, and a table."""

    input_shape = (1000,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1000, 2000), nn.Tanh(), nn.Linear(2000, 3))
        self.register_buffer("table", torch.ones(2 * 2**20))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.table[:3]


def main() -> None:
    steps, spill, points = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    student = ToyStudent(Large, OptimiserSpec("adam", 1e-4), steps, torch.float32)
    before = peak()
    spec = TrainingSpec(memory="120MiB", spill=spill, measure_points=points)
    loss = LossSpec("shared", "identity")
    engine = Engine(Life(student), loss, spec)
    features = tuple(student.default_features)
    teacher = build_teacher(TeacherSpec(slots=2), loss, 3, feature_count(features, 3), seed=1)
    outcome = exact(Episode(engine, features, 3, 0), teacher, lambda phase, step: None)
    assert bool(outcome.estimates[0].isfinite().all())
    print(peak(), peak() - before)


def peak() -> int:
    """Return the largest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


main()
