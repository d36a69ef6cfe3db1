"""What the probe finds, and the kernels that are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_students import OpaqueLayer

from l2t_core.double_backward import probe, twice_differentiable
from l2t_core.errors import UserError


def test_a_gradient_that_autograd_does_not_see_through_is_named():
    """Its second derivative would come out as zero without a word."""
    student = nn.Sequential(nn.Linear(2, 3), OpaqueLayer(3), nn.Linear(3, 2))
    x = torch.randn(4, 2)
    with pytest.raises(UserError, match=r"OpaqueLayer '1' cannot be differentiated twice"):
        probe(student, lambda: student(x).square().sum())
    probe(student[0], lambda: student[0](x).square().sum())


@pytest.mark.parametrize("student", [nn.Conv1d(1, 1, 1), nn.LSTM(1, 1)])
def test_convolutions_add_in_a_fixed_order(student):
    assert not torch.backends.cudnn.deterministic
    with twice_differentiable(student):
        assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic
