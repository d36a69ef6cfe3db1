"""Ways to differentiate: from an episode and a teacher to the hypergradient d M-tilde / d theta.

Each is a function ``(episode, teacher, on_step) -> Outcome`` under a name in
:data:`DIFFERENTIATIONS`; an evolutionary estimator would train several students inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from l2t_core.applied import AppliedTeacher
from l2t_core.double_backward import twice_differentiable
from l2t_core.registry import Registry
from l2t_core.specs import LossSpec, TrainingSpec
from l2t_core.teachers import Teacher
from l2t_core.unroll import (
    Life,
    OnStep,
    Trajectory,
    parse_bytes,
    plan_keep_every,
    recompute,
    run_forward,
    step_vjp,
    trajectory_point_bytes,
)


@dataclass(frozen=True)
class Episode:
    """One fresh student's life: everything but theta that its outcome depends on.

    ``student_seed`` sets parameters, batches and dropout, ``measure_seed`` the dev sample of
    M-tilde; ``feature_names`` is what the teacher sees.
    """

    life: Life
    loss: LossSpec
    feature_names: tuple[str, ...]
    spec: TrainingSpec
    student_seed: int
    measure_seed: int

    def follow(self, teacher: Teacher) -> AppliedTeacher:
        """Return ``teacher`` set to follow this episode's student from its first step."""
        student = self.life.student
        return AppliedTeacher(
            teacher, self.loss, self.feature_names, student.num_classes, student.total_steps
        )


@dataclass
class Outcome:
    """What an episode yields: the hypergradient and the two dev measures at omega_T.

    ``gradient`` is d M-tilde / d theta, one tensor per teacher parameter, to ascend.
    ``growth`` is ||d omega|| at the first differentiated step over that at the last.
    """

    gradient: list[Tensor]
    smoothed: float
    true: float
    keep_every: int
    growth: float


Differentiation = Callable[[Episode, Teacher, OnStep], Outcome]
DIFFERENTIATIONS: Registry[Differentiation] = Registry("way to differentiate")


def first_differentiated_step(total_steps: int, loss: LossSpec, spec: TrainingSpec) -> int:
    """Return the first step that the reverse pass visits.

    Steps of the cross-entropy warm-up come first and do not depend on theta, so nothing before
    the first taught step matters; truncation keeps the last ``spec.truncate`` steps.
    """
    first = min(loss.warmup_steps, total_steps) if loss.ce_mix < 1.0 else total_steps
    return max(first, total_steps - spec.truncate) if spec.truncate else first


def measure(life: Life, measure_seed: int) -> tuple[float, float, Tensor]:
    """Return M-tilde, the true measure and d M-tilde / d omega [P] at the module's parameters."""
    # One derivative, but in evaluation mode, where cuDNN's recurrent kernels have none at all.
    with twice_differentiable(life.student.module):
        smoothed = life.student.smoothed_measure(measure_seed)
        cotangent = life.flat.gather(life.gradients(smoothed))
    return float(smoothed.detach()), life.student.true_measure(), cotangent


@DIFFERENTIATIONS.register("exact")
def exact(episode: Episode, teacher: Teacher, on_step: OnStep) -> Outcome:
    """Reverse-mode hypergradient: the chain of the steps' VJPs (Algorithm 1, lines 2-4).

    Exact for ``discount`` 1 and no truncation, for any budget: recomputed points are the kept
    ones to the bit. Batch-norm buffers are replayed but not differentiated.
    """
    life, spec = episode.life, episode.spec
    state = life.begin(episode.student_seed)
    steps = life.student.total_steps
    first = first_differentiated_step(steps, episode.loss, spec)
    keep_every = plan_keep_every(
        steps - first, trajectory_point_bytes(life, state), parse_bytes(spec.memory)
    )
    final, trajectory = run_forward(
        life, episode.follow(teacher), state, first, keep_every, on_step
    )
    smoothed, true, d_omega = measure(life, episode.measure_seed)
    cotangent = torch.zeros_like(final)
    cotangent[0] = d_omega
    gradient, growth = reverse(episode, teacher, trajectory, cotangent, first, on_step)
    return Outcome(gradient, smoothed, true, keep_every, growth)


def reverse(
    episode: Episode,
    teacher: Teacher,
    trajectory: Trajectory,
    cotangent: Tensor,
    first: int,
    on_step: OnStep,
) -> tuple[list[Tensor], float]:
    """Walk the trajectory back from ``cotangent`` [R, P] of the final state.

    Returns d theta, one tensor per teacher parameter, and the growth of ||d omega||.
    """
    life, keep = episode.life, trajectory.keep_every
    steps = life.student.total_steps
    gradient = [torch.zeros_like(p) for p in teacher.parameters()]
    final_norm = float(cotangent[0].norm())
    for start in reversed(range(first, steps, keep)):
        stop = min(start + keep, steps)
        points = recompute(life, trajectory, teacher, episode.loss, start, stop)
        for step in reversed(range(start, stop)):
            cotangent, d_theta = step_vjp(
                life, teacher, episode.loss, points.pop(), trajectory.features[step],
                step, cotangent,
            )
            for total, part in zip(gradient, d_theta, strict=True):
                if part is not None:
                    total += part
            cotangent = cotangent * episode.spec.discount
            on_step("reverse", step)
        del trajectory.kept[start]
    growth = float(cotangent[0].norm()) / final_norm if final_norm > 0 else 0.0
    return gradient, growth
