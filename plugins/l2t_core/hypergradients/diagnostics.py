"""What an episode tells about its own hypergradient: growth back in time, curvature, spread."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l2t_core.hypergradients.engine import Engine
from l2t_core.hypergradients.second_derivatives import Exact
from l2t_core.hypergradients.unroll import StepBack, Trajectory, step_vjp
from l2t_core.students.flat import as_vector
from l2t_core.students.life import Life
from l2t_core.teachers.architectures import Teacher

# Steps at which the norms are taken: often enough for a curve, seldom enough to cost nothing.
_SAMPLES = 32


@dataclass
class WayBack:
    """Norms along the reverse pass.

    ``growth`` is ||d omega|| at the first differentiated step over that at the last, ``largest``
    the largest on the way over that at the last; ``norms`` lists (step, ||d omega_t||).
    ``sharpness`` is the largest |v H v| / (v v) * eta met: above 2 (1 + momentum) a constant rate
    is beyond the edge of stability. Of approximate second derivatives (:class:`Beside`),
    ``hvp_error`` is the error of H v at the last step, ``tail_error`` that of the last steps'
    hypergradient.
    """

    growth: float = 0.0
    largest: float = 0.0
    sharpness: float = 0.0
    hvp_error: float | None = None
    tail_error: float | None = None
    norms: list[tuple[int, float]] = field(default_factory=list)


class Watch:
    """Samples norms and curvature at some of ``steps`` reverse steps.

    ``last`` is ||d omega|| at the last of them, or at the latest that has one.
    """

    def __init__(self, life: Life, last: float, steps: int) -> None:
        self.life, self.last = life, last
        self.every = max(1, steps // _SAMPLES)
        self.left = steps
        self.found = WayBack()

    def step(self, back: StepBack, cotangent: Tensor) -> None:
        """Take note of one step back; ``cotangent`` is that of its start."""
        self.left -= 1
        if self.left % self.every:
            return
        norm = float(cotangent[0].norm())
        self.found.norms.append((back.step, norm))
        pieces = self.life.flat.split(back.direction)
        along = sum(
            float(torch.dot(h.reshape(-1), v.reshape(-1)))
            for h, v in zip(back.curved, pieces, strict=True) if h is not None
        )
        squared = float(torch.dot(back.direction, back.direction))
        if squared > 0.0 and math.isfinite(along):
            sharpness = abs(along) / squared * back.rate
            self.found.sharpness = max(self.found.sharpness, sharpness)

    def result(self) -> WayBack:
        """Return what was found once the way back is over."""
        if self.found.norms and self.last > 0.0:
            self.found.growth = self.found.norms[-1][1] / self.last
            self.found.largest = max(n for _, n in self.found.norms) / self.last
        return self.found


class Beside:
    """Walks the last steps back by exact second derivatives, too, beside approximate ones.

    H v of a ReLU net may be off by more than its norm, where inputs change their sign, and the
    hypergradient of a few steps hardly: both are told, for what is noise in one step may grow over
    hundreds. One step in ``every`` is compared, so that this stays cheap, one at least and eight at
    most.
    """

    every = 50

    def __init__(
        self, engine: Engine, teacher: Teacher, trajectory: Trajectory, cotangent: Tensor
    ) -> None:
        self.life, self.teacher, self.trajectory = engine.life, teacher, trajectory
        self.second = Exact(engine.life, engine.loss, trace=False)
        self.cotangent: Tensor | None = cotangent.clone()
        self.compared = self.left = min(8, -(-trajectory.steps // self.every))
        size = sum(p.numel() for p in teacher.parameters())
        self.remembered = next(teacher.parameters()).new_zeros(teacher.memory)
        self.exact = cotangent.new_zeros(size)
        self.found = cotangent.new_zeros(size)
        self.curved: Tensor | None = None  # H v of the first step
        self.hvp_error: float | None = None

    def depart(self, step: int, state: Tensor, gradient: Tensor | None) -> None:
        """Walk ``step`` back from what :func:`l2t_core.hypergradients.unroll.walk_back` shows."""
        if self.cotangent is None:
            return
        buffers = self.life.buffers.copy()
        back = step_vjp(
            self.life, self.teacher, self.second, state, gradient,
            self.trajectory.features[step], step, self.cotangent, self.remembered,
        )
        self.life.buffers.load(buffers)
        if self.left == self.compared:
            self.curved = self.life.flat.gather(back.curved)
        self._add(self.exact, back)

    def step(self, back: StepBack) -> None:
        """Take note of the same step by approximate derivatives."""
        if self.curved is not None:
            off = self.life.flat.gather(back.curved).sub_(self.curved)
            self.hvp_error = _relative(off, self.curved)
            self.curved = None
        if self.cotangent is not None:
            self._add(self.found, back)
            self.left -= 1
            if not self.left:
                self.cotangent = None

    def _add(self, total: Tensor, back: StepBack) -> None:
        total += as_vector(back.d_theta, list(self.teacher.parameters()))

    def tail_error(self) -> float | None:
        """Return how far d theta of these steps is off, over its norm; None if that is zero."""
        return _relative(self.found - self.exact, self.exact)


def _relative(off: Tensor, exact: Tensor) -> float | None:
    norm = float(exact.norm())
    return float(off.norm()) / norm if norm > 0.0 else None


def finite(value: float) -> float | None:
    """Return ``value``, or None where it is no number: JSON has no name for it."""
    return value if math.isfinite(value) else None


def mean(values: list[float]) -> float | None:
    """Return the mean, None of nothing or where it is not finite."""
    return finite(sum(values) / len(values)) if values else None


def largest(values: list[float]) -> float | None:
    """Return the largest, None of nothing or where it is not finite."""
    return finite(max(values)) if values else None
