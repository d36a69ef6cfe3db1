"""Optimisers as pure functions with their own vector-Jacobian products, equal to torch.optim's.

The whole state of a student's training is one tensor [R, P]: row 0 holds the P parameters omega,
the other rows the optimiser's moments. One tensor makes a step a handful of vector operations
whatever the number of layers, and makes keeping, recomputing or spilling a state a single copy.

A parameter that a step does not use has a gradient of zero there: momentum and decay go on, where
torch.optim would skip it.

``update`` is differentiable, which is what the tests hold ``pull_back`` against; the engine calls
``pull_back``, written out by hand, because autograd would build a dozen vectors of P a step.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from l2t_core.errors import NoEffect, UserError
from l2t_core.registry import Registry
from l2t_core.specs import OptimiserSpec

# Added to a norm before dividing by it, as torch's clip_grad_norm_ does.
_CLIP_EPS = 1e-6


class Optimiser(Protocol):
    """An optimiser: its number of rows R, its initial state, one step, and that step's VJP.

    ``needs_gradient`` tells whether the VJP depends on the value of the gradient.
    """

    rows: int
    needs_gradient: bool

    def initial(self, parameters: Tensor) -> Tensor:
        """Return the state [R, P] around parameters [P]."""

    def update(
        self, state: Tensor, gradient: Tensor, step: int, lr: float, out: Tensor | None = None
    ) -> Tensor:
        """Return the state [R, P] after 0-based ``step`` with gradient [P] and rate ``lr``.

        Written to ``out`` [R, P], which may not be ``state``, if given.
        """

    def pull_back(
        self, state: Tensor, gradient: Tensor | None, cotangent: Tensor, step: int, lr: float
    ) -> Tensor:
        """Pull ``cotangent`` [R, P] of the state after the step back to before it, in place.

        Returns the cotangent of the gradient [P]; what flows to omega through the gradient is
        the caller's to add. ``state`` is that before the step; ``gradient`` [P] may be None
        where ``needs_gradient`` is false.
        """


OPTIMISERS: Registry[type[Sgd] | type[Adam]] = Registry("optimiser")


def clip_by_norm(gradient: Tensor, max_norm: float) -> Tensor:
    """Return ``gradient`` scaled to at most ``max_norm``, as torch's clip_grad_norm_ does it."""
    if max_norm <= 0.0:
        return gradient
    norm = torch.linalg.vector_norm(gradient)
    return gradient * (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)


def pull_back_clip(gradient: Tensor, max_norm: float, cotangent: Tensor) -> Tensor:
    """Pull ``cotangent`` [P] back through :func:`clip_by_norm` at ``gradient`` [P], in place."""
    if max_norm <= 0.0:
        return cotangent
    norm = torch.linalg.vector_norm(gradient)
    scale = max_norm / (norm + _CLIP_EPS)
    if bool(scale > 1.0):
        return cotangent
    if not bool(norm):  # clipped all the same if max_norm is below eps; the norm has no slope
        return cotangent.mul_(scale)
    # d scale / d gradient = -max_norm / (norm + eps)^2 * gradient / norm
    along = torch.dot(cotangent, gradient) * (scale / (norm + _CLIP_EPS) / norm)
    return cotangent.mul_(scale).addcmul_(gradient, -along)


def _safe_root(squares: Tensor, eps_root: float) -> Tensor:
    """Return sqrt(squares + eps_root) with derivative 0, not infinity, where that is zero."""
    squares = squares + eps_root if eps_root else squares
    if not (squares.requires_grad and torch.is_grad_enabled()):
        return squares.sqrt()  # the same bits, in one pass instead of four
    at_zero = squares == 0
    return torch.where(at_zero, 0.0, torch.where(at_zero, 1.0, squares).sqrt())


def _rows(out: Tensor | None, count: int) -> list[Tensor | None]:
    return [None] * count if out is None else list(out.unbind(0))


