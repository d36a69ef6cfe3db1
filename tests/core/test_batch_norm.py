"""Batch norm's own derivatives against finite differences and against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2t_core.hypergradients.batch_norm import TwiceDifferentiable

SHAPES = [(6, 3), (4, 3, 5), (3, 2, 2, 3)]


def inputs(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=dtype) * 2 + 1
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=dtype)
    return [t.clone().requires_grad_() for t in (x, weight, bias)]


def normalised(x, weight, bias):
    with TwiceDifferentiable():
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_both_derivatives_equal_finite_differences(shape):
    arguments = inputs(shape)
    assert "_Forward" in type(normalised(*arguments).grad_fn).__name__
    assert torch.autograd.gradcheck(normalised, arguments)
    assert torch.autograd.gradgradcheck(normalised, arguments)


def test_values_and_buffers_are_those_of_torch():
    x, _, _ = inputs((3, 2, 2, 3), torch.float32)
    ours, theirs = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    with TwiceDifferentiable():
        found = ours(x)
    assert torch.equal(found, theirs(x))
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)


def test_everything_else_is_left_to_torch():
    x, weight, bias = inputs((6, 3))
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with TwiceDifferentiable():
        evaluated = F.batch_norm(x, mean, variance, weight, bias)
        bare = F.batch_norm(x, None, None, training=True)
        with pytest.raises(ValueError, match="more than 1 value"):
            F.batch_norm(x[:1], None, None, weight, bias, training=True)
    assert torch.equal(evaluated, F.batch_norm(x, mean, variance, weight, bias))
    assert torch.equal(bare, F.batch_norm(x, None, None, training=True))
