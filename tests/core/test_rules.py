"""Update rules: L2T-DLN's learnt optimiser by hand, by differences and at work."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from l2t_core.errors import UserError
from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.ways import DIFFERENTIATIONS
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import build_teacher
from l2t_core.training.rules import (
    COORDINATES_LIMIT,
    UPDATE_RULES,
    CoordinateLstm,
    LstmRule,
    preprocessed,
)
from l2t_core.training.update import ascend, judge

LOSS = LossSpec("dense", "sigmoid", warmup_steps=1)
SHARED = LossSpec("shared")
SPEC = TrainingSpec(
    differentiation="windows", window=4, update_rule="lstm", lr=0.3, rule_lr=0.01, bounded=False
)


def no_step(phase, step):
    pass


def plain_teacher(values, loss=SHARED):
    """Return a static teacher whose theta, float64, is ``values``."""
    teacher = build_teacher(TeacherSpec("static"), loss, 3, 0, 1).double()
    vector_to_parameters(torch.tensor(values, dtype=torch.float64), teacher.parameters())
    return teacher


def build(make_student, teacher="static", student="mlp", spec=SPEC):
    student = make_student(student, OptimiserSpec("momentum", 0.3), steps=9)
    names = student.default_features
    kind = TeacherSpec(teacher, slots=2, hidden=3, init_scale=0.3)
    network = build_teacher(kind, LOSS, 3, feature_count(names, 3), 1).double()
    return Episode(Engine(Life(student), LOSS, spec), names, 3, 0), network


def test_numbers_of_all_sizes_are_seen_near_one():
    """(log|g| / 10, sign g) from e^-10 on, below it (-1, e^10 g)."""
    at = math.exp(-10)
    gradient = torch.tensor([1.0, -math.exp(-5), math.exp(3), at, -at / 2, 0.0]).double()
    expected = [[0.0, 1.0], [-0.5, -1.0], [0.3, 1.0], [-1.0, 1.0], [-1.0, -0.5], [-1.0, 0.0]]
    torch.testing.assert_close(preprocessed(gradient), torch.tensor(expected).double())


def test_each_number_of_theta_has_the_same_lstm_and_a_memory_of_its_own():
    torch.manual_seed(0)
    network = CoordinateLstm(cold=True).double()
    assert [tuple(c.weight_ih.shape) for c in network.cells] == [
        (256, 2), (256, 64), (256, 64), (4, 64)
    ]
    gradients = torch.randn(3, 5, dtype=torch.float64)
    together, alone = network.start(5), network.start(1)
    for gradient in gradients:
        change, together = network(gradient, together)
        one, alone = network(gradient[2:3], alone)
        assert change.shape == (5,) and float(change.detach().abs().max()) < 1.0
        torch.testing.assert_close(change[2:3], one)
    assert not torch.allclose(network(gradients[0], network.start(5))[0], change)


@pytest.mark.parametrize("cold", [True, False])
def test_theta_descends_along_the_lstms_answer(cold):
    teacher = plain_teacher([1.0, 0.2, -0.1])
    rule = LstmRule(teacher, SPEC, cold)
    descent = torch.tensor([0.3, -2.0, 0.0], dtype=torch.float64)
    change, _ = rule.network(descent, rule.network.start(3))
    expected = parameters_to_vector(teacher.parameters()) - 0.3 * change
    rule.step(descent)
    torch.testing.assert_close(parameters_to_vector(teacher.parameters()), expected)
    # The one begins at random, the other with the sign.
    assert (change.tolist() == [1.0, -1.0, 0.0]) == (not cold)


def weights_moved_by(rule, direction, by):
    vector = parameters_to_vector(rule.network.parameters()).detach()
    vector_to_parameters(vector + by * direction, rule.network.parameters())


@pytest.mark.parametrize("cold", [True, False])
def test_its_weights_learn_from_what_their_update_led_to(make_student, cold):
    """Against central differences of the window's M-tilde under the theta that they make."""

    def lived_twice(direction=None, by=0.0):
        episode, teacher = build(make_student)
        rule = LstmRule(teacher, SPEC, cold)
        if direction is not None:
            weights_moved_by(rule, direction, by)
        life = DIFFERENTIATIONS.get("windows")(episode, teacher, no_step)
        rule.step(-next(life).estimates[0])
        again = next(life)
        assert again.judges
        return again, rule

    again, rule = lived_twice()
    rule.learn(-again.estimates[0])
    gradient = torch.cat([p.grad.flatten() for p in rule.network.parameters()])
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        direction = torch.randn(len(gradient), generator=generator, dtype=torch.float64)
        up, down = (lived_twice(direction, h)[0].smoothed for h in (1e-5, -1e-5))
        # It descends on -M-tilde.
        assert -float(gradient @ direction) == pytest.approx((up - down) / 2e-5, rel=1e-5)


