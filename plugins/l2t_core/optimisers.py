"""Optimisers as pure, differentiable functions, equal to torch.optim's.

The whole state of a student's training is one tensor [R, P]: row 0 holds the P parameters omega,
the other rows the optimiser's moments. One tensor makes a step a handful of vector operations
whatever the number of layers, and makes keeping, recomputing or spilling a state a single copy.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.registry import Registry
from l2t_core.specs import OptimiserSpec


class Optimiser(Protocol):
    """An optimiser: its number of rows R, its initial state, and one step."""

    rows: int

    def initial(self, parameters: Tensor) -> Tensor:
        """Return the state [R, P] around parameters [P]."""

    def update(self, state: Tensor, gradient: Tensor, step: int, lr: float) -> Tensor:
        """Return the state [R, P] after 0-based ``step`` with gradient [P] and rate ``lr``."""


OPTIMISERS: Registry[type[Sgd] | type[Adam]] = Registry("optimiser")


def clip_by_norm(gradient: Tensor, max_norm: float) -> Tensor:
    """Return ``gradient`` scaled to at most ``max_norm``, as torch's clip_grad_norm_ does it."""
    if max_norm <= 0.0:
        return gradient
    norm = torch.linalg.vector_norm(gradient)
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _safe_root(squares: Tensor, eps_root: float) -> Tensor:
    """Return sqrt(squares + eps_root) with derivative 0, not infinity, where that is zero."""
    squares = squares + eps_root if eps_root else squares
    at_zero = squares == 0
    return torch.where(at_zero, 0.0, torch.where(at_zero, 1.0, squares).sqrt())


class Sgd:
    """SGD, plain or with (Nesterov) momentum, equal to torch.optim.SGD."""

    def __init__(self, spec: OptimiserSpec) -> None:
        self.spec = spec
        self.rows = 1 if spec.name == "sgd" else 2

    def initial(self, parameters: Tensor) -> Tensor:
        """Return the state [R, P]; a zero velocity makes the first step torch's."""
        zeros = parameters.new_zeros(self.rows - 1, parameters.shape[0])
        return torch.cat([parameters.unsqueeze(0), zeros])

    def update(self, state: Tensor, gradient: Tensor, step: int, lr: float) -> Tensor:
        """Return the state [R, P] after one step."""
        spec, omega = self.spec, state[0]
        direction = clip_by_norm(gradient, spec.clip_norm)
        if spec.weight_decay:
            direction = direction + spec.weight_decay * omega
        if self.rows == 1:
            return (omega - lr * direction).unsqueeze(0)
        velocity = spec.momentum * state[1] + direction
        nesterov = spec.name == "nesterov"
        direction = direction + spec.momentum * velocity if nesterov else velocity
        return torch.stack([omega - lr * direction, velocity])


class Adam:
    """Adam and AdamW, equal to torch.optim's, or to fairseq's with ``eps_form="fairseq"``.

    fairseq adds eps to the root of the uncorrected second moment and always decouples weight
    decay. ``eps_root`` is added under the root (0 as in torch); the root's derivative at zero is
    taken as zero, since the true one is infinite and turns hypergradients into NaN.
    """

    def __init__(self, spec: OptimiserSpec, eps_form: str = "torch") -> None:
        self.spec = spec
        self.rows = 3
        self.eps_form = eps_form
        self.decoupled = spec.name == "adamw" or eps_form == "fairseq"

    def initial(self, parameters: Tensor) -> Tensor:
        """Return the state [3, P]: parameters, first and second moment."""
        zeros = parameters.new_zeros(2, parameters.shape[0])
        return torch.cat([parameters.unsqueeze(0), zeros])

    def update(self, state: Tensor, gradient: Tensor, step: int, lr: float) -> Tensor:
        """Return the state [3, P] after one step."""
        spec, omega = self.spec, state[0]
        gradient = clip_by_norm(gradient, spec.clip_norm)
        if spec.weight_decay and self.decoupled:
            omega = omega * (1.0 - lr * spec.weight_decay)
        elif spec.weight_decay:
            gradient = gradient + spec.weight_decay * omega
        first = spec.beta1 * state[1] + (1.0 - spec.beta1) * gradient
        second = spec.beta2 * state[2] + (1.0 - spec.beta2) * gradient * gradient
        first_correction = 1.0 - spec.beta1 ** (step + 1)
        second_correction = (1.0 - spec.beta2 ** (step + 1)) ** 0.5
        root = _safe_root(second, spec.eps_root)
        if self.eps_form == "fairseq":
            scaled = first / (root + spec.eps) * second_correction
        else:
            scaled = first / (root / second_correction + spec.eps)
        return torch.stack([omega - lr / first_correction * scaled, first, second])


for _name in ("sgd", "momentum", "nesterov"):
    OPTIMISERS.register(_name)(Sgd)
for _name in ("adam", "adamw"):
    OPTIMISERS.register(_name)(Adam)


def build_optimiser(spec: OptimiserSpec, eps_form: str = "torch") -> Optimiser:
    """Return the optimiser that ``spec`` names.

    Raises:
        UserError: if the name is unknown or a setting is impossible.
    """
    kind = OPTIMISERS.get(spec.name)
    for name in ("lr", "eps", "eps_root", "weight_decay", "clip_norm"):
        if not 0.0 <= getattr(spec, name) < math.inf:
            raise UserError(f"optimiser.{name} is {getattr(spec, name)}; it must be 0 or more")
    for name in ("momentum", "beta1", "beta2"):
        if not 0.0 <= getattr(spec, name) < 1.0:
            raise UserError(f"optimiser.{name} is {getattr(spec, name)}; it must lie in [0, 1)")
    return Adam(spec, eps_form) if kind is Adam else kind(spec)
