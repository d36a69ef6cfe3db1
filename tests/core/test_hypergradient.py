"""The engine's hypergradient against central finite differences, in float64."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy_students import STUDENTS, ToyStudent, knows_autocast

from l2t_core.hypergradients import second_derivatives
from l2t_core.hypergradients.diagnostics import Beside
from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.lstm import TwiceDifferentiable
from l2t_core.hypergradients.second_derivatives import Exact, OneSidedDifference
from l2t_core.hypergradients.unroll import run_forward, step_vjp
from l2t_core.hypergradients.ways import exact
from l2t_core.losses.forms import FORMS, neutral_coefficients
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.flat import pieces_of
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import build_teacher
from l2t_core.training.update import advice

OPTIMISERS = [
    OptimiserSpec("sgd", 0.3, weight_decay=0.01),
    OptimiserSpec("momentum", 0.2, clip_norm=0.05),
    OptimiserSpec("nesterov", 0.2, weight_decay=0.01),
    OptimiserSpec("adam", 0.05, weight_decay=0.01, eps=1e-3, clip_norm=0.5),
    OptimiserSpec("adamw", 0.05, weight_decay=0.1, eps=1e-3),
]
LOSS = LossSpec("dense", "sigmoid", warmup_steps=1, ce_mix=0.2)


def build(student, loss=LOSS, spec=None, teacher_spec=None, seed=3):
    spec = spec or TrainingSpec()
    names = student.default_features
    teacher_spec = teacher_spec or TeacherSpec(slots=3, init_scale=0.3)
    teacher = build_teacher(teacher_spec, loss, 3, feature_count(names, 3), seed=1).double()
    engine = Engine(Life(student, spec.precision), loss, spec)
    return Episode(engine, names, seed, 0), teacher


def no_step(phase, step):
    pass


def final_state(episode, teacher):
    life = episode.life
    state = life.begin(episode.student_seed)
    trajectory = episode.engine.trajectory()
    return run_forward(life, episode.follow(teacher), state, trajectory, no_step), trajectory


def central_difference(episode, teacher, direction, recorded, h=1e-5):
    """Derivative of M-tilde along ``direction`` with every s_t held at its recorded value."""
    life = episode.life

    def value(sign):
        with torch.no_grad():
            for p, d in zip(teacher.parameters(), direction, strict=True):
                p.add_(sign * h * d)
        applied = episode.follow(teacher)
        # s_t is a constant to the method: no gradient flows through it, so none may here.
        features = applied.state.num_features  # and what is behind them the teacher remembers
        applied.state.features = lambda step, lr: recorded[step][:features]
        state = life.begin(episode.student_seed)
        run_forward(life, applied, state, None, no_step)
        result = float(life.student.smoothed_measure(episode.measure_seed).detach())
        with torch.no_grad():
            for p, d in zip(teacher.parameters(), direction, strict=True):
                p.sub_(sign * h * d)
        return result

    return (value(+1) - value(-1)) / (2 * h)


def check_against_differences(student, change=lambda teacher: teacher, **options):
    episode, teacher = build(student, **options)
    teacher = change(teacher)
    _, trajectory = final_state(episode, teacher)
    # Buffers of batch norm are state without derivative: M-tilde sees the same ones throughout.
    student.frozen_buffers = [b.clone() for b in student.module.buffers()]
    outcome = exact(episode, teacher, no_step)
    generator = torch.Generator().manual_seed(2)
    assert float(outcome.estimates[0].abs().max()) > 1e-7
    for _ in range(2):
        direction = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in teacher.parameters()
        ]
        numeric = central_difference(episode, teacher, direction, trajectory.features)
        found = float(outcome.estimates[0] @ torch.cat([d.reshape(-1) for d in direction]))
        assert found == pytest.approx(numeric, rel=2e-6, abs=1e-10)


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: o.name)
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "transformer", "lstm"])
def test_exact_hypergradient_equals_central_differences(make_student, name, optimiser):
    check_against_differences(make_student(name, optimiser))


@pytest.mark.parametrize("sigma", ["sigmoid", "softplus", "identity"])
@pytest.mark.parametrize("form", FORMS.names())
def test_every_loss_form(make_student, form, sigma):
    student = make_student("mlp", OptimiserSpec("momentum", 0.3))
    check_against_differences(student, loss=LossSpec(form, sigma, rank=2))


@pytest.mark.parametrize("name", ["static", "affine", "lstm"])
def test_other_teachers(make_student, name):
    student = make_student("mlp", OptimiserSpec("adam", 0.05, eps=1e-3))
    check_against_differences(student, teacher_spec=TeacherSpec(name, slots=2, init_scale=0.3))


def lively(teacher):
    """Move a teacher's phi by what it remembers, which it hardly does at the start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        teacher.weight_keys *= 5.0
        for parameter in teacher.cell.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return teacher


