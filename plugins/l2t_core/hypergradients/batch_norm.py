"""Batch norm with a second derivative of its own.

torch takes it by some thirty elementwise operations: half of the time of a small residual net's
second derivative. In closed form it is one call of the fused backward kernel, one more reduction
and two linear combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _fused(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, d weight, d bias) of batch norm in training mode."""
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, rstd, True, eps, [True, True, True]
    )


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (like.ndim - 2)))


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor,
        running: tuple[Tensor | None, Tensor | None], momentum: float, eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.ops.aten.native_batch_norm(
            x, weight, bias, running[0], running[1], True, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        dx, d_weight, d_bias = _Backward.apply(dy, x, weight, mean, rstd, ctx.eps)
        return dx, d_weight, d_bias, None, None, None


class _Backward(torch.autograd.Function):
    """(dy, x, weight) -> (dx, d weight, d bias); mean and rstd count as functions of x."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, d_weight, d_bias = _fused(dy, x, weight, mean, rstd, eps)
        ctx.save_for_backward(dy, x, weight, mean, rstd, d_weight, d_bias)
        ctx.eps = eps
        return dx, d_weight, d_bias

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Pull back a = d/d dx [N, C, ...], b = d/d d_weight [C] and c = d/d d_bias [C].

        With xn = (x - mean) rstd, m the mean over a channel and w the weight,
        dx = w rstd (dy - m(dy) - xn m(dy xn)), d weight = sum(dy xn), d bias = sum(dy).
        """
        dy, x, weight, mean, rstd, sum_dy_xn, sum_dy = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        others = [0, *range(2, x.ndim)]
        # The same projection as of dy, and the sums that go with it.
        projected, sum_a_xn, sum_a = _fused(a, x, weight, mean, rstd, ctx.eps)
        sum_a_dy = (a * dy).sum(others)
        # By dy: w rstd (a - m(a) - xn m(a xn)) + b xn + c.
        slope = b * rstd
        d_dy = torch.addcmul(projected, x, _per_channel(slope, x))
        d_dy.add_(_per_channel(c - slope * mean, x))
        # By xn alone: e = -w rstd (m(dy xn) a + m(a xn) dy) + b dy.
        scale = weight * rstd
        on_a = -scale * sum_dy_xn / count
        on_dy = b - scale * sum_a_xn / count
        mean_e = (on_a * sum_a + on_dy * sum_dy) / count
        mean_e_xn = (on_a * sum_a_xn + on_dy * sum_dy_xn) / count
        # <a, dx> = rstd * inner * w; rstd falls by rstd^2 xn / count with x.
        inner = sum_a_dy - sum_a * sum_dy / count - sum_a_xn * sum_dy_xn / count
        on_xn = -rstd * mean_e_xn - scale * rstd * inner / count
        on_x = on_xn * rstd
        constant = -rstd * mean_e - on_x * mean
        d_x = torch.addcmul(_per_channel(constant, x), x, _per_channel(on_x, x))
        d_x.addcmul_(a, _per_channel(rstd * on_a, x))
        d_x.addcmul_(dy, _per_channel(rstd * on_dy, x))
        return d_dy, d_x, rstd * inner, None, None, None


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:
    """Do what torch.nn.functional.batch_norm does."""
    plain = not training or weight is None or bias is None or x.dtype != weight.dtype
    if plain or x.numel() <= x.shape[1]:  # which torch refuses, in its own words
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _Forward.apply(x, weight, bias, (running_mean, running_var), momentum, eps)


class TwiceDifferentiable(TorchFunctionMode):
    """Within it ``torch.nn.functional.batch_norm`` has the closed second derivative."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type],
        args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))
