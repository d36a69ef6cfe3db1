"""Where along a student's life its smoothed measure M-tilde is read.

At the end, in the paper. A jagged end can be smoothed: read at the mean of the last states, or
averaged over several points of the life.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2t_core.hypergradients.double_backward import twice_differentiable
from l2t_core.specs import TrainingSpec
from l2t_core.students.life import Life


def measure_steps(total_steps: int, points: int) -> list[int]:
    """Return the numbers of steps after which M-tilde is read: T and points before it, evenly."""
    return [round(total_steps * (i + 1) / points) for i in range(points)]


def smoothed_measure(life: Life, measure_seed: int) -> tuple[float, Tensor]:
    """Return M-tilde and d M-tilde / d omega [P] at the module's parameters.

    Its buffers are left as they were, as :func:`smoothed_value` does.
    """
    buffers = life.buffers.copy()
    # One derivative, but in evaluation mode, where cuDNN's recurrent kernels have none at all.
    with twice_differentiable(life.student.module):
        smoothed = life.student.smoothed_measure(measure_seed)
        cotangent = life.flat.gather(life.gradients(smoothed))
    life.buffers.load(buffers)
    return float(smoothed.detach()), cotangent


def smoothed_value(life: Life, measure_seed: int) -> float:
    """Return M-tilde at the module's parameters."""
    buffers = life.buffers.copy()
    with torch.no_grad():
        smoothed = float(life.student.smoothed_measure(measure_seed))
    life.buffers.load(buffers)
    return smoothed


class Readout:
    """Collects M-tilde along one life, and its derivatives if they are wanted.

    M-tilde is the mean over :func:`measure_steps`; the last reading is at the mean of the last
    ``spec.average_last`` states, with the buffers of the last one. With derivatives, what lies
    after ``first``, the first differentiated step, is read on the way back (:meth:`depart`): so
    one vector of omega's size is held, not one for each point. ``first`` None: no derivatives.
    """

    def __init__(
        self, life: Life, spec: TrainingSpec, measure_seed: int, first: int | None = None
    ) -> None:
        self.life, self.seed, self.first = life, measure_seed, first
        self.total = life.student.total_steps
        self.steps = measure_steps(self.total, spec.measure_points)
        self.averaged = min(spec.average_last, self.total)
        self.sum: Tensor | None = None
        self.values: dict[int, float] = {}  # by step
        self.early: Tensor | None = None  # what the state departed from adds to its cotangent
        self.last: Tensor | None = None

    def observe(self, step: int, state: Tensor) -> None:
        """See the state [R, P] before ``step``, which the module shows."""
        if self.averaged > 1 and step > self.total - self.averaged:
            self.sum = state[0].clone() if self.sum is None else self.sum.add_(state[0])
        if step == self.total:
            self._read_last(state)
        elif step in self.steps and (self.first is None or step <= self.first):
            self.values[step] = smoothed_value(self.life, self.seed)

    def _read_last(self, state: Tensor) -> None:
        if self.sum is not None:
            self.life.show(self.sum.div_(self.averaged))
        if self.first is None:
            value = smoothed_value(self.life, self.seed)
        else:
            value, gradient = smoothed_measure(self.life, self.seed)
            self.last = gradient.div_(self.readings)
        self.values[self.total] = value
        self.sum = None
        self.life.show(state[0])

    def depart(self, step: int) -> None:
        """Read M-tilde at the state before ``step``, if it is one; the module shows that state."""
        self.early = None
        if step not in self.steps or self.first is None or step <= self.first:
            return
        self.values[step], gradient = smoothed_measure(self.life, self.seed)
        self.early = gradient.div_(len(self.steps))

    @property
    def smoothed(self) -> float:
        """M-tilde of the life that is over and, with derivatives, walked back."""
        return sum(self.values[step] for step in self.steps) / len(self.steps)

    @property
    def readings(self) -> int:
        """How many states M-tilde is read from."""
        return self.averaged * len(self.steps)

    def final_cotangent(self, like: Tensor) -> Tensor:
        """Return d M-tilde / d state_T [R, P]."""
        assert self.last is not None
        cotangent = torch.zeros_like(like)
        cotangent[0] = self.last
        if self.averaged == 1:
            self.last = None  # no earlier state needs it
        return cotangent

    def arrive(self, step: int, cotangent: Tensor) -> None:
        """Add to ``cotangent`` [R, P] what was read at the state before ``step``, in place.

        :meth:`depart` has seen that state last.
        """
        if step > self.total - self.averaged and self.last is not None:
            cotangent[0] += self.last
        if self.early is not None:
            cotangent[0] += self.early