def test_what_a_teacher_remembers_is_differentiated_too(make_student):
    """Of what its cell is told of the state before, that is all, and nothing at the first step."""
    spec = TeacherSpec("lstm", slots=3, init_scale=0.5, hidden=4)
    student = make_student("mlp", OptimiserSpec("momentum", 0.3), steps=12)
    check_against_differences(student, lively, teacher_spec=spec)
    episode, teacher = build(student, teacher_spec=spec)
    lively(teacher)

    def found():
        pieces = pieces_of(exact(episode, teacher, no_step).estimates[0], theta.values())
        return dict(zip(theta, pieces, strict=True))["cell.weight_hh"]

    theta = dict(teacher.named_parameters())
    whole = found()
    _, trajectory = final_state(episode, teacher)
    seen = trajectory.features[:, -teacher.memory :]
    assert not bool(seen[: LOSS.warmup_steps + 1].any()) and bool(seen[-1].all())
    remember = teacher.remember
    teacher.remember = lambda f: remember(f).detach() + 0.0 * f[: teacher.memory]
    assert float((whole - found()).norm()) > 0.1 * float(whole.norm())


@pytest.mark.parametrize("memory", [100, 2])
@pytest.mark.parametrize("hvp", ["exact", "finite-difference"])
def test_a_memory_beside_every_plan_and_way(make_student, monkeypatch, hvp, memory):
    """Recomputed states and those of a comparison beside have the kept ones' memory."""
    monkeypatch.setattr(Beside, "every", 1)  # all steps are held against exact ones
    spec = TeacherSpec("lstm", slots=3, init_scale=0.5, hidden=4)

    def found(**options):
        student = make_student("mlp", OptimiserSpec("momentum", 0.3), steps=9)
        training = TrainingSpec(discount=0.5, **options)
        episode, teacher = build(student, teacher_spec=spec, spec=training)
        return exact(episode, lively(teacher), no_step)

    expected = found().estimates[0]
    student = make_student("mlp", OptimiserSpec("momentum", 0.3), steps=9)
    point = build(student)[0].engine.plan.point_bytes
    outcome = found(hvp=hvp, memory=f"{memory * point}B", spill="none")
    torch.testing.assert_close(outcome.estimates[0], expected, rtol=1e-5, atol=1e-9)
    if hvp == "exact":
        assert torch.equal(outcome.estimates[0], expected)
    else:
        assert outcome.way_back.tail_error < 1e-5


class Statistic(torch.nn.Module):
    """A teacher that remembers a mean of what it saw, without a derivative, and may look at it."""

    memory = 1

    def __init__(self, inner, looks):
        super().__init__()
        self.inner, self.looks = inner, looks

    def forward(self, features):
        phi = self.inner(features[:-1])
        return {**phi, "b": phi["b"] * (1.0 + features[-1])} if self.looks else phi

    def remember(self, features):
        with torch.no_grad():
            return 0.9 * features[-1:] + 0.1 * features[1]


@pytest.mark.parametrize("looks", [True, False])
def test_a_memory_may_have_no_derivative(make_student, looks):
    student = make_student("mlp", OptimiserSpec("momentum", 0.3))
    check_against_differences(student, lambda inner: Statistic(inner, looks))


