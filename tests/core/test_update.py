"""From several students' estimates to one update, checked by hand."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from l2t_core.hypergradients.ways import Outcome
from l2t_core.losses.forms import FORMS, neutral_coefficients
from l2t_core.losses.taught import taught_loss
from l2t_core.specs import LossSpec, ScheduleSpec, TeacherSpec, TrainingSpec
from l2t_core.students.schedules import learning_rate
from l2t_core.teachers.architectures import TEACHERS, build_teacher
from l2t_core.training import update
from l2t_core.training.rules import AdamRule
from l2t_core.training.update import (
    FLAT,
    FLAT_REMEDY,
    advice,
    ascend,
    combine,
    ends_calmly,
    nothing_usable,
    phi_penalty,
    signal_to_noise,
    unusable,
)


def test_one_kind_is_averaged():
    estimates = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    assert combine(estimates).tolist() == [2.0, 4.0]


def test_two_kinds_are_weighed_by_their_inverse_variances():
    # First coefficient: variances 2 and 8 around 1 and 5; second: 0 and 2 around 1 and 5.
    estimates = torch.tensor([[[0.0, 1.0], [3.0, 4.0]], [[2.0, 1.0], [7.0, 6.0]]])
    assert combine(estimates).tolist() == pytest.approx([(1 / 2 + 5 / 8) / (1 / 2 + 1 / 8), 1.0])
    nothing_varies = torch.tensor([[[1.0], [3.0]], [[1.0], [3.0]]])
    assert combine(nothing_varies).tolist() == [2.0]
    with pytest.raises(ValueError, match="two students"):
        combine(torch.zeros(1, 2, 3))


def test_a_kind_that_is_zero_for_all_students_says_nothing():
    """A perturbation too small for float32 leaves no difference: no variance, and no direction."""
    estimates = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[2.0, 3.0], [0.0, 0.0]]])
    assert combine(estimates).tolist() == [1.5, 3.0]
    assert combine(torch.zeros(2, 2, 3)).tolist() == [0.0, 0.0, 0.0]


def test_the_mix_has_less_variance_than_either_kind():
    """Where one kind is calm in some coefficients and the other in the rest."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([[0.1, 3.0], [2.0, 0.2]])
    draws = torch.randn(500, 16, 2, 2, generator=generator) * scales + 1.0
    mixed = torch.stack([combine(d) for d in draws])
    # Weights from 16 students are near the best ones: 1 / sum(1 / variance), doubled for safety.
    best = 1.0 / (1.0 / scales.square()).sum(0) / 16
    assert (mixed.var(0) < 2.0 * best).all()
    assert (mixed.mean(0) - 1.0).abs().max() < 0.01


def test_signal_to_noise():
    assert math.isnan(signal_to_noise(torch.ones(1, 3)))
    assert signal_to_noise(torch.ones(2, 3)) == math.inf
    # Mean (2, 0), variances (2, 0): 2 / sqrt(2 / 2).
    assert signal_to_noise(torch.tensor([[1.0, 0.0], [3.0, 0.0]])) == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["attention", "lstm"])
@pytest.mark.parametrize("form", ["dense", "lowrank", "shared", "network", "pairwise"])
def test_the_penalty_is_phis_mean_square_from_neutral(form, name):
    loss = LossSpec(form, "softplus")
    teacher = build_teacher(TeacherSpec(name, slots=3, init_scale=0.5), loss, 4, 5, 1).double()
    states = [torch.randn(5 + teacher.memory, dtype=torch.float64) for _ in range(3)]

    def by_hand():
        neutral = neutral_coefficients(loss, 4)
        parts = [
            torch.cat([(teacher(s)[n] - neutral[n]).reshape(-1) for n in neutral]) for s in states
        ]
        return 0.7 * torch.stack(parts).square().mean()

    value, gradient = phi_penalty(teacher, loss, states, 0.7)
    expected = by_hand()
    assert value == pytest.approx(float(expected.detach()))
    parts = torch.autograd.grad(expected, list(teacher.parameters()))
    torch.testing.assert_close(gradient, torch.cat([p.reshape(-1) for p in parts]))


