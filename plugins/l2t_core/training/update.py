"""From the outcomes of several students to one update of theta, and what it tells.

Pure functions over estimates [N, E, D]: N students, E kinds of estimate, D numbers of theta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from l2t_core.errors import UserError
from l2t_core.hypergradients.diagnostics import largest, mean
from l2t_core.hypergradients.ways import Outcome
from l2t_core.losses.forms import neutral_coefficients, weights_to_bound
from l2t_core.specs import LossSpec, TrainingSpec
from l2t_core.students.flat import as_vector
from l2t_core.students.optimisers import clip_by_norm
from l2t_core.students.protocol import Student
from l2t_core.teachers.architectures import Teacher
from l2t_core.training.rules import UpdateRule

# Growth of the cotangent's norm beyond which runs were seen to learn nothing, and the ratio that
# pure noise would have on average, with some margin.
EXPLODED = 100.0
NOISY = 1.2
ROUGH = 0.1  # of H v's norm
_NUMBERS_AT_A_TIME = 2**22  # of phi, for its penalty
NOT_FINITE = "the hypergradient is not finite"
FLAT = "the hypergradient is zero: the smoothed measure is flat there"
# Where the student has none of its own field's (``Student``'s ``flat_remedy``).
FLAT_REMEDY = (
    "look at the measure first, and if it is sound lower the student's learning rate, or "
    "training.lr"
)


def combine(estimates: Tensor) -> Tensor:
    """Return one estimate [D] from [N, E, D]: the students' mean, kinds mixed by their variances.

    Each coefficient's weights are the inverse variances of the kinds' means over the students
    (Metz et al. 2019, section 3.2). A coefficient that no kind varies in is averaged. A kind that
    is zero for all students says nothing of it: a perturbation may be too small for its numbers.

    Raises:
        ValueError: if two kinds come from less than two students.
    """
    students, kinds, _ = estimates.shape
    means = estimates.mean(0)  # [E, D]
    if kinds == 1:
        return means[0]
    if students < 2:
        raise ValueError("variances need two students")
    variances = estimates.var(0)
    silent = (estimates == 0).all(0)  # [E, D]
    smallest = variances.masked_fill(silent, math.inf).min(0).values
    # Ratios to the smallest variance: 0 / 0 counts as equal, x / 0 as nothing.
    weights = torch.where(variances == smallest, 1.0, smallest / variances)
    weights = weights.masked_fill(silent, 0.0)
    return (weights * means).sum(0) / weights.sum(0).where(~silent.all(0), 1.0)


def signal_to_noise(estimates: Tensor) -> float:
    """Return ||mean|| over the standard error of that mean, of one kind's [N, D] over N students.

    Without any signal it is about 1. NaN for one student.
    """
    students = len(estimates)
    if students < 2:
        return math.nan
    signal = float(estimates.mean(0).norm())
    noise = math.sqrt(float(estimates.var(0).sum()) / students)
    return signal / noise if noise > 0.0 else math.inf


def phi_penalty(
    teacher: Teacher, loss: LossSpec, features: Sequence[Tensor], weight: float
) -> tuple[float, Tensor]:
    """Return weight times phi's mean squared distance from neutral, and its gradient [D].

    What a teacher remembers counts as given, as s_t does.

    The mean is over the states s_t of ``features`` and over phi's numbers: a teacher far from
    W = I, b = 0 pays for it.
    """
    parameters: dict[str, Tensor] = dict(teacher.named_parameters())
    neutral = neutral_coefficients(loss, teacher.num_classes)

    def distances(s: Tensor) -> Tensor:
        phi = functional_call(teacher, parameters, (s,))
        return torch.stack([(phi[n] - neutral[n].to(phi[n])).square().sum() for n in phi]).sum()

    numbers = sum(part.numel() for part in neutral.values())
    theta, total = list(parameters.values()), 0.0
    gradient = as_vector([None] * len(theta), theta)
    # Some states at a time: phi may be as large as a vocabulary, and a life long.
    for some in torch.stack(list(features)).split(max(1, _NUMBERS_AT_A_TIME // numbers)):
        value = weight * vmap(distances)(some).sum() / (numbers * len(features))
        gradient += as_vector(torch.autograd.grad(value, theta, allow_unused=True), theta)
        total += float(value.detach())
    return total, gradient


def penalised(
    gradient: Tensor,
    teacher: Teacher,
    loss: LossSpec,
    features: Sequence[Tensor],
    spec: TrainingSpec,
) -> Tensor:
    """Return M-tilde's ``gradient`` [D] less that of :func:`phi_penalty`, if there is one."""
    if not spec.phi_penalty:
        return gradient
    return gradient - phi_penalty(teacher, loss, features, spec.phi_penalty)[1]


def ascend(
    teacher: Teacher,
    loss: LossSpec,
    gradient: Tensor,
    rule: UpdateRule,
    spec: TrainingSpec,
) -> None:
    """Make one step of theta along M-tilde's ``gradient`` [D], clipped at ``spec.clip_norm``.

    Then, if ``spec.bounded``, to a theta near by whose loss is bounded below in any state.
    """
    rule.step(-clip_by_norm(gradient, spec.clip_norm))
    keep_bounded(teacher, loss, spec)


def judge(gradient: Tensor, rule: UpdateRule, spec: TrainingSpec) -> None:
    """Let ``rule`` learn from M-tilde's ``gradient`` [D] at the theta that it has made."""
    rule.learn(-clip_by_norm(gradient, spec.clip_norm))