class ConstantOffset(torch.nn.Module):
    """A teacher that leaves b alone."""

    memory = 0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features):
        phi = self.inner(features)
        return {**phi, "b": torch.zeros_like(phi["b"])}


def test_a_teacher_may_write_a_constant(make_student):
    student = make_student("mlp", OptimiserSpec("adam", 0.05, eps=1e-3))
    check_against_differences(student, ConstantOffset)


@pytest.mark.parametrize(
    ("hvp", "fixed_shapes"),
    [("exact", False), ("exact", True), ("one-sided-difference", False)],
    ids=["exact", "recorded", "one-sided"],
)
@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: o.name)
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "transformer"])
def test_every_plan_gives_the_same_bits(make_student, name, optimiser, hvp, fixed_shapes):
    """Kept, recomputed with few and with one state, spilled to a file; recorded or not."""
    student = make_student(name, optimiser, steps=11)
    student.fixed_shapes = fixed_shapes
    reference = None
    episode, _ = build(student, spec=TrainingSpec(hvp=hvp))
    assert episode.engine.plan.recomputed == 0
    point = episode.engine.plan.point_bytes
    for memory, spill in ((100, "none"), (4, "none"), (1, "none"), (3, "file")):
        spec = TrainingSpec(memory=f"{point * memory}B", spill=spill, hvp=hvp)
        episode, teacher = build(student, spec=spec)
        plan = episode.engine.plan
        assert (plan.recomputed > 0) == (spill == "none" and memory < 11)
        assert (plan.spilled > 0) == (spill == "file")
        for _ in range(2):  # the second episode reuses the first one's memory
            outcome = exact(episode, teacher, no_step)
            reference = reference or outcome
            assert torch.equal(reference.estimates[0], outcome.estimates[0])


def test_what_a_teacher_saw_lies_in_memory_as_it_lay(make_student):
    """Products may round otherwise where it does not: phi made again would have other bits."""
    student = make_student("mlp", OPTIMISERS[0])
    _, trajectory = final_state(*build(student))
    assert trajectory.features.shape == (student.total_steps, 6)
    assert {row.data_ptr() % 64 for row in trajectory.features} == {0}


def test_spilled_to_a_file_where_room_cannot_be_claimed(make_student, monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    reference = exact(*build(make_student("mlp", OPTIMISERS[0], steps=6)), no_step)
    student = make_student("mlp", OPTIMISERS[0], steps=6)
    size = build(student)[0].engine.plan.point_bytes
    episode, teacher = build(student, spec=TrainingSpec(memory=f"{3 * size}B", spill="file"))
    assert episode.engine.plan.spilled
    outcome = exact(episode, teacher, no_step)
    assert torch.equal(reference.estimates[0], outcome.estimates[0])


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "transformer", "lstm"])
def test_recorded_derivatives_are_used_and_exact(make_student, name):
    student = make_student(name, OptimiserSpec("adam", 0.05, eps=1e-3), steps=8)
    student.fixed_shapes = True
    check_against_differences(student)
    episode, teacher = build(student)
    exact(episode, teacher, no_step)
    traced = list(episode.engine.second.traced.values())
    assert traced and all(function.trusted for function in traced)


def test_a_student_that_cannot_be_recorded_is_differentiated_without(make_student):
    student = make_student("mlp", OptimiserSpec("momentum", 0.2), steps=6)
    reference = exact(*build(student), no_step)
    student.fixed_shapes = True
    predict = student.predict

    def by_value(batch):  # control flow that a recording would freeze, in torch and in Python
        log_probs, targets = predict(batch)
        return (log_probs, targets) if float(log_probs.sum()) < 1.0 else (targets, log_probs)

    student.predict = by_value
    episode, teacher = build(student)
    outcome = exact(episode, teacher, no_step)
    assert list(episode.engine.second.traced.values()) == [None]
    assert torch.equal(reference.estimates[0], outcome.estimates[0])

    calls = []

    def by_count(batch):  # another constant in each call: a replay would be wrong
        calls.append(1)
        log_probs, targets = predict(batch)
        return torch.log_softmax(log_probs * (1 + len(calls)), 1), targets

    student.predict = by_count
    episode, teacher = build(student)
    exact(episode, teacher, no_step)
    assert list(episode.engine.second.traced.values()) == [None]