def test_the_penalty_takes_some_states_at_a_time(monkeypatch):
    """Or all phi of a long life, each of a vocabulary's size, would be held at once."""
    loss = LossSpec("dense", "softplus")
    teacher = build_teacher(TeacherSpec(slots=3, init_scale=0.5), loss, 4, 5, 1).double()
    states = [torch.randn(5, dtype=torch.float64) for _ in range(5)]
    value, gradient = phi_penalty(teacher, loss, states, 0.7)
    counts = []

    def counted(function):
        return lambda some: counts.append(len(some)) or torch.func.vmap(function)(some)

    monkeypatch.setattr(update, "vmap", counted)
    monkeypatch.setattr(update, "_NUMBERS_AT_A_TIME", 45)  # two of 20
    again = phi_penalty(teacher, loss, states, 0.7)
    assert counts == [2, 2, 1]
    assert again[0] == pytest.approx(value)
    torch.testing.assert_close(again[1], gradient)


def test_advice_names_the_remedy():
    spec = TrainingSpec(students=2)
    assert advice({"largest": 3.0, "signal_to_noise": 4.0}, spec, calm=True) == ""
    assert advice({"largest": None, "signal_to_noise": None}, spec, calm=True) == ""
    assert "training.discount" in advice({"largest": 1e4}, spec, calm=True)
    restless = advice({"largest": 1e4}, TrainingSpec(discount=0.9), calm=False)
    assert "way back; let the student's rate end at zero (image.schedule.name=linear" in restless
    assert "lower the student's peak rate" in restless and "discount" not in restless
    lost = advice({"largest": None, "reason": "the hypergradient is not finite"}, spec, calm=False)
    assert "left all bounds" in lost and "image.schedule.name=linear" in lost
    assert "training.students (now 2)" in advice({"signal_to_noise": 1.1}, spec, calm=True)
    assert advice({"signal_to_noise": 1.3}, spec, calm=True) == ""
    assert "grew 110-fold" in advice({"largest": 110.0}, spec, calm=True)
    assert advice({"largest": 90.0}, spec, calm=True) == ""
    # Small at the end, and it grows.
    rough = advice({"largest": 1e6, "hvp_error": 0.02}, spec, calm=True)
    assert "set training.hvp=exact; else lower" in rough
    loud = advice({"largest": 1e6, "hvp_error": 0.2}, spec, calm=True)
    assert "differences are off by 20 %" in loud
    dead = advice({"reason": "the student diverged at step 3"}, spec, calm=True)
    assert dead.endswith("at step 3; lower the student's learning rate, or training.lr")
    flat = advice({"reason": FLAT}, spec, calm=True)
    assert flat == f"{FLAT}; {FLAT_REMEDY}"
    own = advice({"reason": FLAT}, spec, calm=True, flat_remedy="name another nmt.measure")
    assert own == f"{FLAT}; name another nmt.measure"
    assert "polynomial_decay --total-num-update" in restless  # fairseq wants both


def test_a_rate_that_ends_at_zero_is_not_told_to():
    """Where the schedule is calm already, the peak is the likeliest cause, and comes first."""
    told = advice({"largest": 1e4}, TrainingSpec(), calm=True)
    assert "on its way back; lower the student's peak rate (image.optimiser.lr" in told
    assert "schedule" not in told
    # That of inverse_sqrt ends at a quarter of its peak.
    schedules = ("linear", True), ("cosine", True), ("constant", False), ("inverse_sqrt", False)
    for name, calm in schedules:
        rates = functools.partial(learning_rate, ScheduleSpec(name, 3), 0.5, total_steps=40)
        student = SimpleNamespace(total_steps=40, learning_rate=rates)
        assert ends_calmly(student) == calm


def test_a_flat_measure_within_a_life_is_no_failure():
    """What a later window tells may be more; at a life's end there is nothing else to learn."""
    flat = Outcome([torch.zeros(3)], 0.5)
    assert unusable(flat, 0.0) == ""
    assert unusable(replace(flat, true=0.5), 0.0) == FLAT


