"""Products of log-probabilities that a loss is made of, twice differentiable, never in half."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def target_log_probs(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return log p_y, [N], of log-probabilities [N, K] and targets [N]."""
    return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)


class PickAndProject(torch.autograd.Function):
    """log p_y [N] and log(p) U [N, r] in one function of log-probabilities [N, K] and U [K, r].

    Apart, each of the two would give back a gradient of the size of ``log_probs`` to be added to
    the other's. Here the target's entries are added in place: at 40,000 classes that is a tenth
    of the loss's time, and one [N, K] tensor less. Twice differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, targets: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        column = targets.unsqueeze(1)
        ctx.save_for_backward(log_probs, column, factors)
        with no_autocast(log_probs):
            return log_probs.gather(1, column).squeeze(1), log_probs @ factors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        picked, projected = gradients
        log_probs, column, factors = ctx.saved_tensors
        back = of_factors = None
        if ctx.needs_input_grad[0]:
            back = Product.apply(projected, factors.t())
            back.scatter_add_(1, column, picked.unsqueeze(1))
        if ctx.needs_input_grad[2]:
            of_factors = Product.apply(log_probs.t(), projected)
        return back, None, of_factors


def in_float32(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 if it is in half precision, else as it is, any shape."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Leave products at the precision of ``tensor`` and others on its device.

    In half a sum of log-probabilities overflows.
    """
    if tensor.device.type not in ("cpu", "cuda"):  # torch refuses those that know no autocast
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


class Product(torch.autograd.Function):
    """a b of matrices a [N, I] and b [I, O], not in half under autocast, the way back included."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with no_autocast(a):
            return a @ b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (a, b) = gradients, ctx.saved_tensors
        return (
            Product.apply(gradient, b.t()) if ctx.needs_input_grad[0] else None,
            Product.apply(a.t(), gradient) if ctx.needs_input_grad[1] else None,
        )


def target_and_mean(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p_y and mean_k log p_k, both [N]."""
    ones = log_probs.new_ones(log_probs.shape[1], 1)
    picked, total = PickAndProject.apply(log_probs, targets, ones)
    return picked, total.squeeze(1) / log_probs.shape[1]