@pytest.mark.parametrize("whose", ["ours", "oneDNN's"])
def test_an_lstm_is_recorded_but_not_onednns(make_student, monkeypatch, whose):
    """oneDNN's leaves its backward nothing to work with in a replay: the recording is given up."""
    if whose != "ours":
        monkeypatch.setattr(second_derivatives, "own_lstm", lambda _: contextlib.nullcontext())
    student = make_student("lstm", OptimiserSpec("sgd", 0.1), steps=4, dtype=torch.float32)

    def estimate():
        episode, teacher = build(student)
        return exact(episode, teacher.float(), no_step).estimates[0], episode.engine.second.traced

    reference, _ = estimate()
    student.fixed_shapes = True
    found, traced = estimate()
    (recording,) = traced.values()
    if whose == "ours":
        assert recording.trusted
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-7)


def test_low_precision_keeps_torchs_lstm(make_student):
    """Autocast knows torch's kernels only."""
    student = make_student("lstm", OptimiserSpec("sgd", 0.1), steps=4, dtype=torch.float32)
    own = [
        isinstance(second_derivatives.own_lstm(Life(student, precision)), TwiceDifferentiable)
        for precision in ("float32", "bfloat16")
    ]
    assert own == [True, False]


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "transformer"])
def test_low_precision_students_have_close_hypergradients(make_student, name):
    """The student's arithmetic in bfloat16; omega and the hypergradient stay in float32."""
    student = make_student(name, OptimiserSpec("momentum", 0.2), steps=6, dtype=torch.float32)

    def estimate(precision):
        episode, teacher = build(student, spec=TrainingSpec(precision=precision))
        return exact(episode, teacher.float(), no_step).estimates[0]

    full, low = estimate("float32"), estimate("bfloat16")
    assert low.dtype == torch.float32
    assert not torch.equal(full, low)
    assert float(torch.cosine_similarity(full, low, dim=0)) > 0.98


@pytest.mark.skipif(not knows_autocast(torch.float16), reason="torch before 2.4")
@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["by autograd", "recorded"])
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_float16_sees_small_directions_and_gradients(make_student, name, fixed_shapes):
    """Losses and directions are scaled into its range: 1e-9 is nothing in float16."""
    student = make_student(name, OptimiserSpec("momentum", 0.2), dtype=torch.float32)
    student.fixed_shapes = fixed_shapes
    loss = LossSpec("shared", "identity")
    phi = neutral_coefficients(loss, student.num_classes)

    def found(precision):
        life = Life(student, precision)
        life.begin(1)
        v = torch.randn(life.flat.vector.shape, generator=torch.Generator().manual_seed(1))
        parts = Exact(life, loss).at(3, phi, lambda _: 1e-9 * v)
        curved, steered = ([p.flatten() for p in part if p is not None] for part in parts)
        small = 1e-6 * phi["d"] ** 2 * life.predict(student.batch(0))[0].mean()
        gradient = life.flat.gather(life.gradients(small)).clone()
        return torch.cat(curved), torch.cat(steered), gradient

    for low, full in zip(found("float16"), found("float32"), strict=True):
        assert 0.0 < float((low - full).norm() / full.norm()) < 0.01
    phi["d"] = torch.tensor(1e5)  # and what is too large for the scale goes without
    for low, full in zip(found("float16"), found("float32"), strict=True):
        assert float((low - full).norm() / full.norm()) < 0.05


