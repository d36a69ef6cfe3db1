"""A student's life under a teacher, there and back: the forward run and the reverse pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l2t_core.hypergradients.checkpointing import Recompute, Release, first_kept, way_back
from l2t_core.hypergradients.second_derivatives import SecondDerivatives
from l2t_core.hypergradients.trajectory import Slots
from l2t_core.losses.taught import step_loss
from l2t_core.specs import LossSpec
from l2t_core.students.flat import aligned
from l2t_core.students.life import Life, training_steps
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import Teacher

OnStep = Callable[[str, int], None]  # ("forward" or "reverse", step)


@dataclass
class Trajectory:
    """What the reverse pass needs of a forward run: kept states, buffers, every step's s_t and m_t.

    ``steps`` steps from step ``first`` on are differentiated; ``slots`` counts them from 0.
    """

    first: int
    steps: int
    slots: Slots
    keeps_gradient: bool
    buffers: dict[int, list[Tensor]] = field(default_factory=dict)
    has_gradient: set[int] = field(default_factory=set)
    # [T, F + M], by step
    features: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def record_features(self, step: int, features: Tensor) -> None:
        """Keep s_t and m_t [F + M] of ``step``."""
        # One block for all: a tensor for each step would lie between the steps' big blocks, which
        # the C library then cannot join again, and memory would grow with T. Its rows are aligned:
        # phi made of one again has the bits that it had on the way there.
        if not len(self.features):
            self.features = aligned((self.first + self.steps, len(features)), features)
        self.features[step] = features

    @property
    def held(self) -> int:
        """How many states are held at a time."""
        return min(self.steps, self.slots.plan.slots)

    def kept_first(self) -> set[int]:
        """Return the steps whose states the forward run keeps."""
        kept = first_kept(self.steps, self.held) if self.steps else []
        return {self.first + i for i in kept}

    def place(self, step: int, kept: bool) -> Tensor:
        """Return [R, P] to write the state before ``step`` into."""
        if not kept:
            return self.slots.passing(step - self.first)
        return self.slots.claim(step - self.first)[: self.slots.state_rows]

    def state(self, step: int) -> Tensor:
        """Return the kept state [R, P] before ``step``."""
        return self.slots.fetch(step - self.first)[: self.slots.state_rows]

    def gradient(self, step: int) -> Tensor | None:
        """Return the kept gradient [P] of ``step``, None if it is not kept."""
        if step not in self.has_gradient:
            return None
        return self.slots.fetch(step - self.first)[-1]

    def place_of_gradient(self, step: int) -> Tensor | None:
        """Return [P] to write the gradient of kept ``step`` into, None if it is not wanted."""
        if not self.keeps_gradient:
            return None
        self.has_gradient.add(step)
        # A state that is being spilled is still in the scratch that it was written to.
        return self.slots.being_written(step - self.first)[-1]

    def release(self, step: int) -> None:
        """Forget the state before ``step``."""
        self.slots.release(step - self.first)
        self.has_gradient.discard(step)
        del self.buffers[step]


def run_forward(
    life: Life,
    applied: AppliedTeacher,
    state: Tensor,
    trajectory: Trajectory | None,
    on_step: OnStep,
    observe: Callable[[int, Tensor], None] = lambda step, state: None,
    *,
    span: range | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    """Make a student's T training steps, or those of ``span``; return the state after them.

    What ``trajectory`` plans is kept; without one, ``spare`` [2, R, P] may take the states.
    ``observe`` sees every state [R, P] with the step before which it stands. Raises
    FloatingPointError where the student's parameters stop being finite.
    """
    span = range(life.student.total_steps) if span is None else span
    kept = trajectory.kept_first() if trajectory is not None else set()
    if trajectory is not None and span.start in kept:
        state = trajectory.place(span.start, True).copy_(state)
    life.show(state[0])

    def places(step: int) -> tuple[Tensor | None, Tensor | None]:
        if trajectory is None:
            return None if spare is None else spare[step % 2], None
        out = trajectory.place(step + 1, step + 1 in kept)
        if step not in kept:
            return out, None
        trajectory.buffers[step] = life.buffers.copy()
        return out, trajectory.place_of_gradient(step)

    observe(span.start, state)
    for step, state, _ in training_steps(life, applied, state, span, places):  # noqa: B020
        if trajectory is not None:
            trajectory.record_features(step, applied.features)
            if step in kept:
                trajectory.slots.seal(step - trajectory.first)
        on_step("forward", step)
        observe(step + 1, state)
    return state


def recompute(
    life: Life, trajectory: Trajectory, teacher: Teacher, loss: LossSpec,
    start: int, stop: int, *, keep: bool,
) -> Tensor:
    """Make the steps from kept state ``start`` to before ``stop`` again; return that state.

    It is kept, with the module's buffers, if ``keep``. The bits are those of the forward run.
    """
    state = trajectory.state(start)
    life.show(state[0])
    life.buffers.load(trajectory.buffers[start])
    for step in range(start, stop):
        with torch.no_grad():
            phi = teacher(trajectory.features[step])

        def loss_of(
            log_probs: Tensor, targets: Tensor, phi: dict[str, Tensor] = phi, step: int = step
        ) -> Tensor:
            return step_loss(loss, log_probs, targets, phi, step)

        out = trajectory.place(step + 1, keep and step + 1 == stop)
        gradient_out = trajectory.place_of_gradient(step) if step == start else None
        state, _, _ = life.step(state, step, loss_of, out, gradient_out)
    if keep and stop > start:
        trajectory.buffers[stop] = life.buffers.copy()
    return state


@dataclass(frozen=True)
class StepBack:
    """What one step back is about: v [P], H v, the step's rate, and what it gives to d theta.

    ``d_theta`` has one tensor per teacher parameter, None where the step's loss does not depend
    on it.
    """

    step: int
    direction: Tensor
    curved: list[Tensor | None]
    rate: float
    d_theta: list[Tensor | None]


def step_vjp(
    life: Life, teacher: Teacher, second: SecondDerivatives, state: Tensor,
    gradient: Tensor | None, features: Tensor, step: int, cotangent: Tensor, remembered: Tensor,
) -> StepBack:
    """Pull ``cotangent`` [R, P] of step ``step``'s result back to its start, in place.

    Likewise ``remembered`` [M], that of m_{t+1}. Algorithm 1, line 4. The module must
    show ``state`` and hold its buffers; ``gradient`` [P] is the step's, if known.
    """
    theta = list(teacher.parameters())
    rate = life.student.learning_rate(step)
    # In float16 a direction is asked for again where the first scale was too large.
    before = cotangent.clone() if life.half else cotangent
    pulled: list[Tensor] = []

    def direction(get_gradient: Callable[[], Tensor]) -> Tensor:
        optimiser, known = life.student.optimiser, gradient
        if known is None and optimiser.needs_gradient:
            known = get_gradient()
        with torch.no_grad():
            if pulled:
                cotangent.copy_(before)
            pulled.append(optimiser.pull_back(state, known, cotangent, step, rate))
        return pulled[-1]

    with torch.enable_grad():
        features = features.detach().requires_grad_(teacher.memory > 0)
        phi = teacher(features)
    curved, d_phi = second.at(step, phi, direction, gradient)
    if life.processes.world > 1:
        curved, d_phi = _over_processes(life, curved, d_phi)
    with torch.no_grad():
        life.flat.add(cotangent[0], curved)
    pairs = [(p, d) for p, d in zip(phi.values(), d_phi, strict=True) if d is not None]
    if teacher.memory:
        with torch.enable_grad():
            pairs.append((teacher.remember(features), remembered))
    d_theta, d_features = _to_theta(pairs, theta, features)
    if teacher.memory:
        remembered.copy_(d_features[-teacher.memory :])
    return StepBack(step, pulled[-1], curved, rate, d_theta)


def _to_theta(
    pairs: list[tuple[Tensor, Tensor]], theta: Sequence[Tensor], features: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """Pull what a teacher gave, each with its cotangent, back to theta and its ``features``."""
    pairs = [(p, d) for p, d in pairs if p.requires_grad]  # a teacher may write a constant
    inputs = [*theta, features] if features.requires_grad else theta
    found: list[Tensor | None] = [None] * len(inputs)
    if pairs:
        outputs, directions = [p for p, _ in pairs], [d for _, d in pairs]
        found = list(torch.autograd.grad(outputs, inputs, directions, allow_unused=True))
    of_features = found[-1] if features.requires_grad else None
    return found[: len(theta)], torch.zeros_like(features) if of_features is None else of_features


def _over_processes(
    life: Life, curved: list[Tensor | None], d_phi: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Make means over this process's examples means over the step's, in one exchange."""
    parts = [d for d in d_phi if d is not None]
    flat = torch.cat([life.flat.gather(curved), *(d.reshape(-1) for d in parts)])
    life.over_processes(flat)
    after = flat[life.flat.size :].split([d.numel() for d in parts])
    whole = iter([a.view_as(d) for a, d in zip(after, parts, strict=True)])
    pieces: list[Tensor | None] = list(life.flat.split(flat[: life.flat.size]))
    return pieces, [None if d is None else next(whole) for d in d_phi]


