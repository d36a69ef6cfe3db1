"""Ways to differentiate: from an episode and a teacher to the hypergradient d M-tilde / d theta.

Each is a generator ``(episode, teacher, on_step)`` under a name in :data:`DIFFERENTIATIONS`. It
yields an :class:`Outcome` wherever theta may be updated: ``exact``, ``antithetic-es`` and
``mixed`` once, at the end of the student's life; ``windows`` and ``persistent-es`` every
``training.window`` steps within it. The last outcome's measures are those of the student's end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from l2t_core.hypergradients.diagnostics import Beside, Watch, WayBack
from l2t_core.hypergradients.engine import Episode
from l2t_core.hypergradients.readout import Readout, smoothed_measure, smoothed_value
from l2t_core.hypergradients.unroll import OnStep, StepBack, Trajectory, run_forward, walk_back
from l2t_core.registry import Registry
from l2t_core.specs import LEARNED_RULES
from l2t_core.students.flat import as_vector, overwrite
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import Teacher


@dataclass
class Outcome:
    """What a life, or a window of it, yields.

    ``estimates`` are estimates [D] of d M-tilde / d theta, theta as one vector, to ascend: one,
    or two of different kinds. ``smoothed`` and ``true`` are the dev measures; ``true`` is None
    within a life. ``features`` are the s_t that phi was computed from. ``judges``: it tells of the
    update that was made before this window was lived again, and calls for none. ``failure`` says
    why there is nothing else.
    """

    estimates: list[Tensor] = field(default_factory=list)
    smoothed: float = float("nan")
    true: float | None = None
    features: list[Tensor] = field(default_factory=list)
    way_back: WayBack = field(default_factory=WayBack)
    judges: bool = False
    failure: str = ""

    @property
    def lived(self) -> bool:
        """Whether there are measures: one that is lost for its hypergradient has lived."""
        return math.isfinite(self.smoothed + (self.true or 0.0))

    def to(self, device: torch.device | str) -> Outcome:
        """Return the outcome with its tensors on ``device``."""
        return replace(
            self, estimates=[e.to(device) for e in self.estimates],
            features=[f.to(device) for f in self.features],
        )


Differentiation = Callable[[Episode, Teacher, OnStep], Iterator[Outcome]]
DIFFERENTIATIONS: Registry[Differentiation] = Registry("way to differentiate")


def true_measure(episode: Episode, teacher: Teacher, on_step: OnStep) -> float:
    """Return the true dev measure of a student taught by ``teacher``, without any derivative.

    Raises:
        FloatingPointError: if the student diverges.
    """
    life = episode.life
    start = life.begin(episode.student_seed)
    spare = life.flat.empty(2, len(start))
    run_forward(life, episode.follow(teacher), start, None, on_step, spare=spare)
    return life.student.true_measure()


def exact(episode: Episode, teacher: Teacher, on_step: OnStep) -> Outcome:
    """Reverse-mode hypergradient: the chain of the steps' VJPs (Algorithm 1, lines 2-4).

    Exact at the settings' defaults, to the same bits for any budget: recomputed and spilled
    states are the kept ones. Batch-norm buffers are replayed but not differentiated.
    """
    engine, life = episode.engine, episode.life
    readout = Readout(life, engine.spec, episode.measure_seed, engine.first)
    trajectory = engine.trajectory()
    final = run_forward(  # which lets go of the start: no name holds it here
        life, episode.follow(teacher), life.begin(episode.student_seed), trajectory, on_step,
        readout.observe,
    )
    true = life.student.true_measure()
    cotangent = readout.final_cotangent(final)
    gradient, way_back = _back(episode, teacher, trajectory, cotangent, on_step, readout)
    return Outcome([gradient], readout.smoothed, true, _taught(trajectory), way_back)


def _taught(trajectory: Trajectory) -> list[Tensor]:
    """Return the s_t of the steps that are differentiated."""
    return list(trajectory.features[trajectory.first :])


def _back(
    episode: Episode, teacher: Teacher, trajectory: Trajectory, cotangent: Tensor,
    on_step: OnStep, readout: Readout | None = None,
) -> tuple[Tensor, WayBack]:
    """Walk ``trajectory`` back from ``cotangent``; return d theta [D] and what was seen.

    ``cotangent`` is that of the end; ``readout`` has it if M-tilde is read elsewhere, too. Norms
    are told, and capped, by that of all readings; where the end has none, by that of the latest
    reading that has one.
    """
    engine, spec = episode.engine, episode.engine.spec
    readings = readout.readings if readout else 1
    watch = Watch(episode.life, readings * float(cotangent[0].norm()), trajectory.steps)
    beside = None
    if engine.second.approximate and engine.comparable:
        beside = Beside(engine, teacher, trajectory, cotangent)

    def depart(step: int, state: Tensor, gradient: Tensor | None) -> None:
        if readout:
            readout.depart(step)
        if beside:
            beside.depart(step, state, gradient)

    def arrive_and_cap(step: int, cotangent: Tensor) -> None:
        if readout:
            readout.arrive(step, cotangent)
        if watch.last == 0.0:
            watch.last = (len(readout.steps) if readout else 1) * float(cotangent[0].norm())
        elif spec.cotangent_cap:
            most, norm = spec.cotangent_cap * watch.last, float(cotangent[0].norm())
            if norm > most:
                cotangent *= most / norm

    def arrive_both(step: int, cotangent: Tensor) -> None:
        arrive_and_cap(step, cotangent)
        if beside and beside.cotangent is not None:
            beside.cotangent *= spec.discount
            beside.remembered *= spec.discount
            arrive_and_cap(step, beside.cotangent)

    def see(back: StepBack, cotangent: Tensor) -> None:
        watch.step(back, cotangent)
        if beside:
            beside.step(back)

    gradient = walk_back(
        episode.life, teacher, engine.loss, engine.second, trajectory, cotangent,
        discount=spec.discount, on_step=on_step, depart=depart, arrive=arrive_both, watch=see,
    )
    seen = watch.result()
    if beside:
        seen.hvp_error, seen.tail_error = beside.hvp_error, beside.tail_error()
    return as_vector(gradient, gradient), seen


@DIFFERENTIATIONS.register("exact")
def _exact(episode: Episode, teacher: Teacher, on_step: OnStep) -> Iterator[Outcome]:
    yield exact(episode, teacher, on_step)


def spans(first: int, total: int, window: int) -> list[range]:
    """Return windows of ``window`` steps from ``first`` to ``total``; a short one comes first."""
    stops = list(range(total, first, -window))[::-1]
    return [range(a, b) for a, b in zip([first, *stops], stops, strict=False)]


@DIFFERENTIATIONS.register("windows")
def windows(episode: Episode, teacher: Teacher, on_step: OnStep) -> Iterator[Outcome]:
    """Truncated hypergradients of the windows of one life, theta updated after each.

    Each is exact for M-tilde at the window's end as a function of theta within the window. Cheap,
    and biased towards what pays at once. For a rule of update that learns, each window is lived
    twice from where it begins, once to update theta and once under the theta that came of it, as
    in L2T-DLN (Hai et al. 2023): the student goes on from the second, whose hypergradient judges
    the update.
    """
    engine, life = episode.engine, episode.life
    total = life.student.total_steps
    applied = episode.follow(teacher)
    state = life.begin(episode.student_seed)
    state = run_forward(life, applied, state, None, on_step, span=range(engine.first))
    twice = engine.spec.update_rule in LEARNED_RULES
    for number, span in enumerate(spans(engine.first, total, engine.spec.window)):
        sample = (episode.measure_seed * 1_009 + number) % 2**63  # of dev: another each window
        if twice:
            before, buffers = state.clone(), life.buffers.copy()
            rehearsal, _ = _window(episode, applied.fork(), state, span, sample, on_step)
            yield rehearsal
            life.buffers.load(buffers)
            state = before
        outcome, state = _window(episode, applied, state, span, sample, on_step)
        outcome.judges = twice
        if span.stop == total:
            outcome.true = life.student.true_measure()
        yield outcome


def _window(
    episode: Episode, applied: AppliedTeacher, state: Tensor, span: range, sample: int,
    on_step: OnStep,
) -> tuple[Outcome, Tensor]:
    """Live the steps of ``span`` from ``state``, and walk them back; return what came, true aside.

    With it the state after them, which the module shows, with its buffers. ``sample`` draws the
    dev examples of M-tilde.
    """
    life, trajectory = episode.life, episode.engine.trajectory(span.start, len(span))
    state = run_forward(life, applied, state, trajectory, on_step, span=span)
    after, buffers = state.clone(), life.buffers.copy()
    smoothed, d_omega = smoothed_measure(life, sample)
    cotangent = torch.zeros_like(state)
    cotangent[0] = d_omega
    gradient, way_back = _back(episode, applied.teacher, trajectory, cotangent, on_step)
    life.show(after[0])
    life.buffers.load(buffers)
    return Outcome([gradient], smoothed, None, _taught(trajectory), way_back), after


def _noise(episode: Episode, teacher: Teacher, draw: int = 0) -> Tensor:
    """Return normal noise [D] of deviation ``training.perturbation``, by the episode's seed."""
    theta = parameters_to_vector(teacher.parameters())
    # Drawn on the CPU: the same on every device.
    generator = torch.Generator().manual_seed((episode.noise_seed * 1_000_003 + draw) % 2**63)
    noise = torch.randn(theta.numel(), generator=generator, dtype=theta.dtype)
    return (episode.engine.spec.perturbation * noise).to(theta.device)


