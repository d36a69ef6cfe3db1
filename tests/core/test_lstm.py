"""The LSTM's own derivatives against finite differences and against torch's."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from l2t_core.hypergradients.lstm import TwiceDifferentiable, _Layer, _Steps

WIDTH, INPUTS = 2, 3
KINDS = {
    "plain": {},
    "without biases": {"bias": False, "batch_first": True},
    "deep": {"num_layers": 3, "dropout": 0.3},
    "both ways": {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "batch_first": True},
}


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 2, 1, 1], [1]], ids=str)
def test_both_derivatives_equal_finite_differences(sizes):
    torch.manual_seed(0)
    shapes = [(sum(sizes), 4 * WIDTH), (4 * WIDTH, WIDTH), *[(sizes[0], WIDTH)] * 2]
    arguments = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    steps = _Steps(sizes, torch.device("cpu"))

    def layer(*values):
        return _Layer.apply(*values, steps)

    assert torch.autograd.gradcheck(layer, arguments)
    assert torch.autograd.gradgradcheck(layer, arguments)


def outputs(net, x, hx, lengths, own):
    """Return y, h and c with the same dropout masks at every call."""
    torch.manual_seed(5)
    if lengths is not None:
        x = pack_padded_sequence(x, lengths, net.batch_first, enforce_sorted=False)
    with TwiceDifferentiable() if own else contextlib.nullcontext():
        y, ends = net(x, hx)
    return (y if lengths is None else y.data), *ends


@pytest.mark.parametrize("lengths", [None, [2, 4, 1]], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives_are_those_of_torch(kind, lengths):
    torch.manual_seed(1)
    net = nn.LSTM(INPUTS, WIDTH, **KINDS[kind]).double()
    shape = (3, 4, INPUTS) if net.batch_first else (4, 3, INPUTS)
    states = net.num_layers * (2 if net.bidirectional else 1), 3, WIDTH
    x, *hx = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, states, states)
    )
    inputs = [x, *hx, *net.parameters()]

    def everything(own):
        y, h, c = outputs(net, x, hx, lengths, own)
        assert own == any("_Layer" in node for node in nodes(y))
        loss = y.sin().sum() + (h * c).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return [y, h, c, *first, *torch.autograd.grad(sum(g.cos().sum() for g in first), inputs)]

    for found, expected in zip(everything(True), everything(False), strict=True):
        torch.testing.assert_close(found, expected)


def nodes(y):
    """Return the names of the operations behind y."""
    queue, seen = [y.grad_fn], {}
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            queue += [following for following, _ in node.next_functions]
    return list(seen.values())


@pytest.mark.parametrize("kind", ["deep", "both ways"])
def test_dropout_masks_are_those_of_the_fused_kernel(kind):
    """Which makes the steps whose derivatives these are: other masks would be another student."""
    net = nn.LSTM(INPUTS, WIDTH, **KINDS[kind])
    x = torch.randn(4, 5, INPUTS, generator=torch.Generator().manual_seed(2))
    for found, expected in zip(
        outputs(net, x, None, None, True), outputs(net, x, None, None, False), strict=True
    ):
        torch.testing.assert_close(found, expected)
    torch.manual_seed(6)
    assert not torch.allclose(net(x)[0], outputs(net, x, None, None, True)[0])


def test_evaluation_draws_no_masks_and_frozen_weights_get_no_gradient():
    net = nn.LSTM(INPUTS, WIDTH, **KINDS["deep"]).double().eval()
    net.weight_hh_l0.requires_grad_(False)
    x = torch.randn(4, 3, INPUTS, dtype=torch.float64)
    y = outputs(net, x, None, None, True)[0]
    torch.testing.assert_close(y, outputs(net, x, None, None, False)[0])
    y.sum().backward()
    assert net.weight_hh_l0.grad is None
    assert bool(net.weight_hh_l1.grad.any())


def test_one_sequence_without_a_batch():
    net = nn.LSTM(INPUTS, WIDTH).double()
    x = torch.randn(4, INPUTS, dtype=torch.float64)
    for found, expected in zip(
        outputs(net, x, None, None, True), outputs(net, x, None, None, False), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_projections_are_left_to_torch():
    net = nn.LSTM(INPUTS, 2 * WIDTH, proj_size=WIDTH).double()
    x = torch.randn(4, 3, INPUTS, dtype=torch.float64)
    y = outputs(net, x, None, None, True)[0]
    assert not any("_Layer" in node for node in nodes(y))
    assert torch.equal(y, outputs(net, x, None, None, False)[0])
