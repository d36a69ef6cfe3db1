"""Weight norm, old and new, in the engine's context: torch's values, right derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from l2t_core.hypergradients.double_backward import twice_differentiable

KINDS = {
    "hook": lambda: nn.utils.weight_norm(nn.Linear(3, 2)),
    "hook, last dimension": lambda: nn.utils.weight_norm(nn.Conv1d(2, 3, 2), dim=2),
    "hook, counted from the end": lambda: nn.utils.weight_norm(nn.Conv1d(2, 3, 2), dim=-2),
    "parametrization": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "parametrization, one norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2), dim=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_torchs_and_both_derivatives_are_right(kind):
    torch.manual_seed(1)
    layer = KINDS[kind]().double()
    x = torch.randn(4, 2, 3) if "Conv" in type(layer).__name__ else torch.randn(4, 3)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def output(*values):
        with twice_differentiable(layer):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    x = x.double()
    torch.testing.assert_close(output(*parameters), layer(x))
    values = [p.detach().clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(output, values)
    assert torch.autograd.gradgradcheck(output, values)
