"""Weight norm whose second derivative is right.

torch's fused kernel takes ||v|| for a constant when its gradient is differentiated again, without
a word. Here the weight is made of operations that autograd knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

_fused: Any = torch._weight_norm
# The hook of torch.nn.utils.weight_norm, and the parametrization of that name.
_KINDS = (WeightNorm, parametrizations._WeightNorm)


def has_weight_norm(module: nn.Module) -> bool:
    """Tell whether weights of ``module`` are made by torch's weight norm, old or new."""
    return any(
        isinstance(part, _KINDS)
        for layer in module.modules()
        for part in (layer, *layer._forward_pre_hooks.values())
    )


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / ||v||, the norm over all dimensions but ``dim``; -1: over all.

    Other negative numbers count from the end, as torch has it.
    """
    kept = dim % v.dim() if dim < -1 else dim
    others = [d for d in range(v.dim()) if d != kept]
    return v * (g / v.pow(2).sum(others, keepdim=True).sqrt())


class TwiceDifferentiable(TorchFunctionMode):
    """Within it ``torch._weight_norm`` has the second derivative of what it computes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type],
        args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_weight_norm if func is _fused else func)(*args, **(kwargs or {}))
