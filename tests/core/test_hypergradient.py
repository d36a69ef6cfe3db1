"""The engine's hypergradient against central finite differences, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from l2t_core.differentiation import DIFFERENTIATIONS, Episode
from l2t_core.errors import UserError
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.student_state import feature_count
from l2t_core.teachers import build_teacher
from l2t_core.unroll import Life, parse_bytes, plan_keep_every, run_forward

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
    return Episode(Life(student), loss, names, spec, seed, 0), teacher


def no_step(phase, step):
    pass


def final_state(episode, teacher):
    life = episode.life
    state = life.begin(episode.student_seed)
    return run_forward(life, episode.follow(teacher), state, 0, 1, no_step)


def central_difference(episode, teacher, direction, recorded, h=1e-5):
    """Derivative of M-tilde along ``direction`` with every s_t held at its recorded value."""
    life = episode.life

    def value(sign):
        with torch.no_grad():
            for p, d in zip(teacher.parameters(), direction, strict=True):
                p.add_(sign * h * d)
        applied = episode.follow(teacher)
        # s_t is a constant to the method: no gradient flows through it, so none may here.
        applied.state.features = lambda step, lr: recorded[step]
        state = life.begin(episode.student_seed)
        run_forward(life, applied, state, 0, 1, no_step)
        result = float(life.student.smoothed_measure(episode.measure_seed).detach())
        with torch.no_grad():
            for p, d in zip(teacher.parameters(), direction, strict=True):
                p.sub_(sign * h * d)
        return result

    return (value(+1) - value(-1)) / (2 * h)


def check_against_differences(student, **options):
    episode, teacher = build(student, **options)
    _, trajectory = final_state(episode, teacher)
    # Buffers of batch norm are state without derivative: M-tilde sees the same ones throughout.
    student.frozen_buffers = [b.clone() for b in student.module.buffers()]
    outcome = DIFFERENTIATIONS.get("exact")(episode, teacher, no_step)
    generator = torch.Generator().manual_seed(2)
    assert float(torch.cat([g.reshape(-1) for g in outcome.gradient]).abs().max()) > 1e-7
    for _ in range(2):
        direction = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in teacher.parameters()
        ]
        numeric = central_difference(episode, teacher, direction, trajectory.features)
        exact = sum(
            float((g * d).sum()) for g, d in zip(outcome.gradient, direction, strict=True)
        )
        assert exact == pytest.approx(numeric, rel=2e-6, abs=1e-10)


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda o: o.name)
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "transformer", "lstm"])
def test_exact_hypergradient_equals_central_differences(make_student, name, optimiser):
    check_against_differences(make_student(name, optimiser))


@pytest.mark.parametrize("sigma", ["sigmoid", "softplus", "identity"])
@pytest.mark.parametrize("form", ["dense", "diagonal", "lowrank", "shared"])
def test_every_loss_form(make_student, form, sigma):
    student = make_student("mlp", OptimiserSpec("momentum", 0.3))
    check_against_differences(student, loss=LossSpec(form, sigma, rank=2))


def test_static_teacher(make_student):
    student = make_student("mlp", OptimiserSpec("adam", 0.05, eps=1e-3))
    check_against_differences(student, teacher_spec=TeacherSpec("static", init_scale=0.3))


@pytest.mark.parametrize("name", ["conv_bn", "transformer"])
def test_recomputed_points_give_the_same_bits(make_student, name):
    student = make_student(name, OptimiserSpec("adam", 0.05), steps=9)
    episode, teacher = build(student)
    reference = DIFFERENTIATIONS.get("exact")(episode, teacher, no_step)
    assert reference.keep_every == 1
    point = sum(p.numel() for p in student.module.parameters()) * 8 * 3
    point += sum(b.numel() * b.element_size() for b in student.module.buffers())
    tight = dataclasses.replace(episode, spec=TrainingSpec(memory=f"{point * 6}B"))
    outcome = DIFFERENTIATIONS.get("exact")(tight, teacher, no_step)
    assert outcome.keep_every > 1
    for a, b in zip(reference.gradient, outcome.gradient, strict=True):
        assert torch.equal(a, b)


def test_discount_and_truncation_weigh_the_steps(make_student):
    """With T = 3, full = g0 + g1 + g2; discount multiplies by gamma^0, 1, 2 back in time."""
    student = make_student("mlp", OptimiserSpec("momentum", 0.3), steps=3)
    loss = LossSpec("dense", "sigmoid")

    def gradient(**settings):
        episode, teacher = build(student, loss=loss, spec=TrainingSpec(**settings))
        outcome = DIFFERENTIATIONS.get("exact")(episode, teacher, no_step)
        return torch.cat([g.reshape(-1) for g in outcome.gradient])

    last, last_two, full = gradient(truncate=1), gradient(truncate=2), gradient()
    g2, g1, g0 = last, last_two - last, full - last_two
    assert float(g0.abs().max()) > 1e-6
    torch.testing.assert_close(gradient(discount=0.5), g2 + 0.5 * g1 + 0.25 * g0)


def test_memory_plan():
    assert plan_keep_every(100, 10, 1000) == 1
    k = plan_keep_every(100, 10, 250)
    assert (-(-100 // k) + k - 1) * 10 <= 250
    assert (-(-100 // (k - 1)) + k - 2) * 10 > 250
    with pytest.raises(UserError, match="smallest budget"):
        plan_keep_every(100, 2**20, 18 * 2**20)
    assert plan_keep_every(100, 2**20, 19 * 2**20) == 10
    assert parse_bytes("512MiB") == 512 * 2**20
    assert parse_bytes("1.5 GB") == 1_500_000_000
    for bad in ("lots", "-1MiB", "", "1.2.3GiB"):
        with pytest.raises(UserError, match="memory="):
            parse_bytes(bad)


def test_replayed_dropout_changes_with_the_step(make_student):
    """A replay must redraw the step's own mask, and different steps different masks."""
    student = make_student("mlp", OptimiserSpec("sgd", 0.1))
    life = Life(student)
    life.begin(1)
    student.batch = lambda step: torch.arange(6)
    first, again, other = (life.outputs(s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
