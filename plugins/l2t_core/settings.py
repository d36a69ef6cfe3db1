"""Settings with which no teacher can learn anything, refused before a run."""

from __future__ import annotations

import math

from l2t_core.checkpointing import SPILLS, parse_bytes
from l2t_core.differentiation import DIFFERENTIATIONS
from l2t_core.errors import UserError, suggestion
from l2t_core.life import PRECISIONS
from l2t_core.losses import SIGMAS, coefficient_shapes, unbounded_weights
from l2t_core.second_derivatives import SECOND
from l2t_core.specs import (
    WITHIN_A_LIFE,
    WITHOUT_DERIVATIVES,
    LossSpec,
    TeacherSpec,
    TrainingSpec,
)
from l2t_core.student_state import feature_count
from l2t_core.teachers import TEACHERS, Teacher

PARALLELS = ("students", "data")
# A dense W beyond this many classes takes more memory than any student of that size.
DENSE_LIMIT = 1000


def check_settings(
    loss: LossSpec,
    teacher: TeacherSpec,
    spec: TrainingSpec,
    total_steps: int,
    num_classes: int | None = None,
) -> None:
    """Refuse settings with which no teacher can learn anything.

    ``num_classes`` is the student's K; None where it is not known yet.

    Raises:
        UserError: naming the first such setting, its value and what it may be.
    """
    for name, value, fine, mend in _limits(loss, teacher, spec, total_steps):
        if not fine:
            raise UserError(f"{name} is {value}; it {mend}")
    coefficient_shapes(loss, 2)
    try:
        feature_count(teacher.features, num_classes or 2)
    except UserError as error:
        raise UserError(f"teacher.features: {error}") from None
    if loss.form == "dense" and num_classes is not None and num_classes > DENSE_LIMIT:
        raise UserError(
            f"loss.form=dense would hold {num_classes} x {num_classes} numbers in every slot; use "
            "diagonal, lowrank, banded, shared or network"
        )
    SIGMAS.get(loss.sigma)
    kind = TEACHERS.get(teacher.name)
    if (
        spec.bounded
        and unbounded_weights(loss)
        and kind.keep_from_below_zero is Teacher.keep_from_below_zero
    ):
        raise UserError(
            f"teacher.name={teacher.name} has no keep_from_below_zero, which training.bounded "
            "needs with loss.sigma=identity; write it or set training.bounded=false"
        )
    DIFFERENTIATIONS.get(spec.differentiation)
    _check_way(spec, total_steps)
    parse_bytes(spec.memory)
    second = SECOND.get(spec.hvp)
    known: list[tuple[str, str, tuple[str, ...]]] = [
        ("spill", spec.spill, SPILLS), ("precision", spec.precision, tuple(PRECISIONS)),
        ("parallel", spec.parallel, PARALLELS),
    ]
    for name, word, names in known:
        if word not in names:
            hint = suggestion(word, names) or f"; use {', '.join(names)}"
            raise UserError(f"unknown training.{name} {word!r}{hint}")
    if second.approximate and spec.precision != "float32":
        raise UserError(
            f"training.precision={spec.precision} leaves nothing of the small differences that "
            f"training.hvp={spec.hvp} takes; use float32 or training.hvp=exact"
        )