@pytest.mark.skipif(not knows_autocast(torch.float16), reason="torch before 2.4")
@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["by autograd", "recorded"])
@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: o.name)
def test_a_step_back_that_float16_repeats_is_made_once(make_student, optimiser, fixed_shapes):
    """What is too large with the first scale is made again with the second, from the same start."""
    student = make_student("mlp", optimiser, dtype=torch.float32)
    student.fixed_shapes = fixed_shapes
    loss = LossSpec("shared", "identity")
    features = torch.zeros(feature_count(student.default_features, 3))
    teacher = build_teacher(TeacherSpec("static"), loss, 3, len(features), seed=1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1e5)

    def pulled_back(precision):
        life = Life(student, precision)
        state = life.begin(1)
        life.show(state[0])
        cotangent = torch.randn(state.shape, generator=torch.Generator().manual_seed(4))
        back = step_vjp(
            life, teacher, Exact(life, loss), state, None, features, 0, cotangent,
            torch.zeros(0),
        )
        return [back.direction, *cotangent]

    for low, full in zip(pulled_back("float16"), pulled_back("float32"), strict=True):
        assert float((low - full).norm() / full.norm()) < 0.05


@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_processes_that_share_a_batch_repeat_a_step_together(make_student, lost):
    """Or one would wait for sums that the others have done with."""
    life = Life(make_student("mlp", OptimiserSpec("sgd", 0.1)), "float16")
    life.processes = SimpleNamespace(add_up=lambda mine: mine + lost)
    assert life.finite_everywhere([torch.ones(2), None]) == (lost == 0.0)
    assert not life.finite_everywhere([torch.tensor(float("inf"))])


@pytest.mark.parametrize(
    ("hvp", "most"), [("finite-difference", 1e-6), ("one-sided-difference", 1e-5)]
)
@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: o.name)
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "transformer", "lstm"])
def test_finite_differences_come_close(make_student, monkeypatch, name, optimiser, hvp, most):
    monkeypatch.setattr(Beside, "every", 1)  # all six steps are held against exact ones
    student = make_student(name, optimiser, steps=6)
    reference = exact(*build(student), no_step)
    approximate = exact(*build(student, spec=TrainingSpec(hvp=hvp)), no_step)
    a, b = reference.estimates[0], approximate.estimates[0]
    off = float((a - b).norm() / a.norm())
    assert 0.0 < off < most
    assert reference.way_back.hvp_error is None
    assert approximate.way_back.tail_error == pytest.approx(off, rel=1e-6)
    assert 0.0 < approximate.way_back.hvp_error < 1e-5