def keep_bounded(teacher: Teacher, loss: LossSpec, spec: TrainingSpec) -> None:
    """Move theta, in place, to where the loss has a lower bound, if ``spec.bounded`` says so."""
    if spec.bounded and (parts := weights_to_bound(loss)):
        teacher.keep_from_below_zero(parts)


def ends_calmly(student: Student) -> bool:
    """Tell whether the student's rate falls to a tenth of its peak, or less, by its last step."""
    rates = [student.learning_rate(step) for step in range(student.total_steps)]
    return rates[-1] <= 0.1 * max(rates)


def advice(
    row: dict[str, object], spec: TrainingSpec, calm: bool, flat_remedy: str = FLAT_REMEDY
) -> str:
    """Return what is wrong with an episode's hypergradient and the setting that mends it, or "".

    The likeliest remedy comes first; ``calm`` is :func:`ends_calmly` of the student,
    ``flat_remedy`` its own words for where M-tilde is flat.
    """

    def number(key: str) -> float:
        value = row.get(key)
        return float(value) if isinstance(value, int | float) else 0.0

    if number("hvp_error") > ROUGH:  # first: what grows may be the differences' own noise
        return (
            f"differences are off by {100 * number('hvp_error'):.0f} % of H v at the last step, "
            "which may grow on its way back; set training.hvp=exact"
        )
    reason = str(row.get("reason", ""))
    if "diverged" in reason:
        return f"{reason}; lower the student's learning rate, or training.lr"
    if reason == FLAT:
        return f"{reason}; {flat_remedy}"
    if number("largest") > EXPLODED or reason == NOT_FINITE:
        said = f"grew {number('largest'):.3g}-fold" if number("largest") else "left all bounds"
        mend = "lower the student's peak rate (image.optimiser.lr; in fairseq --lr)"
        if not calm:
            mend = (
                "let the student's rate end at zero (image.schedule.name=linear; in fairseq "
                "--lr-scheduler polynomial_decay --total-num-update, the number of its updates), "
                f"{mend}"
            )
        if row.get("hvp_error") is not None:  # small at the end, and larger where Adam divides
            mend = "it may be the differences' own noise: set training.hvp=exact; else " + mend
        if spec.discount == 1.0:
            mend += ", or set training.discount below 1 (0.99)"
        return f"the hypergradient {said} on its way back; {mend}"
    snr = row.get("signal_to_noise")
    if isinstance(snr, float) and snr < NOISY:
        return (
            f"the students' hypergradients disagree (signal to noise {snr:.1f}); raise "
            f"training.students (now {spec.students}) or lower training.lr"
        )
    return ""


def account(outcomes: Sequence[Outcome], measure: str, needed: int) -> dict[str, object]:
    """Return what an episode's row tells of its students, whose failures are known by now.

    ``measure`` names the true dev measure; ``needed`` is how many students an update takes.
    """
    # Those that were left out for what they met on the way back tell most about it.
    back = [o.way_back for o in outcomes if o.way_back.norms or not o.failure]
    lost = sum(bool(o.failure) for o in outcomes)
    row: dict[str, object] = {
        "smoothed": mean([o.smoothed for o in outcomes if o.lived]),
        "dev_measure": mean([o.true for o in outcomes if o.lived and o.true is not None]),
        "measure": measure,
        "students": len(outcomes),
        "students_lost": lost,
        "growth": mean([way.growth for way in back]),
        "largest": largest([way.largest for way in back]),
        "sharpness": largest([way.sharpness for way in back]),
        "hvp_error": largest([w.hvp_error for w in back if w.hvp_error is not None]),
        "tail_error": largest([w.tail_error for w in back if w.tail_error is not None]),
        "skipped": len(outcomes) - lost < needed, "best": False, "hypergradient_norm": None,
        "signal_to_noise": None,
    }
    if row["skipped"]:
        row["reason"] = next(o.failure for o in outcomes if o.failure)
    return row


def unusable(outcome: Outcome, max_growth: float) -> str:
    """Return why an outcome may not move theta, empty if it may (``training.max_growth``)."""
    if not math.isfinite(outcome.smoothed):
        return "the smoothed measure is not finite"
    if outcome.true is not None and not math.isfinite(outcome.true):
        return "the dev measure is not finite"
    if not all(bool(e.isfinite().all()) for e in outcome.estimates):
        return NOT_FINITE
    if max_growth and outcome.way_back.largest > max_growth:
        return f"the hypergradient grew {outcome.way_back.largest:.0f}-fold on its way back"
    if outcome.true is not None and not any(bool(e.any()) for e in outcome.estimates):
        # Adam would go on by momentum, away from where there was something to learn.
        return FLAT
    return ""


def nothing_usable(episodes: str, last: Mapping[str, object]) -> UserError:
    """Return what to say where no hypergradient of ``episodes`` could be followed.

    The row of the ``last`` one may have a warning with a remedy of its own.
    """
    reason, mend = str(last["reason"]), "lower the student's learning rate, or training.lr"
    if "measure" in reason:  # its students have lived
        mend = f"look at the measure first (image.measure, nmt.measure), and if it is sound {mend}"
    said = last.get("warning") or f"{reason}; {mend}"
    return UserError(f"{episodes} gave a usable hypergradient; the last: {said}")
