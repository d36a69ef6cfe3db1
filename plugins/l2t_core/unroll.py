"""A student's life under a teacher: the training step, its replay, and the stored trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from l2t_core.applied import AppliedTeacher
from l2t_core.double_backward import twice_differentiable
from l2t_core.errors import UserError
from l2t_core.flat import FlatParameters
from l2t_core.losses import Coefficients, cross_entropy, step_loss
from l2t_core.specs import LossSpec
from l2t_core.student import Student
from l2t_core.student_state import TrainStatistics, train_statistics

OnStep = Callable[[str, int], None]  # ("forward" or "reverse", step)


@dataclass
class Point:
    """A student between two steps: the state [R, P] and the module's buffers."""

    state: Tensor
    buffers: list[Tensor]


@dataclass
class Trajectory:
    """What the reverse pass needs of a forward run: kept points and every step's s_t.

    ``kept`` holds every ``keep_every``-th point; the points between are recomputed.
    """

    keep_every: int
    kept: dict[int, Point] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)


class Life:
    """Runs one student's training steps on flat states. Uses torch's global random numbers.

    The student's module serves as scratch space: every step loads its state into it first.
    """

    def __init__(self, student: Student) -> None:
        self.student = student
        self.flat = FlatParameters(student.module)
        self.buffers = list(student.module.buffers())

    def begin(self, seed: int) -> Tensor:
        """Reset the student to ``seed`` and return its initial state [R, P]."""
        self.student.reset(seed)
        return self.student.optimiser.initial(self.flat.vector.clone())

    def point(self, state: Tensor) -> Point:
        """Return ``state`` together with the module's buffers as they are now."""
        return Point(state, [b.clone() for b in self.buffers])

    def restore(self, point: Point) -> None:
        """Load a point into the module."""
        self.flat.load(point.state[0])
        for buffer, value in zip(self.buffers, point.buffers, strict=True):
            buffer.copy_(value)

    def outputs(self, step: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and targets of ``step``, with the step's random numbers."""
        torch.manual_seed(self.student.step_seed(step))
        return self.student.predict(self.student.batch(step))

    def gradients(self, loss: Tensor, create_graph: bool = False) -> list[Tensor | None]:
        """Return the loss's gradient, one tensor per parameter, None where unused."""
        return list(
            torch.autograd.grad(
                loss, self.flat.parameters, create_graph=create_graph, allow_unused=True
            )
        )

    def step(
        self, state: Tensor, step: int, loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, TrainStatistics]:
        """Make one training step; ``loss_of`` maps (log-probs, targets) to losses [N].

        Returns the next state [R, P] and the step's statistics. The module's parameters must
        already hold ``state[0]``; they hold the new ones afterwards.
        """
        with twice_differentiable(self.student.module):
            log_probs, targets = self.outputs(step)
            gradient = self.flat.gather(self.gradients(loss_of(log_probs, targets).mean()))
        with torch.no_grad():
            rate = self.student.learning_rate(step)
            state = self.student.optimiser.update(state, gradient, step, rate)
        self.flat.load(state[0])
        return state, train_statistics(log_probs, targets)


def taught_step(
    life: Life, applied: AppliedTeacher | None, state: Tensor, step: int
) -> tuple[Tensor, TrainStatistics]:
    """Make one step under a teacher (or cross-entropy where None), s_t included."""
    student = life.student
    if applied is None:
        return life.step(state, step, cross_entropy)
    applied.begin_step(student.learning_rate(step), step)
    state, statistics = life.step(state, step, applied.loss)
    applied.commit(statistics)
    dev = student.dev_statistics(step)
    if dev is not None:
        applied.observe_dev(dev)
    return state, statistics


def run_forward(
    life: Life,
    applied: AppliedTeacher,
    state: Tensor,
    first_needed: int,
    keep_every: int,
    on_step: OnStep,
) -> tuple[Tensor, Trajectory]:
    """Train a student for its T steps; keep every ``keep_every``-th point from ``first_needed``.

    Returns the final state [R, P] and the trajectory. Raises FloatingPointError where the
    student's parameters stop being finite.
    """
    trajectory = Trajectory(keep_every)
    for step in range(life.student.total_steps):
        if step >= first_needed and (step - first_needed) % keep_every == 0:
            trajectory.kept[step] = life.point(state)
        state, statistics = taught_step(life, applied, state, step)
        trajectory.features.append(applied.features)
        if not math.isfinite(statistics.nll):
            raise FloatingPointError(f"the student diverged at step {step}")
        on_step("forward", step)
    # The last update has no following loss to show that it went wrong.
    if not bool(state[0].isfinite().all()):
        raise FloatingPointError(f"the student diverged at step {life.student.total_steps - 1}")
    return state, trajectory


def recompute(
    life: Life,
    trajectory: Trajectory,
    coefficients_of: Callable[[Tensor], Coefficients],
    loss: LossSpec,
    start: int,
    stop: int,
) -> list[Point]:
    """Return the points of steps ``start`` .. ``stop - 1`` from the kept point ``start``."""
    points = [trajectory.kept[start]]
    if stop - start == 1:
        return points
    life.restore(points[0])
    for step in range(start, stop - 1):
        with torch.no_grad():
            phi = coefficients_of(trajectory.features[step])

        def loss_of(
            log_probs: Tensor, targets: Tensor, phi: Coefficients = phi, step: int = step
        ) -> Tensor:
            return step_loss(loss, log_probs, targets, phi, step)

        state, _ = life.step(points[-1].state, step, loss_of)
        points.append(life.point(state))
    return points


def step_vjp(
    life: Life, teacher: nn.Module, loss: LossSpec, point: Point, features: Tensor,
    step: int, cotangent: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Pull ``cotangent`` [R, P] of step ``step``'s result back to its start (Algorithm 1, line 4).

    The optimiser's part is differentiated by itself, around the gradient as a leaf; the student's
    part is then one Hessian-vector product with the cotangent of that gradient.

    Returns the cotangent of the step's start [R, P] and the contribution to d theta, one tensor
    per teacher parameter, None where the step's loss does not depend on it.
    """
    life.restore(point)
    theta = list(teacher.parameters())
    with torch.enable_grad(), twice_differentiable(life.student.module):
        log_probs, targets = life.outputs(step)
        value = step_loss(loss, log_probs, targets, teacher(features), step).mean()
        gradients = life.gradients(value, create_graph=True)

        state = point.state.detach().requires_grad_()
        gradient = life.flat.gather(gradients).detach().requires_grad_()
        rate = life.student.learning_rate(step)
        after = life.student.optimiser.update(state, gradient, step, rate)
        d_state, d_gradient = torch.autograd.grad(after, (state, gradient), cotangent)

        pairs = [
            (g, d)
            for g, d in zip(gradients, life.flat.split(d_gradient), strict=True)
            if g is not None and g.requires_grad
        ]
        count = len(life.flat.parameters)
        second = torch.autograd.grad(
            [g for g, _ in pairs],
            [*life.flat.parameters, *theta],
            [d for _, d in pairs],
            allow_unused=True,
        )
    d_state[0] += life.flat.gather(second[:count])
    return d_state, list(second[count:])


_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Return the bytes that ``text`` such as ``512MiB`` means.

    Raises:
        UserError: if it is no size.
    """
    compact = str(text).replace(" ", "").upper()
    digits = compact.rstrip("KMGTIB")
    try:
        size = float(digits) * _UNITS[compact[len(digits):]]
    except (KeyError, ValueError):
        raise UserError(f"memory={text!r} is no size; write it like 512MiB or 2GiB") from None
    if not 0 < size < math.inf:
        raise UserError(f"memory={text!r} must be above zero; write it like 512MiB or 2GiB")
    return int(size)


def plan_keep_every(steps: int, bytes_per_point: int, budget: int) -> int:
    """Return the smallest k for which keeping every k-th of ``steps`` points fits ``budget``.

    Keeping every k-th point holds ceil(steps/k) of them, and recomputing a segment another k - 1;
    each replayed step costs one more forward training step.

    Raises:
        UserError: if no k fits, naming the smallest budget that does.
    """
    if steps <= 0:
        return 1

    def needed(k: int) -> int:
        return (math.ceil(steps / k) + k - 1) * bytes_per_point

    for k in range(1, steps + 1):
        if needed(k) <= budget:
            return k
    least = min(needed(k) for k in range(1, steps + 1))
    raise UserError(
        f"training.memory: {budget / 2**20:.3g} MiB cannot hold the trajectory of {steps} steps; "
        f"the smallest budget that can is {math.ceil(least / 2**20)}MiB"
    )


def trajectory_point_bytes(life: Life, state: Tensor) -> int:
    """Return the bytes that one kept point takes."""
    tensors = [state, *life.buffers]
    return sum(t.numel() * t.element_size() for t in tensors)
