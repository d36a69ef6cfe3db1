"""The teachers' forms by hand."""

from __future__ import annotations

import math

import pytest
import torch

from l2t_core.losses.forms import FORMS, neutral_coefficients
from l2t_core.losses.taught import taught_loss
from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.teachers.architectures import TEACHERS, build_teacher


def test_affine_teacher_is_the_demos_form() -> None:
    spec = TeacherSpec("affine", slots=2, init_scale=0.1)
    teacher = build_teacher(spec, LossSpec("dense"), 3, 4, seed=1)
    s = torch.tensor([0.5, -1.0, 0.25, 1.0])
    theta = dict(teacher.named_parameters())
    h = 2 / (1 + torch.exp(-(theta["keys"] @ s + theta["offsets"]))) - 1
    phi = teacher(s)
    for name, neutral in (("W", torch.eye(3)), ("b", torch.zeros(3))):
        slots = theta[f"values.{name}"]
        torch.testing.assert_close(phi[name], neutral + h[0] * slots[0] + h[1] * slots[1])
    # h(0) = 0: what is left is the constant part, here the neutral point.
    assert torch.equal(teacher(torch.zeros(4))["W"], torch.eye(3))
    phi["W"].sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for n, p in theta.items() if not n.endswith("b"))


@pytest.mark.parametrize("name", TEACHERS.names())
@pytest.mark.parametrize("form", FORMS.names())
def test_no_teacher_begins_by_rewarding_certainty(form: str, name: str) -> None:
    """As a negative weight of other classes' log-probabilities would, without bound."""
    loss = LossSpec(form, "identity", rank=2)
    neutral = neutral_coefficients(loss, 5)
    # Log-probabilities of a student that gives all but class 0 next to nothing, more and more so.
    logits = torch.zeros(2, 5)
    logits[:, 0] = torch.tensor([200.0, 400.0])
    log_probs, targets = torch.log_softmax(logits, 1), torch.zeros(2, dtype=torch.long)
    for seed in range(1, 9):
        teacher = build_teacher(TeacherSpec(name, slots=4, init_scale=0.1), loss, 5, 3, seed)
        phi = teacher(torch.randn(3 + teacher.memory))
        moved = {part for part, value in phi.items() if bool((value != neutral[part]).any())}
        assert moved | {FORMS.get(form).others} >= set(phi)
        calm, certain = taught_loss(loss, log_probs, targets, phi).tolist()
        assert certain >= calm - 1e-6
    exact = build_teacher(TeacherSpec(name, slots=4, init_scale=0.0), loss, 5, 3, seed=1)
    for part, value in exact(torch.randn(3 + exact.memory)).items():
        torch.testing.assert_close(value, neutral[part])


def test_the_lstm_teacher_is_attention_over_what_torchs_lstm_remembers() -> None:
    spec = TeacherSpec("lstm", slots=4, init_scale=0.5, hidden=5)
    teacher = build_teacher(spec, LossSpec("shared"), 3, 2, seed=1)
    states = torch.randn(7, 2)
    whole = torch.nn.LSTM(2, 5)
    whole.load_state_dict({f"{k}_l0": v for k, v in teacher.cell.state_dict().items()})
    hidden, (last, cell) = whole(states)
    memory, theta = torch.zeros(teacher.memory), dict(teacher.named_parameters())
    for state, h in zip(states, hidden, strict=True):
        seen = torch.cat([state, memory])
        phi, memory = teacher(seen), teacher.remember(seen)
        shares = torch.softmax(theta["weight_keys"] @ torch.cat([state, h]), 0)
        torch.testing.assert_close(phi["d"], shares @ theta["values.d"])
        torch.testing.assert_close(phi["s"], shares @ theta["values.s"])
    torch.testing.assert_close(memory, torch.cat([last[0], cell[0]]))


def test_an_lstm_teacher_remembers_for_a_long_life() -> None:
    """The forget gates of its units keep from a half to all but a thousandth at each step."""
    teacher = build_teacher(TeacherSpec("lstm"), LossSpec("shared"), 3, 2, seed=1)
    hidden = teacher.cell.hidden_size
    bias = (teacher.cell.bias_ih + teacher.cell.bias_hh).detach()
    forget = torch.sigmoid(bias[hidden : 2 * hidden])
    assert float(forget[0]) == pytest.approx(0.5) and float(forget[-1]) == pytest.approx(0.999)
    torch.testing.assert_close(torch.sigmoid(bias[:hidden]), 1.0 - forget)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("form", FORMS.names())
def test_teachers_begin_next_to_cross_entropy(form: str, classes: int) -> None:
    """The other classes' weights together are a little smoothing, however many there are."""
    loss = LossSpec(form, "identity")
    phi = build_teacher(TeacherSpec(), loss, classes, 3, seed=1)(torch.randn(3))
    uniform = torch.full((1, classes), -math.log(classes))
    with torch.no_grad():
        found = float(taught_loss(loss, uniform, torch.tensor([2]), phi))
    assert found == pytest.approx(math.log(classes), rel=0.03)
