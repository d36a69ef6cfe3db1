"""Settings with which no teacher can learn anything, refused before a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from l2t_core.errors import Limit, NoEffect, UserError, out_of_range, unknown_choice
from l2t_core.hypergradients.checkpointing import SPILLS, parse_bytes
from l2t_core.hypergradients.engine import first_differentiated_step
from l2t_core.hypergradients.readout import measure_steps
from l2t_core.hypergradients.second_derivatives import SECOND
from l2t_core.hypergradients.ways import DIFFERENTIATIONS
from l2t_core.losses.forms import FORMS, weights_to_bound
from l2t_core.losses.taught import SIGMAS
from l2t_core.registry import unknown_names
from l2t_core.specs import (
    LEARNED_RULES,
    WITHIN_A_LIFE,
    WITHOUT_DERIVATIVES,
    LossSpec,
    TeacherSpec,
    TrainingSpec,
)
from l2t_core.students.life import PRECISIONS
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import TEACHERS, Teacher
from l2t_core.training.rules import UPDATE_RULES

PARALLELS = ("students", "data")
# Pairs of more classes than this take more memory than any student of that size.
PAIRS_LIMIT = 1000
# A cell of more units has more numbers than most students, four times its square.
HIDDEN_LIMIT = 4096
# Many times the default, beyond which nothing was tried.
SLOTS_LIMIT = 4096


def problems(
    loss: LossSpec,
    teacher: TeacherSpec,
    spec: TrainingSpec,
    total_steps: int,
    num_classes: int | None = None,
) -> list[str]:
    """Return a line for all with which no teacher can learn anything, none if it can.

    ``num_classes`` is the student's K; None where it is not known yet.
    """
    found = _unknown(loss, teacher, spec, num_classes or 2)
    if total_steps < 1:  # the field says what is wrong with that; here all fits into such a life
        total_steps = 10**9
    found += out_of_range("training", _training_limits(spec, total_steps))
    found += out_of_range("teacher", _teacher_limits(teacher))
    found += out_of_range("loss", _loss_limits(loss, total_steps))
    # What follows looks up what is named.
    return found or [
        *_wrong_together(loss, teacher, spec, num_classes), *_wrong_way(spec, total_steps),
        *_idle(loss, teacher, spec, total_steps),
    ]


def check_settings(
    loss: LossSpec,
    teacher: TeacherSpec,
    spec: TrainingSpec,
    total_steps: int,
    num_classes: int | None = None,
) -> None:
    """Refuse what :func:`problems` lists.

    Raises:
        UserError: with the first line.
    """
    if found := problems(loss, teacher, spec, total_steps, num_classes):
        raise UserError(found[0])


def _unknown(
    loss: LossSpec, teacher: TeacherSpec, spec: TrainingSpec, num_classes: int
) -> list[str]:
    found = unknown_names(
        [
            ("loss.form", FORMS, loss.form),
            ("loss.sigma", SIGMAS, loss.sigma),
            ("teacher.name", TEACHERS, teacher.name),
            ("training.differentiation", DIFFERENTIATIONS, spec.differentiation),
            ("training.hvp", SECOND, spec.hvp),
            ("training.update_rule", UPDATE_RULES, spec.update_rule),
        ]
    )
    for name, word, known in (
        ("spill", spec.spill, SPILLS), ("precision", spec.precision, tuple(PRECISIONS)),
        ("parallel", spec.parallel, PARALLELS),
    ):
        found += unknown_choice(f"training.{name}", word, known)
    try:
        feature_count(teacher.features, num_classes)
    except UserError as error:
        found.append(f"teacher.features: {error}")
    try:
        parse_bytes(spec.memory)
    except UserError as error:
        found.append(f"training.{error}")
    return found


def _wrong_together(
    loss: LossSpec, teacher: TeacherSpec, spec: TrainingSpec, num_classes: int | None
) -> Iterator[str]:
    if num_classes is not None and num_classes < 2:
        yield f"num_classes of the student is {num_classes}; two or more are needed"
    if (num_classes or 0) > PAIRS_LIMIT and FORMS.get(loss.form).for_pairs:
        yield (
            f"loss.form={loss.form} is for pairs of classes, and {num_classes} have too many for "
            "any memory; use diagonal, lowrank, banded, shared or network"
        )
    if (
        spec.bounded
        and weights_to_bound(loss)
        and TEACHERS.get(teacher.name).keep_from_below_zero is Teacher.keep_from_below_zero
    ):
        yield (
            f"teacher.name={teacher.name} has no keep_from_below_zero, which training.bounded "
            "needs with loss.sigma=identity; write it or set training.bounded=false"
        )
    seen = TEACHERS.get(teacher.name).features
    if seen and teacher.features and tuple(teacher.features) != seen:
        yield (
            f"teacher.name={teacher.name} looks at {', '.join(seen)} alone; leave "
            "teacher.features out"
        )
    if SECOND.get(spec.hvp).approximate and spec.precision != "float32":
        yield (
            f"training.hvp={spec.hvp} takes differences that are too small for "
            f"precision={spec.precision}; use float32 or training.hvp=exact"
        )


def _training_limits(spec: TrainingSpec, total_steps: int) -> list[Limit]:
    return [
        ("episodes", spec.episodes, spec.episodes >= 1, "at least 1"),
        ("lr", spec.lr, 0 < spec.lr < math.inf, "above 0"),
        ("rule_lr", spec.rule_lr, 0 < spec.rule_lr < math.inf, "above 0"),
        ("clip_norm", spec.clip_norm, spec.clip_norm >= 0, "0 (off) or more"),
        ("patience", spec.patience, spec.patience >= 0, "0 (off) or more"),
        ("truncate", spec.truncate, spec.truncate >= 0, "0 (off) or more"),
        ("discount", spec.discount, 0 < spec.discount <= 1, "in (0, 1]"),
        ("students", spec.students, spec.students >= 1, "at least 1"),
        (
            "student_seeds", spec.student_seeds, spec.student_seeds >= 0,
            "0 (fresh students each episode) or more",
        ),
        (
            "finalists", spec.finalists, spec.finalists >= 1,
            "at least 1 (the best by its own students)",
        ),
        (
            "final_students", spec.final_students, 1 <= spec.final_students <= 100_000,
            "in [1, 100,000]",
        ),
        (
            "cotangent_cap", spec.cotangent_cap, 0 <= spec.cotangent_cap < math.inf,
            "0 (off) or more",
        ),
        ("max_growth", spec.max_growth, spec.max_growth >= 0, "0 (off) or more"),
        (
            "average_last", spec.average_last, 1 <= spec.average_last <= total_steps,
            f"between 1 (off) and the student's {total_steps} steps",
        ),
        (
            "measure_points", spec.measure_points, 1 <= spec.measure_points <= total_steps,
            f"between 1 (the end only) and the student's {total_steps} steps",
        ),
        ("phi_penalty", spec.phi_penalty, 0 <= spec.phi_penalty < math.inf, "0 (off) or more"),
        ("perturbation", spec.perturbation, 0 < spec.perturbation < math.inf, "above 0"),
        ("seed", spec.seed, 1 <= spec.seed < 2**31, "in [1, 2^31)"),
    ]


def _teacher_limits(teacher: TeacherSpec) -> list[Limit]:
    return [
        (
            "slots", teacher.slots, 1 <= teacher.slots <= SLOTS_LIMIT,
            f"in [1, {SLOTS_LIMIT:,}]",
        ),
        (
            "hidden", teacher.hidden, 1 <= teacher.hidden <= HIDDEN_LIMIT,
            f"in [1, {HIDDEN_LIMIT:,}]",
        ),
        ("init_scale", teacher.init_scale, 0 <= teacher.init_scale < math.inf, "0 or more"),
    ]


def _loss_limits(loss: LossSpec, total_steps: int) -> list[Limit]:
    return [
        ("rank", loss.rank, loss.rank >= 1, "at least 1"),
        ("ce_mix", loss.ce_mix, 0 <= loss.ce_mix < 1, "in [0, 1)"),
        ("warmup_smoothing", loss.warmup_smoothing, 0 <= loss.warmup_smoothing < 1, "in [0, 1)"),
        (
            "warmup_steps", loss.warmup_steps, 0 <= loss.warmup_steps < total_steps,
            f"below the student's {total_steps} steps, or the teacher never teaches",
        ),
    ]


def _wrong_way(spec: TrainingSpec, total_steps: int) -> Iterator[str]:
    """Yield a line for settings that the way to differentiate has no use for."""
    way = spec.differentiation
    within = way in WITHIN_A_LIFE
    if within and not 1 <= spec.window <= total_steps:
        yield (
            f"training.differentiation={way} needs training.window, the steps between updates, "
            f"between 1 and the student's {total_steps}; it is {spec.window}"
        )
    if spec.window and not within:
        mend = f"use {' or '.join(WITHIN_A_LIFE)}, or leave it out"
        yield NoEffect("training.window", "training.differentiation", way, mend)
    if way == "mixed" and spec.students < 2:
        yield (
            "training.differentiation=mixed weighs estimates by their variances, which needs "
            f"training.students of at least 2; it is {spec.students}"
        )
    without = way in WITHOUT_DERIVATIVES
    idle = {
        "average_last": within,
        "measure_points": within,
        "truncate": within or without,
        "discount": without,
        "cotangent_cap": without,
        "max_growth": without,
        "hvp": without,
        "spill": without,
        "perturbation": way in ("exact", "windows"),
    }
    learns = spec.update_rule in LEARNED_RULES
    if learns and way != "windows":
        yield (
            f"training.update_rule={spec.update_rule} learns from windows that are lived again, "
            f"and training.differentiation is {way}; set that to windows, with training.window"
        )
    if spec.rule_lr != TrainingSpec.rule_lr and not learns:
        mend = f"use {' or '.join(LEARNED_RULES)}, or leave it out"
        yield NoEffect("training.rule_lr", "training.update_rule", spec.update_rule, mend)
    for name, without_effect in idle.items():
        usual = getattr(TrainingSpec, name)
        if without_effect and getattr(spec, name) != usual:
            mend = f"leave it out (that is {usual})"
            yield NoEffect(f"training.{name}", "training.differentiation", way, mend)


def _idle(
    loss: LossSpec, teacher: TeacherSpec, spec: TrainingSpec, total_steps: int
) -> Iterator[str]:
    """Yield a line for settings that another one leaves nothing to do."""
    if loss.rank != LossSpec.rank and loss.form != "lowrank":
        yield NoEffect("loss.rank", "loss.form", loss.form, "use lowrank, or leave it out")
    for name in ("slots", "hidden"):
        users = [n for n in TEACHERS.names() if name in TEACHERS.get(n).settings]
        if getattr(teacher, name) != getattr(TeacherSpec, name) and teacher.name not in users:
            mend = f"use {' or '.join(users)}, or leave it out"
            yield NoEffect(f"teacher.{name}", "teacher.name", teacher.name, mend)
    if loss.warmup_smoothing and not loss.warmup_steps:
        mend = "set that, or leave it out"
        yield NoEffect("loss.warmup_smoothing", "loss.warmup_steps", 0, mend)
    if spec.final_students != TrainingSpec.final_students and spec.finalists == 1:
        mend = "set that to 2 or more, or leave it out"
        yield NoEffect("training.final_students", "training.finalists", 1, mend)
    if spec.differentiation in ("exact", "windows") and 0 < spec.student_seeds < spec.students:
        yield (
            f"training.students={spec.students} would live the same lives more than once with "
            f"training.student_seeds={spec.student_seeds}; set that to 0 or to {spec.students} or "
            "more"
        )
    if spec.measure_points > 1 and spec.differentiation not in WITHOUT_DERIVATIVES:
        first = first_differentiated_step(total_steps, loss, spec)
        if measure_steps(total_steps, spec.measure_points)[-2] <= first:
            yield (
                f"training.measure_points={spec.measure_points} has no effect: all but the last "
                f"point lie in the first {first} steps, which are not differentiated "
                "(training.truncate, loss.warmup_steps); use more points, or leave it out"
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