def test_an_affine_teacher_is_kept_from_below_zero_to_the_last_bit():
    """Where all of its units are as far as they go, and each takes what it may."""
    torch.manual_seed(0)
    for _ in range(200):
        teacher = build_teacher(TeacherSpec("affine", slots=10), LossSpec("shared"), 7, 4, seed=1)
        teacher.values["d"].data = torch.randn(10)
        teacher.base["d"].data = torch.rand(1)
        teacher.keys.data.zero_()
        teacher.offsets.data = -1e4 * teacher.values["d"].data.sign()
        teacher.keep_from_below_zero(("d", "s"))
        assert 0.0 <= float(teacher(torch.zeros(4))["d"].detach()) < 1e-5


def test_the_error_of_a_training_in_vain_ends_with_its_last_warning():
    row = {"reason": "it grew", "warning": "it grew; lower the peak"}
    assert str(nothing_usable("none", row)).endswith("the last: it grew; lower the peak")
    row = {"reason": "the smoothed measure is not finite"}
    assert "not finite; look at the measure first" in str(nothing_usable("none", row))


def far_below_zero(name, form, sigma="identity"):
    """Return a teacher, the loss it writes, and the gradient that pulls all that it holds down."""
    loss = LossSpec(form, sigma, rank=2)
    teacher = build_teacher(TeacherSpec(name, slots=3, init_scale=0.3), loss, 7, 4, seed=1)
    for values in teacher.parameters():
        values.data -= 0.5 * torch.rand_like(values)
    # Not what chooses among it: an affine teacher's h has either sign then.
    pulls = [
        torch.full_like(p, -float("values" in part or "base" in part)).flatten()
        for part, p in teacher.named_parameters()
    ]
    return teacher, loss, torch.cat(pulls).detach()


@pytest.mark.parametrize("form", FORMS.names())
@pytest.mark.parametrize("name", TEACHERS.names())
def test_after_an_update_no_loss_rewards_certainty_without_bound(name, form):
    torch.manual_seed(0)
    teacher, loss, gradient = far_below_zero(name, form)
    ascend(teacher, loss, gradient, AdamRule(teacher, TrainingSpec(lr=1.0)), TrainingSpec())
    # What no student has met: whatever the state, each target's loss rises as any class's
    # probability goes to nothing.
    for scale in (0.0, 1.0, 100.0, 100.0, 100.0):
        phi = teacher(scale * torch.randn(4 + teacher.memory))
        for improbable in range(7):
            far = torch.zeros(7)
            far[improbable] = -1e4
            near = torch.zeros(7)
            near[improbable] = -1e3  # where the network's bounded part has nothing left to say
            targets = torch.arange(7)
            values = [
                taught_loss(loss, row.expand(7, 7).log_softmax(1), targets, phi)
                for row in (far, near)
            ]
            assert bool((values[0] >= values[1] - 1e-2).all())  # float32 at 1e4


@pytest.mark.parametrize("name", TEACHERS.names())
def test_a_step_that_stays_on_the_safe_side_is_adams(name):
    torch.manual_seed(0)
    loss = LossSpec("shared", "identity")
    spec = TeacherSpec(name, slots=3, init_scale=0.01)
    ours, theirs = (build_teacher(spec, loss, 7, 4, seed=1) for _ in range(2))
    if name == "affine":  # its s begins at zero: room for what h may take from it
        for teacher in (ours, theirs):
            teacher.base["s"].data += 1.0
    gradient = torch.rand(sum(p.numel() for p in ours.parameters())) + 0.1
    ascend(ours, loss, gradient, AdamRule(ours, TrainingSpec(lr=0.01)), TrainingSpec())
    start = 0
    for parameter in theirs.parameters():
        piece = gradient[start : start + parameter.numel()].view_as(parameter)
        parameter.grad = -piece / gradient.norm()
        start += parameter.numel()
    torch.optim.Adam(theirs.parameters(), lr=0.01).step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("sigma", "bounded"), [("identity", False), ("sigmoid", True)])
def test_weights_may_go_below_zero_where_asked_or_where_sigma_is_bounded(sigma, bounded):
    teacher, loss, gradient = far_below_zero("static", "shared", sigma)
    spec = TrainingSpec(bounded=bounded, lr=1.0)
    ascend(teacher, loss, gradient, AdamRule(teacher, spec), spec)
    assert float(teacher(torch.zeros(4))["s"].detach()) < -0.5