@contextmanager
def _moved(teacher: Teacher, by: Tensor) -> Iterator[None]:
    """Move theta by ``by`` [D] for the while."""
    parameters = list(teacher.parameters())
    theta = parameters_to_vector(parameters).detach()
    try:
        overwrite(parameters, theta + by)
        yield
    finally:
        overwrite(parameters, theta)


def _evolutionary(episode: Episode, plus: float, minus: float, noise: Tensor) -> Tensor:
    """Return (M+ - M-) / (2 sigma^2) noise [D], the antithetic estimate of the gradient."""
    return (plus - minus) / (2.0 * episode.engine.spec.perturbation**2) * noise


@DIFFERENTIATIONS.register("antithetic-es")
def antithetic_es(episode: Episode, teacher: Teacher, on_step: OnStep) -> Iterator[Outcome]:
    """Antithetic evolution strategies: two lives of one student under theta + and - noise.

    Estimates the gradient of M-tilde's mean over theta's neighbourhood, without derivatives of
    the student. The measures are the means of both.
    """
    life, spec = episode.life, episode.engine.spec
    noise = _noise(episode, teacher)
    smoothed, true, features = [], [], []
    for sign in (1.0, -1.0):
        readout = Readout(life, spec, episode.measure_seed)
        twin = _Twin(episode, teacher, life.begin(episode.student_seed))
        with _moved(teacher, sign * noise):
            twin.live(episode, range(life.student.total_steps), on_step, readout)
        smoothed.append(readout.smoothed)
        true.append(life.student.true_measure())
        features += twin.features
    estimate = _evolutionary(episode, smoothed[0], smoothed[1], noise)
    yield Outcome([estimate], sum(smoothed) / 2, sum(true) / 2, features)