def test_what_is_put_back_within_its_bounds_teaches_nothing():
    loss, spec = LossSpec("shared", "identity"), TrainingSpec(**{**vars(SPEC), "bounded": True})
    free, found = TrainingSpec(clip_norm=0.0), []
    for pull in (1e9, 0.0):
        teacher = plain_teacher([1.0, 0.0, 0.0], loss)
        rule = LstmRule(teacher, spec)
        # By its sign s is asked to go below zero.
        ascend(teacher, loss, torch.tensor([0.1, -0.1, 0.1]).double(), rule, spec)
        assert parameters_to_vector(teacher.parameters())[1].item() == 0.0
        judge(torch.tensor([0.1, pull, 0.1]).double(), rule, free)
        found.append(torch.cat([p.grad.flatten() for p in rule.network.parameters()]))
    assert torch.equal(*found) and bool(found[0].any())


def bowl(cold, steps=200):
    """Return what is left of the way to a bowl's middle after 20 steps, for each of its moves."""
    torch.manual_seed(0)
    teacher = plain_teacher([0.0, 0.0, 0.0])
    rule = LstmRule(teacher, TrainingSpec(**{**vars(SPEC), "lr": 0.1, "rule_lr": 0.003}), cold)
    theta, left = list(teacher.parameters()), []

    def way():
        return parameters_to_vector(theta).detach() - middle

    for number in range(steps):
        if number % 20 == 0:
            middle = torch.randn(3, dtype=torch.float64)
            first = float(way().norm())
        rule.step(way())
        rule.learn(way())
        if number % 20 == 19:
            left.append(float(way().norm()) / first)
    return left, 0.0 if cold else rule.network.gain.item()


def test_it_learns_to_go_downhill_where_it_begins_with_the_sign():
    """Alone it shuts its gates: half of what it says at first is wrong, and silence is not."""
    left, gain = bowl(cold=False)
    assert sum(left) / 10 < 0.2 and gain != 1.0
    left, _ = bowl(cold=True, steps=400)
    assert left[-5:] == pytest.approx([1.0] * 5, abs=0.01)


@pytest.mark.parametrize("student", ["mlp", "conv_bn"])
@pytest.mark.parametrize("teacher", ["static", "lstm"])
def test_a_window_lived_again_is_the_same_one(make_student, student, teacher):
    """Batches, dropout, buffers, s_t and m_t; and the life goes on from it as from a plain one."""
    episode, network = build(make_student, teacher, student)
    twice = list(DIFFERENTIATIONS.get("windows")(episode, network, no_step))
    spec = TrainingSpec(differentiation="windows", window=4)
    episode, network = build(make_student, teacher, student, spec)
    once = list(DIFFERENTIATIONS.get("windows")(episode, network, no_step))
    assert [o.judges for o in twice] == [False, True, False, True]
    assert [o.true is None for o in twice] == [True, True, True, False]
    for i, outcome in enumerate(twice):
        plain = once[i // 2]
        assert outcome.smoothed == plain.smoothed
        assert torch.equal(outcome.estimates[0], plain.estimates[0])
        assert torch.equal(torch.stack(outcome.features), torch.stack(plain.features))
    assert twice[-1].true == once[-1].true and not any(o.judges for o in once)


def test_the_student_goes_on_from_the_second_life(make_student):
    """Under the theta that came of the first one, as if it had been there from the start."""
    episode, teacher = build(make_student)
    life = DIFFERENTIATIONS.get("windows")(episode, teacher, no_step)
    next(life)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.5)
    found = [next(life).smoothed, next(life).smoothed]
    spec = TrainingSpec(differentiation="windows", window=4)
    episode, teacher = build(make_student, spec=spec)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.5)
    expected = [o.smoothed for o in DIFFERENTIATIONS.get("windows")(episode, teacher, no_step)]
    assert found == expected


@pytest.mark.parametrize("name", UPDATE_RULES.names())
def test_a_rule_goes_on_with_what_it_knew(name):
    torch.manual_seed(0)
    spec = TrainingSpec(**{**vars(SPEC), "update_rule": name})
    gradients = torch.randn(6, 3, dtype=torch.float64)

    def followed(rule, gradients):
        for gradient in gradients:
            rule.step(gradient)
            rule.learn(gradient)

    whole, first, second = (plain_teacher([1.0, 0.2, -0.1]) for _ in range(3))
    followed(UPDATE_RULES.get(name)(whole, spec), gradients)
    rule = UPDATE_RULES.get(name)(first, spec)
    followed(rule, gradients[:3])
    second.load_state_dict(first.state_dict())
    other = UPDATE_RULES.get(name)(second, TrainingSpec(**{**vars(spec), "seed": 9}))
    other.unpack({k: v.clone() for k, v in rule.pack().items()})
    followed(other, gradients[3:])
    assert torch.equal(*(parameters_to_vector(t.parameters()) for t in (whole, second)))


def test_too_many_numbers_are_refused():
    loss = LossSpec("dense")
    teacher = build_teacher(TeacherSpec("static"), loss, 316, 0, 1)
    assert sum(p.numel() for p in teacher.parameters()) == 100_172 > COORDINATES_LIMIT
    with pytest.raises(UserError, match=r"up to 100,000 numbers, and this one has 100,172"):
        LstmRule(teacher, SPEC)
