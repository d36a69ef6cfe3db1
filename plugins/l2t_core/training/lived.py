"""A life whose loss was changed by windows, as a teacher that other students can have.

What updates theta within a life writes a dynamic loss, though each theta is that of a static
teacher: other students live under the same losses, each at its time, and need neither derivatives
nor dev.
"""

from __future__ import annotations

import bisect
import dataclasses

import torch

from l2t_core.hypergradients.ways import spans
from l2t_core.specs import TeacherSpec, TrainingSpec
from l2t_core.teachers.architectures import Teacher, build_teacher
from l2t_core.teachers.file import TeacherHeader
from l2t_core.training.checks import SLOTS_LIMIT
from l2t_core.training.state import Theta

# Of all windows' losses together: 200 MB, kept twice.
NUMBERS_LIMIT = 50_000_000


def can_be_told(spec: TeacherSpec, teacher: Teacher, training: TrainingSpec, total: int) -> bool:
    """Tell whether the losses of a life of ``total`` steps can be kept: few, and blind to s_t."""
    if spec.name != "static" or training.differentiation != "windows":
        return False
    numbers = sum(p.numel() for p in teacher.parameters())
    return numbers * -(-total // training.window) <= NUMBERS_LIMIT


def joined(lived: list[Theta], first: int, total: int, window: int) -> Theta:
    """Return the theta of a ``timed`` teacher from those of a life's windows; {} without windows.

    ``lived`` are static teachers', one for each of :func:`l2t_core.hypergradients.ways.spans`. Each
    stretch has the theta that there was at its middle: those of the life itself where the windows
    fill it, as there are as many stretches as windows.
    """
    if not lived:
        return {}
    stops = [span.stop for span in spans(first, total, window)]
    count = min(SLOTS_LIMIT, -(-total // window))
    middles = [(i + 0.5) * total / count for i in range(count)]
    chosen = [lived[bisect.bisect_right(stops, middle)] for middle in middles]
    return {name: torch.cat([theta[name] for theta in chosen]) for name in lived[0]}


def timed_teacher(lived: Theta, header: TeacherHeader) -> tuple[Teacher, TeacherHeader]:
    """Return the teacher with the theta of :func:`joined`, and its header, from a static one's."""
    count = len(next(iter(lived.values())))
    spec = dataclasses.replace(header.teacher, name="timed", slots=count, features=["progress"])
    teacher = build_teacher(spec, header.loss, header.num_classes, len(spec.features), 0)
    teacher.load_state_dict(lived)
    return teacher, dataclasses.replace(header, teacher=spec)