class Sgd:
    """SGD, plain or with (Nesterov) momentum, equal to torch.optim.SGD."""

    def __init__(self, spec: OptimiserSpec) -> None:
        self.spec = spec
        self.rows = 1 if spec.name == "sgd" else 2
        self.needs_gradient = spec.clip_norm > 0.0

    def initial(self, parameters: Tensor) -> Tensor:
        """Return the state [R, P]; a zero velocity makes the first step torch's."""
        zeros = parameters.new_zeros(self.rows - 1, parameters.shape[0])
        return torch.cat([parameters.unsqueeze(0), zeros])

    def update(
        self, state: Tensor, gradient: Tensor, step: int, lr: float, out: Tensor | None = None
    ) -> Tensor:
        """Return the state [R, P] after one step."""
        spec, omega, rows = self.spec, state[0], _rows(out, self.rows)
        direction = clip_by_norm(gradient, spec.clip_norm)
        if spec.weight_decay:
            direction = torch.add(direction, omega, alpha=spec.weight_decay)
        parts = []
        if self.rows == 2:
            velocity = torch.add(direction, state[1], alpha=spec.momentum, out=rows[1])
            parts.append(velocity)
            nesterov = spec.name == "nesterov"
            direction = (
                torch.add(direction, velocity, alpha=spec.momentum) if nesterov else velocity
            )
        after = torch.add(omega, direction, alpha=-lr, out=rows[0])
        return torch.stack([after, *parts]) if out is None else out

    def pull_back(
        self, state: Tensor, gradient: Tensor | None, cotangent: Tensor, step: int, lr: float
    ) -> Tensor:
        """Pull ``cotangent`` [R, P] back in place; return the gradient's cotangent [P]."""
        spec, d_omega = self.spec, cotangent[0]
        if self.rows == 1:
            d_direction = d_omega * -lr
        elif spec.name == "nesterov":
            # omega' = omega - lr (direction + momentum v'), v' = momentum v + direction
            d_velocity = cotangent[1].sub_(d_omega, alpha=lr * spec.momentum)
            d_direction = torch.sub(d_velocity, d_omega, alpha=lr)
            d_velocity.mul_(spec.momentum)
        else:
            d_direction = torch.sub(cotangent[1], d_omega, alpha=lr)
            torch.mul(d_direction, spec.momentum, out=cotangent[1])
        if spec.weight_decay:
            d_omega.add_(d_direction, alpha=spec.weight_decay)
        if not self.needs_gradient:
            return d_direction
        assert gradient is not None
        return pull_back_clip(gradient, spec.clip_norm, d_direction)


