"""The teachers' forms by hand."""

from __future__ import annotations

import torch

from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.teachers import build_teacher


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
