"""What the probe finds, and the kernels that are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_students import OpaqueLayer, _Opaque

from l2t_core.errors import UserError
from l2t_core.hypergradients.double_backward import (
    probe,
    refuse_untrue_gradients,
    twice_differentiable,
)


def test_a_gradient_that_autograd_does_not_see_through_is_named():
    """Its second derivative would come out as zero without a word."""
    student = nn.Sequential(nn.Linear(2, 3), OpaqueLayer(3), nn.Linear(3, 2))
    x = torch.randn(4, 2)
    with pytest.raises(UserError, match=r"OpaqueLayer '1' cannot be differentiated twice"):
        probe(student, lambda: student(x).square().sum())
    probe(student[0], lambda: student[0](x).square().sum())


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Opaque(nn.Module):
    """Such a layer without parameters of its own."""

    def forward(self, x):
        return _Opaque.apply(x, torch.ones(x.shape[1]))


@pytest.mark.parametrize("layer", [Residual(Opaque()), nn.Sequential(Opaque())])
def test_it_is_named_where_the_gradient_goes_on_by_another_way(layer):
    """Beside a residual connection, or as the gradient of a weight, whose input depends on more."""
    inside = nn.Linear(3, 3, bias=False)
    student = nn.Sequential(nn.Linear(2, 3), inside, layer, nn.Linear(3, 2))
    x = torch.randn(4, 2)
    with pytest.raises(UserError, match=r"Opaque '2.*' cannot be differentiated twice"):
        probe(student, lambda: student(x).square().sum())


def test_gradients_that_are_constant_in_themselves_are_no_cut():
    """Of an unused parameter, of zero, and of the data."""
    student = nn.Sequential(nn.Linear(2, 3), Residual(nn.ReLU()), nn.Linear(3, 2))
    student.register_parameter("unused", nn.Parameter(torch.ones(2)))
    x = torch.randn(4, 2, requires_grad=True)
    probe(student, lambda: student(x).sum() + 0.0 * student(-x).round().sum())


@pytest.mark.parametrize("student", [nn.Conv1d(1, 1, 1), nn.LSTM(1, 1)])
def test_convolutions_add_in_a_fixed_order(student):
    assert not torch.backends.cudnn.deterministic
    with twice_differentiable(student):
        assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class Cube(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x**3)


def test_probe_names_the_module_without_second_derivative():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Cube()), nn.Linear(3, 1))
    with pytest.raises(UserError, match=r"Cube '1\.0'"):
        probe(model, lambda: model(torch.ones(2, 3)).sum())
    fine = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    probe(fine, lambda: fine(torch.ones(2, 3)).sum())


def test_fused_attention_can_be_differentiated_twice_inside_the_context():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with twice_differentiable(nn.Identity()):
        out = nn.functional.scaled_dot_product_attention(q, q, q).sum()
        first = torch.autograd.grad(out, q, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), q)[0]
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_layers_whose_gradient_is_no_derivative_are_named(setting):
    """The hypergradient was off by 1e-3 without a word."""
    module = nn.Sequential(nn.Embedding(3, 2, **setting))
    with pytest.raises(UserError, match=f"Embedding '0' has {next(iter(setting))}, which"):
        refuse_untrue_gradients(module)
    refuse_untrue_gradients(nn.Embedding(3, 2, padding_idx=1))
