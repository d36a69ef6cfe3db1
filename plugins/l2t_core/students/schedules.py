"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from l2t_core.registry import Registry
from l2t_core.specs import ScheduleSpec

# Each takes (steps since warm-up, steps after warm-up in all, warm-up steps) and returns the
# fraction of the peak rate.
SCHEDULES: Registry[Callable[[int, int, int], float]] = Registry("schedule")


@SCHEDULES.register("constant")
def _constant(step: int, total: int, warmup: int) -> float:
    return 1.0


@SCHEDULES.register("linear")
def _linear(step: int, total: int, warmup: int) -> float:
    return max(0.0, 1.0 - step / max(1, total))


@SCHEDULES.register("cosine")
def _cosine(step: int, total: int, warmup: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, total))))


@SCHEDULES.register("inverse_sqrt")
def _inverse_sqrt(step: int, total: int, warmup: int) -> float:
    start = max(1, warmup)
    return math.sqrt(start / (start + step))


def learning_rate(spec: ScheduleSpec, peak: float, step: int, total_steps: int) -> float:
    """Return the rate eta_t of 0-based ``step`` out of ``total_steps``.

    The rate climbs linearly over ``spec.warmup_steps`` (its first step already has a rate above
    zero) and then follows the schedule.

    Raises:
        UserError: if the schedule is unknown.
    """
    shape = SCHEDULES.get(spec.name)
    if step < spec.warmup_steps:
        return peak * (step + 1) / (spec.warmup_steps + 1)
    return peak * shape(step - spec.warmup_steps, total_steps - spec.warmup_steps,
                        spec.warmup_steps)
