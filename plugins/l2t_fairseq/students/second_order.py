"""Right second derivatives where fairseq's models have wrong ones.

In ``fconv`` it is fairseq's ``GradMultiply``, whose backward is no derivative of its forward, that
comes out wrong without a word when a gradient is differentiated again (its weight norm is mended by
:mod:`l2t_core.hypergradients.weight_norm`). Another is apex's layer norm, which fairseq takes
beside a GPU where apex is installed: autograd does not see through its kernels. torch's has the
same attributes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# Whether gradients that are computed now are those of the values, not scaled.
_true: ContextVar[bool] = ContextVar("_true", default=False)

_SCALED = ("fairseq.models.fconv", "fairseq.models.fconv_self_att")


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``scale``, differentiable twice.

    The scaled gradient g is a function of its own. When g is differentiated, what leads back
    through the gradient's graph is scaled, since g is; what leads back through the values is not,
    since they are the identity's. The second pass over a node is the one through the values.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.passes = (1.0 if _true.get() else scale), 0
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.passes += 1
        return (gradients[0] * ctx.scale if ctx.passes == 1 else gradients[0]), None


@contextlib.contextmanager
def true_gradients() -> Iterator[None]:
    """Leave gradients unscaled in what is computed here: a measure's derivative, not a step's."""
    token = _true.set(True)
    try:
        yield
    finally:
        _true.reset(token)


def mend_second_derivatives(module: nn.Module) -> nn.Module:
    """Return ``module`` with right second derivatives; values and gradients stay as they are.

    ``GradMultiply`` is replaced for the process: fairseq's models look it up by name.
    """
    for name in _SCALED:
        models: Any = importlib.import_module(name)
        models.GradMultiply = ScaledGradient
    for part in module.modules():
        if type(part).__name__ == "FusedLayerNorm":
            part.__class__ = nn.LayerNorm
    return module