class Adam:
    """Adam and AdamW, equal to torch.optim's, or to fairseq's with ``eps_form="fairseq"``.

    fairseq adds eps to the root of the uncorrected second moment and always decouples weight
    decay. ``eps_root`` is added under the root (0 as in torch); the root's derivative at zero is
    taken as zero, since the true one is infinite and turns hypergradients into NaN.
    """

    needs_gradient = True

    def __init__(self, spec: OptimiserSpec, eps_form: str = "torch") -> None:
        self.spec = spec
        self.rows = 3
        self.eps_form = eps_form
        self.decoupled = spec.name == "adamw" or eps_form == "fairseq"

    def initial(self, parameters: Tensor) -> Tensor:
        """Return the state [3, P]: parameters, first and second moment."""
        zeros = parameters.new_zeros(2, parameters.shape[0])
        return torch.cat([parameters.unsqueeze(0), zeros])

    def _direction(self, omega: Tensor, gradient: Tensor) -> Tensor:
        """Return what enters the moments: the gradient, clipped, with coupled decay."""
        gradient = clip_by_norm(gradient, self.spec.clip_norm)
        if self.spec.weight_decay and not self.decoupled:
            gradient = torch.add(gradient, omega, alpha=self.spec.weight_decay)
        return gradient

    def _moments(
        self, state: Tensor, direction: Tensor, rows: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        spec = self.spec
        first = torch.lerp(state[1], direction, 1.0 - spec.beta1, out=rows[1])
        second = torch.mul(state[2], spec.beta2, out=rows[2])
        return first, second.addcmul_(direction, direction, value=1.0 - spec.beta2)

    def _corrections(self, step: int) -> tuple[float, float]:
        spec = self.spec
        return 1.0 - spec.beta1 ** (step + 1), (1.0 - spec.beta2 ** (step + 1)) ** 0.5

    def _denominator(self, root: Tensor, correction: float) -> Tensor:
        """Return what divides the first moment, from the root of the second [P]."""
        if self.eps_form == "fairseq":
            return (root + self.spec.eps).div_(correction)
        return (root / correction).add_(self.spec.eps)

    def update(
        self, state: Tensor, gradient: Tensor, step: int, lr: float, out: Tensor | None = None
    ) -> Tensor:
        """Return the state [3, P] after one step."""
        spec, omega, rows = self.spec, state[0], _rows(out, 3)
        first, second = self._moments(state, self._direction(omega, gradient), rows)
        if spec.weight_decay and self.decoupled:
            omega = omega * (1.0 - lr * spec.weight_decay)
        first_correction, second_correction = self._corrections(step)
        denominator = self._denominator(_safe_root(second, spec.eps_root), second_correction)
        after = torch.addcdiv(omega, first, denominator, value=-lr / first_correction, out=rows[0])
        return torch.stack([after, first, second]) if out is None else out

    def pull_back(
        self, state: Tensor, gradient: Tensor | None, cotangent: Tensor, step: int, lr: float
    ) -> Tensor:
        """Pull ``cotangent`` [3, P] back in place; return the gradient's cotangent [P]."""
        assert gradient is not None
        spec = self.spec
        d_omega, d_first, d_second = cotangent.unbind(0)
        direction = self._direction(state[0], gradient)
        # Four vectors at a time beside the direction: this is where an episode's memory peaks.
        first, root = self._moments(state, direction, [None, None, None])
        first_correction, second_correction = self._corrections(step)
        root = _safe_root(root, spec.eps_root)
        denominator = self._denominator(root, second_correction)
        d_scaled = d_omega * (-lr / first_correction)
        d_first.addcdiv_(d_scaled, denominator)
        # d root = -d_scaled first / denominator^2 / correction; d second = d root / (2 root), and
        # 0 where the root is, as _safe_root has it.
        # Divided twice: the square of an element that never had a gradient, eps^2, may be 0.
        d_root = d_scaled.mul_(first).div_(denominator).div_(denominator)
        d_root.div_(root.masked_fill_(root == 0, torch.inf))
        d_second.add_(d_root, alpha=-0.5 / second_correction)
        d_direction = torch.mul(d_first, 1.0 - spec.beta1, out=root)
        d_direction.addcmul_(d_second, direction, value=2.0 * (1.0 - spec.beta2))
        d_first.mul_(spec.beta1)
        d_second.mul_(spec.beta2)
        if spec.weight_decay and self.decoupled:
            d_omega.mul_(1.0 - lr * spec.weight_decay)
        elif spec.weight_decay:
            d_omega.add_(d_direction, alpha=spec.weight_decay)
        return pull_back_clip(gradient, spec.clip_norm, d_direction)


for _name in ("sgd", "momentum", "nesterov"):
    OPTIMISERS.register(_name)(Sgd)
for _name in ("adam", "adamw"):
    OPTIMISERS.register(_name)(Adam)


# Settings that not every optimiser has.
_USERS = {"momentum": ("momentum", "nesterov")} | dict.fromkeys(
    ("beta1", "beta2", "eps", "eps_root"), ("adam", "adamw")
)


def problems(spec: OptimiserSpec, section: str = "optimiser") -> list[str]:
    """Return a line for each setting that cannot be; ``section`` is where a recipe has them."""
    ranges = [
        (
            ("lr", "eps", "eps_root", "weight_decay", "clip_norm"), math.inf,
            "be 0 or more, but finite",
        ),
        (("momentum", "beta1", "beta2"), 1.0, "lie in [0, 1)"),
    ]
    found = [
        f"{section}.{name} is {getattr(spec, name)}; it must {mend}"
        for names, limit, mend in ranges
        for name in names
        if not 0.0 <= getattr(spec, name) < limit
    ]
    return found or [
        NoEffect(
            f"{section}.{name}", f"{section}.name", spec.name,
            f"use {' or '.join(users)}, or leave it out",
        )
        for name, users in _USERS.items()
        # As it is usually, or off.
        if spec.name not in users and getattr(spec, name) not in (getattr(OptimiserSpec, name), 0)
    ]


def build_optimiser(spec: OptimiserSpec, eps_form: str = "torch") -> Optimiser:
    """Return the optimiser that ``spec`` names.

    Raises:
        UserError: if the name is unknown or a setting is impossible.
    """
    kind = OPTIMISERS.get(spec.name)
    for problem in problems(spec):
        raise UserError(problem)
    return Adam(spec, eps_form) if kind is Adam else kind(spec)