def _limits(
    loss: LossSpec, teacher: TeacherSpec, spec: TrainingSpec, total_steps: int
) -> list[tuple[str, float, bool, str]]:
    """Each number: its name, its value, whether it can be used, what it must be."""
    return [
        ("training.episodes", spec.episodes, spec.episodes >= 1, "must be at least 1"),
        ("training.lr", spec.lr, 0 < spec.lr < math.inf, "must be above 0"),
        ("training.clip_norm", spec.clip_norm, spec.clip_norm >= 0, "must be 0 (off) or more"),
        ("training.patience", spec.patience, spec.patience >= 0, "must be 0 (off) or more"),
        ("training.truncate", spec.truncate, spec.truncate >= 0, "must be 0 (off) or more"),
        ("training.discount", spec.discount, 0 < spec.discount <= 1, "must lie in (0, 1]"),
        ("training.students", spec.students, spec.students >= 1, "must be at least 1"),
        (
            "training.student_seeds", spec.student_seeds, spec.student_seeds >= 0,
            "must be 0 (fresh students each episode) or more",
        ),
        (
            "training.finalists", spec.finalists, spec.finalists >= 1,
            "must be at least 1 (the best by its own students)",
        ),
        (
            "training.final_students", spec.final_students, 1 <= spec.final_students <= 100_000,
            "must lie in [1, 100,000]",
        ),
        ("training.cotangent_cap", spec.cotangent_cap, 0 <= spec.cotangent_cap < math.inf,
         "must be 0 (off) or more"),
        ("training.max_growth", spec.max_growth, spec.max_growth >= 0, "must be 0 (off) or more"),
        ("training.average_last", spec.average_last, 1 <= spec.average_last <= total_steps,
         f"must lie between 1 (off) and the student's {total_steps} steps"),
        ("training.measure_points", spec.measure_points, 1 <= spec.measure_points <= total_steps,
         f"must lie between 1 (the end only) and the student's {total_steps} steps"),
        ("training.phi_penalty", spec.phi_penalty, 0 <= spec.phi_penalty < math.inf,
         "must be 0 (off) or more"),
        ("training.perturbation", spec.perturbation, 0 < spec.perturbation < math.inf,
         "must be above 0"),
        ("teacher.slots", teacher.slots, teacher.slots >= 1, "must be at least 1"),
        ("teacher.init_scale", teacher.init_scale, teacher.init_scale >= 0, "must be 0 or more"),
        ("loss.rank", loss.rank, loss.rank >= 1, "must be at least 1"),
        ("loss.ce_mix", loss.ce_mix, 0 <= loss.ce_mix < 1, "must lie in [0, 1)"),
        (
            "loss.warmup_smoothing", loss.warmup_smoothing, 0 <= loss.warmup_smoothing < 1,
            "must lie in [0, 1)",
        ),
        (
            "loss.warmup_steps", loss.warmup_steps, 0 <= loss.warmup_steps < total_steps,
            f"must lie below the student's {total_steps} steps, or the teacher never teaches",
        ),
        ("training.seed", spec.seed, 1 <= spec.seed < 2**31, "must lie in [1, 2^31)"),
    ]


def _check_way(spec: TrainingSpec, total_steps: int) -> None:
    """Refuse settings that the way to differentiate has no use for."""
    way = spec.differentiation
    within = way in WITHIN_A_LIFE
    if within and not 1 <= spec.window <= total_steps:
        raise UserError(
            f"training.differentiation={way} needs training.window, the steps between updates, "
            f"between 1 and the student's {total_steps}; it is {spec.window}"
        )
    if spec.window and not within:
        raise UserError(
            f"training.window has no effect with training.differentiation={way}; use "
            f"{' or '.join(WITHIN_A_LIFE)}, or leave it out"
        )
    if way == "mixed" and spec.students < 2:
        raise UserError(
            "training.differentiation=mixed weighs estimates by their variances, which needs "
            f"training.students of at least 2; it is {spec.students}"
        )
    idle = {
        "average_last": (spec.average_last > 1, within),
        "measure_points": (spec.measure_points > 1, within),
        "truncate": (spec.truncate > 0, within or way == "antithetic-es"),
        "discount": (spec.discount != 1.0, way in WITHOUT_DERIVATIVES),
        "cotangent_cap": (spec.cotangent_cap > 0, way in WITHOUT_DERIVATIVES),
    }
    for name, (given, without_effect) in idle.items():
        if given and without_effect:
            raise UserError(
                f"training.{name} has no effect with training.differentiation={way}; leave it out"
            )


def check_processes(spec: TrainingSpec, world: int) -> None:
    """Refuse a number of processes that the students cannot be dealt out to.

    Raises:
        UserError: naming the setting.
    """
    if spec.parallel == "students" and spec.students < world:
        raise UserError(
            f"training.students={spec.students} leaves some of {world} processes without one; set "
            f"training.students={world} or more, or training.parallel=data"
        )
    each = spec.students if spec.parallel == "data" else -(-spec.students // world)
    if spec.differentiation in WITHIN_A_LIFE and each > 1:
        raise UserError(
            f"training.differentiation={spec.differentiation} updates within a life, so each "
            f"process has one student; {spec.students} of them need {spec.students} processes "
            "(torchrun --nproc-per-node) and training.parallel=students"
        )