@DIFFERENTIATIONS.register("mixed")
def mixed(episode: Episode, teacher: Teacher, on_step: OnStep) -> Iterator[Outcome]:
    """Exact and evolutionary estimates of the same gradient, to be mixed by their variances.

    Both are estimates of the gradient of M-tilde's mean over theta's neighbourhood, from the same
    two lives (Metz et al. 2019, section 3): the exact one is taken at theta + and - noise.
    """
    noise = _noise(episode, teacher)
    lives = []
    for sign in (1.0, -1.0):
        with _moved(teacher, sign * noise):
            lives.append(exact(episode, teacher, on_step))
    plus, minus = lives
    estimates = [
        (plus.estimates[0] + minus.estimates[0]) / 2,
        _evolutionary(episode, plus.smoothed, minus.smoothed, noise),
    ]
    assert plus.true is not None and minus.true is not None
    yield Outcome(
        estimates, (plus.smoothed + minus.smoothed) / 2, (plus.true + minus.true) / 2,
        plus.features + minus.features,
        max((plus.way_back, minus.way_back), key=lambda w: w.largest),
    )


@DIFFERENTIATIONS.register("persistent-es")
def persistent_es(episode: Episode, teacher: Teacher, on_step: OnStep) -> Iterator[Outcome]:
    """Persistent evolution strategies (Vicol et al. 2021, Algorithm 2), theta updated by window.

    Two lives of one student go on side by side under theta + and - fresh noise in each window;
    the estimate multiplies the difference of their M-tilde at the window's end by all the noise
    that they have seen, so that it is not biased towards what pays at once.
    """
    life, engine = episode.life, episode.engine
    total = life.student.total_steps
    start = life.begin(episode.student_seed)
    pair = [_Twin(episode, teacher, start) for _ in range(2)]
    for twin in pair:
        twin.live(episode, range(engine.first), on_step)
    seen = torch.zeros_like(parameters_to_vector(teacher.parameters()).detach())
    for number, span in enumerate(spans(engine.first, total, engine.spec.window)):
        noise = _noise(episode, teacher, number)
        smoothed, true = [], []
        for twin, sign in zip(pair, (1.0, -1.0), strict=True):
            with _moved(teacher, sign * noise):
                twin.live(episode, span, on_step)
            smoothed.append(smoothed_value(life, episode.measure_seed))
            if span.stop == total:
                true.append(life.student.true_measure())
        seen += noise
        features = [f for twin in pair for f in twin.features]
        yield Outcome(
            [_evolutionary(episode, smoothed[0], smoothed[1], seen)], sum(smoothed) / 2,
            sum(true) / 2 if true else None, features,
        )


class _Twin:
    """One of the lives that take turns in one module, begun with ``start`` and its buffers."""

    def __init__(self, episode: Episode, teacher: Teacher, start: Tensor) -> None:
        self.applied = episode.follow(teacher)
        self.state, self.buffers = start, episode.life.buffers.copy()
        self.spare = episode.life.flat.empty(2, len(start))
        self.features: list[Tensor] = []  # of the taught steps that the last call made

    def live(
        self, episode: Episode, span: range, on_step: OnStep, readout: Readout | None = None
    ) -> None:
        """Make the steps of ``span``."""
        life, first = episode.life, max(span.start, episode.engine.first)
        life.show(self.state[0])
        life.buffers.load(self.buffers)
        self.features = []

        def note(step: int, state: Tensor) -> None:
            if step > first:  # the s_t of the step just made
                self.features.append(self.applied.features)
            if readout is not None:
                readout.observe(step, state)

        self.state = run_forward(
            life, self.applied, self.state, None, on_step, note, span=span, spare=self.spare
        )
        self.buffers = life.buffers.copy()