def walk_back(
    life: Life, teacher: Teacher, loss: LossSpec, second: SecondDerivatives,
    trajectory: Trajectory, cotangent: Tensor,
    *, discount: float, on_step: OnStep,
    depart: Callable[[int, Tensor, Tensor | None], None], arrive: Callable[[int, Tensor], None],
    watch: Callable[[StepBack, Tensor], None],
) -> list[Tensor]:
    """Walk the trajectory back from ``cotangent`` [R, P] of the final state, changed in place.

    ``depart(step, state, gradient)`` is called when the module shows ``step``'s ``state`` [R, P],
    before the step is walked back, with its gradient [P] if that is known; ``arrive(step,
    cotangent)`` may add to the cotangent of the state before ``step``, once the module shows it;
    ``watch`` sees each step made. Returns d theta, one tensor per teacher parameter.
    """
    total = [torch.zeros_like(p) for p in teacher.parameters()]
    remembered = total[0].new_zeros(teacher.memory)
    first = trajectory.first
    for action in way_back(trajectory.steps, trajectory.held):
        if isinstance(action, Release):
            trajectory.release(first + action.start)
            continue
        if isinstance(action, Recompute):
            start, stop = first + action.start, first + action.stop
            recompute(life, trajectory, teacher, loss, start, stop, keep=True)
            continue
        step, kept = first + action.step, first + action.kept
        state = recompute(life, trajectory, teacher, loss, kept, step, keep=False)
        gradient = trajectory.gradient(step) if step == kept else None
        depart(step, state, gradient)
        back = step_vjp(
            life, teacher, second, state, gradient, trajectory.features[step], step, cotangent,
            remembered,
        )
        for sum_, part in zip(total, back.d_theta, strict=True):
            if part is not None:
                sum_ += part
        watch(back, cotangent)
        del back  # two vectors of omega's size, which the next step would find in its way
        if discount != 1.0:
            cotangent *= discount
            remembered *= discount
        arrive(step, cotangent)
        on_step("reverse", step)
    return total