@pytest.mark.parametrize(
    "settings",
    [{"discount": 0.5}, {"average_last": 3}, {"measure_points": 3}, {"cotangent_cap": 0.9}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_error_told_is_the_error(make_student, monkeypatch, settings):
    """Whatever is done to the cotangent on its way is done to the exact one beside it."""
    monkeypatch.setattr(Beside, "every", 1)
    student = make_student("mlp", OptimiserSpec("momentum", 0.3), steps=8)
    reference = exact(*build(student, spec=TrainingSpec(**settings)), no_step)

    def rough(**settings):
        episode, teacher = build(student, spec=TrainingSpec(hvp="finite-difference", **settings))
        episode.engine.second.relative = 1e-2
        return exact(episode, teacher, no_step)

    found = rough(**settings)
    a, b = reference.estimates[0], found.estimates[0]
    assert not torch.equal(b, rough().estimates[0])
    assert found.way_back.tail_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)


def test_the_sides_of_one_sided_differences_take_turns(make_student):
    """Their errors are of first order in h, with the sign of h: next to each other they cancel."""
    life = Life(make_student("mlp", OptimiserSpec("sgd", 0.2)))
    life.student.batch = lambda step: torch.arange(6)
    life.student.step_seed = lambda step: 1  # one dropout mask for both steps
    phi = neutral_coefficients(LOSS, 3)
    phi = {name: part.double() for name, part in phi.items()}
    state = life.begin(1)
    life.show(state[0])
    v = torch.randn(life.flat.vector.shape, generator=torch.Generator().manual_seed(1)).double()

    def product(way, step):
        return life.flat.gather(way.at(step, phi, lambda _: v)[0])

    reference = product(Exact(life, LOSS), 2)
    way = OneSidedDifference(life, LOSS)
    way.relative = 1e-3
    even, odd = product(way, 2), product(way, 3)
    single = (even - reference).norm()
    assert 0.0 < (odd - reference).norm() < 2.0 * single
    assert ((even + odd) / 2 - reference).norm() < 1e-2 * single


def test_the_error_of_finite_differences_is_told(make_student):
    """The wider the step the larger, and telling it changes no bit of the hypergradient."""
    student = make_student("conv_bn", OptimiserSpec("sgd", 0.2), steps=12)

    def outcome(relative, comparable=True):
        episode, teacher = build(student, spec=TrainingSpec(hvp="finite-difference"))
        episode.engine.second.relative = relative
        episode.engine.comparable = comparable
        return exact(episode, teacher, no_step)

    fine, rough = outcome(1e-6), outcome(1.0)
    assert 0.0 < fine.way_back.hvp_error < 1e-6 < 1e-2 < rough.way_back.hvp_error
    assert "set training.hvp=exact" in advice({"hvp_error": 0.2}, TrainingSpec(), calm=True)

    blind = outcome(1.0, comparable=False)
    assert blind.way_back.hvp_error is None
    assert torch.equal(blind.estimates[0], rough.estimates[0])


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_discount_and_truncation_weigh_the_steps(make_student, name):
    """With T = 3, full = g0 + g1 + g2; discount multiplies by gamma^0, 1, 2 back in time.

    What a teacher remembers is a part of the state like any other.
    """
    student = make_student("mlp", OptimiserSpec("momentum", 0.3), steps=3)
    loss = LossSpec("dense", "sigmoid")
    teacher_spec = TeacherSpec(name, slots=3, init_scale=0.5, hidden=4)

    def gradient(**settings):
        spec = TrainingSpec(**settings)
        episode, teacher = build(student, loss=loss, spec=spec, teacher_spec=teacher_spec)
        if name == "lstm":
            lively(teacher)
        return exact(episode, teacher, no_step).estimates[0]

    last, last_two, full = gradient(truncate=1), gradient(truncate=2), gradient()
    g2, g1, g0 = last, last_two - last, full - last_two
    assert float(g0.abs().max()) > 1e-6
    torch.testing.assert_close(gradient(discount=0.5), g2 + 0.5 * g1 + 0.25 * g0)


def test_replayed_dropout_changes_with_the_step(make_student):
    """A replay must redraw the step's own mask, and different steps different masks."""
    student = make_student("mlp", OptimiserSpec("sgd", 0.1))
    life = Life(student)
    life.begin(1)
    student.batch = lambda step: torch.arange(6)
    first, again, other = (life.outputs(s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_large_buffers_that_stay_as_they_are_are_copied_once(make_student):
    """A mask of a megabyte would take a gigabyte in a life of a thousand steps."""
    student = make_student(next(iter(STUDENTS)), OptimiserSpec("sgd", 0.1))
    student.module.register_buffer("counts", torch.zeros(3))
    student.module.register_buffer("table", torch.arange(40_000.0))
    life = Life(student)
    first = life.buffers.copy()
    life.buffers.tensors()[0].add_(1.0)
    second = life.buffers.copy()
    assert second[1] is first[1] and second[0] is not first[0]
    assert first[0].tolist() == [0.0] * 3 and second[0].tolist() == [1.0] * 3
    life.buffers.tensors()[1][7] = -1.0
    third = life.buffers.copy()
    assert float(third[1][7]) == -1.0 and float(first[1][7]) == 7.0
    life.buffers.load(first)
    assert float(life.buffers.tensors()[1][7]) == 7.0
    assert torch.equal(life.buffers.copy()[1], first[1])


class RunningMean(torch.nn.Module):
    """6 -> 5 -> 3 about a running mean, which is written in place or put in its own place."""

    input_shape = (6,)

    def __init__(self, in_place):
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.in_place = in_place

    def forward(self, x):
        h = self.first(x)
        if self.training:
            mean = 0.5 * self.mean + 0.5 * h.detach().mean(0)
            self.mean = self.mean.copy_(mean) if self.in_place else mean
        return self.last(torch.tanh(h - self.mean.clone()))


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_buffer_may_be_written_or_bound_anew(fixed_shapes):
    """The way back sees it as the way forward did, whatever is recomputed."""
    found = []
    for in_place, states in ((True, 100), (False, 100), (False, 1), (False, 3)):
        student = ToyStudent(lambda: RunningMean(in_place), OPTIMISERS[1], steps=7)  # noqa: B023
        student.fixed_shapes = fixed_shapes
        size = build(student)[0].engine.plan.point_bytes
        spec = TrainingSpec(memory=f"{states * size}B", spill="none")
        found.append(exact(*build(student, spec=spec), no_step).estimates[0])
    for estimate in found[1:]:
        assert torch.equal(estimate, found[0])


class Counting(torch.nn.Module):
    """6 -> 3, more and more of it with each pass in training."""

    input_shape = (6,)

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.passes += 1.0
        return torch.tanh(self.layer(x)) * self.passes.sqrt()


class CountingAlways(Counting):
    """The same, but for passes over dev, which count too."""

    def forward(self, x):
        self.passes += 0.0 if self.training else 1.0
        return super().forward(x)


@pytest.mark.parametrize("points", [1, 3])
def test_a_look_at_dev_leaves_buffers_alone_and_so_every_plan_has_the_same_bits(points):
    student, found = ToyStudent(CountingAlways, OptimiserSpec("momentum", 0.3), steps=6), []
    size = build(student)[0].engine.plan.point_bytes
    for states in (20, 4, 3):
        spec = TrainingSpec(memory=f"{states * size}B", spill="none", measure_points=points)
        found.append(exact(*build(student, spec=spec), no_step))
    assert found[0].true == found[1].true == found[2].true
    for outcome in found[1:]:
        assert torch.equal(outcome.estimates[0], found[0].estimates[0])
        assert outcome.smoothed == found[0].smoothed
    check_against_differences(student)


@pytest.mark.parametrize("hvp", ["finite-difference", "one-sided-difference"])
def test_both_sides_of_a_difference_see_the_same_buffers(hvp):
    student = ToyStudent(Counting, OptimiserSpec("momentum", 0.3), steps=6)
    expected = exact(*build(student), no_step).estimates[0]
    found = exact(*build(student, spec=TrainingSpec(hvp=hvp)), no_step)
    assert float((found.estimates[0] - expected).norm() / expected.norm()) < 1e-4
    assert found.way_back.hvp_error < 1e-4


@pytest.mark.parametrize(("steps", "compared"), [(3, 1), (10, 2), (60, 8)])
def test_a_few_steps_of_differences_are_held_against_exact_ones(
    make_student, monkeypatch, steps, compared
):
    monkeypatch.setattr(Beside, "every", 5)
    student = make_student("mlp", OptimiserSpec("sgd", 0.1), steps=steps + LOSS.warmup_steps)
    calls, at = [], Exact.at
    monkeypatch.setattr(Exact, "at", lambda *given: calls.append(given) or at(*given))
    exact(*build(student, spec=TrainingSpec(hvp="finite-difference")), no_step)
    assert len(calls) == compared


def test_a_table_that_grows_is_put_back_as_it_was(make_student):
    student = make_student("mlp", OptimiserSpec("sgd", 0.3))
    student.module.register_buffer("table", torch.arange(3.0))
    buffers = Life(student).buffers
    before = buffers.copy()
    student.module.table = torch.arange(5.0)
    assert torch.equal(buffers.copy()[0], torch.arange(5.0))
    buffers.load(before)
    assert torch.equal(student.module.table, torch.arange(3.0))


def test_a_student_may_begin_a_life_with_other_data(make_student):
    """A recording holds the tensors of the life in which it was made."""
    student = make_student("mlp", OPTIMISERS[1], steps=5)
    student.fixed_shapes = True
    data, reset = student.x, student.reset

    def drawn(seed):
        reset(seed)
        student.x = data * seed

    student.reset = drawn
    episode, teacher = build(student)
    for seed in (3, 4, 5):
        found = exact(replace(episode, student_seed=seed), teacher, no_step)
        whole = exact(*build(student, seed=seed, spec=TrainingSpec(trace=False)), no_step)
        assert torch.equal(found.estimates[0], whole.estimates[0])
