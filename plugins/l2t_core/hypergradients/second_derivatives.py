"""The second derivatives that one step back needs: H v and its counterpart for phi.

With L_t the mean taught loss of step t, g its gradient and v [P] a direction, the way back needs
H v = d<g, v>/d omega and d<g, v>/d phi (Algorithm 1, line 4, of L2T-DLF). Every way to get them
is a class with the method ``at(step, phi, direction, gradient)``, under a name in :data:`SECOND`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from l2t_core.hypergradients import lstm
from l2t_core.hypergradients.double_backward import twice_differentiable
from l2t_core.hypergradients.tracing import TracedFunction, Untraceable
from l2t_core.losses.forms import Coefficients
from l2t_core.losses.taught import step_loss, taught_at
from l2t_core.registry import Registry
from l2t_core.specs import LossSpec
from l2t_core.students.life import LOSS_SCALES, Life, over

Parts = list[Tensor | None]
# From a function that returns g [P] to v [P]. Not every optimiser's v depends on g.
Direction = Callable[[Callable[[], Tensor]], Tensor]


class SecondDerivatives(Protocol):
    """One way to get second derivatives at the module's current parameters.

    ``wants_gradient`` tells whether asking for g costs a gradient, so that the forward run had
    better keep it for an optimiser that needs it; ``needs_gradient`` whether H v is made of it,
    so that it is kept for any. ``approximate``: the result is not exact.
    """

    wants_gradient: bool
    needs_gradient: bool
    approximate: bool

    def at(
        self, step: int, phi: Coefficients, direction: Direction, gradient: Tensor | None = None
    ) -> tuple[Parts, Parts]:
        """Return H v, one part per parameter, and d<g, v>/d phi, one per part of phi.

        None stands for zero; both are means over this process's part of the batch. The module
        must hold the state before ``step``; its buffers may move on as in the forward step.
        ``gradient`` is g [P], if known.
        """


# Of omega's norm, a direction's in float16, with each of the loss's scales.
_SHARES = (2.0**-3, 2.0**-6)

SECOND: Registry[Any] = Registry("way to get second derivatives (training.hvp)")


def _double_backward(
    life: Life, loss: LossSpec, step: int, batch: Any, phi: Coefficients,
    pieces_of: Callable[[list[Tensor | None]], list[Tensor]], scale: float = 1.0,
) -> tuple[Parts, Parts]:
    """Return both derivatives; ``scale`` is the power of two that the loss is multiplied by."""
    with torch.enable_grad(), twice_differentiable(life.student.module), own_lstm(life):
        leaves = {name: part.detach().requires_grad_() for name, part in phi.items()}
        log_probs, targets = life.predict(batch)
        value = step_loss(loss, log_probs, targets, leaves, step).mean()
        gradients = life.graph_of_gradients(value if scale == 1.0 else value * scale)
        pieces = pieces_of(over(gradients, scale))
        pairs = [
            (g, v) for g, v in zip(gradients, pieces, strict=True)
            if g is not None and g.requires_grad
        ]
        found = torch.autograd.grad(
            [g for g, _ in pairs],
            [*life.flat.parameters, *leaves.values()],
            [v for _, v in pairs],
            allow_unused=True,
        )
    count, plain = len(life.flat.parameters), over(found, scale)
    return plain[:count], plain[count:]


def own_lstm(life: Life) -> contextlib.AbstractContextManager[object]:
    """Choose the LSTM that is cheap to differentiate twice, where the student has one.

    Not for the student's own steps, which torch's fused kernel makes faster; nor in low precision,
    of which only torch's kernels know.
    """
    has_one = any(isinstance(m, nn.LSTM) for m in life.student.module.modules())
    return lstm.TwiceDifferentiable() if has_one and life.cast is None else contextlib.nullcontext()


def _enlarged(life: Life, v: Tensor, share: float) -> tuple[Tensor, float]:
    """Return v times a power of two that float16 can tell from zero, and that power.

    A hypergradient's elements may be 1e-8, and what H v is made of lies in between. As large as
    ``share`` of omega (0: as it is), v is to the student's activations what a small step of
    training is.
    """
    norm = float(v.norm()) if share else 0.0
    if not 0.0 < norm < math.inf:
        return v, 1.0
    power = 2.0 ** math.floor(math.log2(max(float(life.shown.norm()), 1.0) * share / norm))
    return v * power, power


@SECOND.register("exact")
class Exact:
    """Reverse over reverse: exact, by autograd's double backward.

    For a student whose batches keep one shape (``fixed_shapes``) the derivative is recorded once
    as a flat list of operations and replayed. The same operations in the same order give the same
    bits, and those whose results are never used, the gradient's own value above all, are left
    out: 2.6 gradients' time becomes 1.8 for a fully connected net.
    """

    needs_gradient = False
    approximate = False

    def __init__(self, life: Life, loss: LossSpec, trace: bool = True) -> None:
        self.life, self.loss = life, loss
        self.wants_gradient = trace and getattr(life.student, "fixed_shapes", False)
        self.traced: dict[Any, TracedFunction | None] = {}
        self.checked: dict[Any, int] = {}  # in which life each was compared last

    def at(
        self, step: int, phi: Coefficients, direction: Direction, gradient: Tensor | None = None
    ) -> tuple[Parts, Parts]:
        """Return H v and d<g, v>/d phi."""
        life = self.life
        if not life.half:
            return self._at(step, phi, direction)
        before = life.buffers.copy()
        for scale, share in zip(LOSS_SCALES, _SHARES, strict=True):
            life.buffers.load(before)
            found = self._at(step, phi, direction, scale, share)
            if life.finite_everywhere([*found[0], *found[1]]):
                break
        return found

    def _at(
        self, step: int, phi: Coefficients, direction: Direction, scale: float = 1.0,
        share: float = 0.0,
    ) -> tuple[Parts, Parts]:
        life = self.life
        batch = life.batch(step)
        if self.wants_gradient:
            leaves, layout = pytree.tree_flatten(batch)
            if all(isinstance(leaf, Tensor) for leaf in leaves):
                v = direction(lambda: _gradient(life, self.loss, step, phi))
                v, power = _enlarged(life, v, share)
                curved, steered = self._replay(
                    step, phi, life.flat.split(v), leaves, layout, scale
                )
                return over(curved, power), over(steered, power)
        power = 1.0

        def pieces_of(gradients: list[Tensor | None]) -> list[Tensor]:
            nonlocal power
            with torch.no_grad():
                v = direction(lambda: life.gathered(gradients))
                v, power = _enlarged(life, v, share)
                return life.flat.split(v)

        life.seed(step)
        curved, steered = _double_backward(life, self.loss, step, batch, phi, pieces_of, scale)
        return over(curved, power), over(steered, power)

    def _replay(
        self, step: int, phi: Coefficients, pieces: list[Tensor], leaves: list[Tensor],
        layout: Any, scale: float,
    ) -> tuple[Parts, Parts]:
        life, names = self.life, list(phi)
        # As text: before torch 2.3 a layout cannot be hashed.
        shapes = ((x.shape, x.dtype) for x in leaves)
        key = (taught_at(self.loss, step), scale, str(layout), *shapes)
        inputs = [*pieces, *phi.values(), *leaves]

        def function(*flat: Tensor) -> tuple[Parts, Parts]:
            first, second = len(pieces), len(pieces) + len(names)
            batch = pytree.tree_unflatten(list(flat[second:]), layout)
            coefficients = dict(zip(names, flat[first:second], strict=True))
            return _double_backward(
                life, self.loss, step, batch, coefficients, lambda _: list(flat[:first]), scale
            )

        if key not in self.traced:
            try:
                self.traced[key] = TracedFunction(
                    function, inputs, life.buffers, lambda: life.seed(step)
                )
            except Untraceable:
                self.traced[key] = None
        life.seed(step)
        traced = self.traced[key]
        if traced is None:
            return function(*inputs)
        # Once in each life, too: a student may begin one with other data, which a recording holds.
        if not traced.trusted or self.checked.get(key) != life.number:
            self.checked[key] = life.number
            found = traced.check(function, inputs, life.buffers, lambda: life.seed(step))
            if not traced.sound:
                self.traced[key] = None
            return found
        return traced(*inputs)


@SECOND.register("finite-difference")
class FiniteDifference:
    """Central differences of the gradient along v: for students without double backward.

    H v = (g(omega + h v) - g(omega - h v)) / 2h and likewise for phi, with h = ``relative`` times
    (1 + ||omega||) / ||v||: two gradients a step. The error is of order h^2 from the formula and
    of the rounding error over h from the arithmetic. A fifth of the precision's cube root was best
    or nearly so for an LSTM, a Transformer and LeNet in float32: errors of 0.3 to 4 % of the
    hypergradient's norm over 100 steps, the least that ReLU's kinks and rounding leave.
    """

    wants_gradient = True
    needs_gradient = False
    approximate = True
    factor, root = 0.2, 3  # of ``relative``: times this root of the precision

    def __init__(self, life: Life, loss: LossSpec, trace: bool = True) -> None:
        self.life, self.loss = life, loss
        self.relative = self.factor * torch.finfo(life.flat.vector.dtype).eps ** (1.0 / self.root)

    def at(
        self, step: int, phi: Coefficients, direction: Direction, gradient: Tensor | None = None
    ) -> tuple[Parts, Parts]:
        """Return H v and d<g, v>/d phi."""
        life = self.life
        if self.needs_gradient and gradient is None:
            gradient = _gradient(life, self.loss, step, phi)
        known = gradient
        v = direction(lambda: _gradient(life, self.loss, step, phi) if known is None else known)
        norm, count = float(v.norm()), len(life.flat.parameters)
        if norm == 0.0:
            return [None] * count, [None] * len(phi)
        h = self.relative * (1.0 + float(life.shown.norm())) / norm
        found = self._quotients(step, phi, v, h, gradient)
        return found[:count], found[count:]

    def _quotients(
        self, step: int, phi: Coefficients, v: Tensor, h: float, gradient: Tensor | None
    ) -> Parts:
        """Return H v and d<g, v>/d phi in one list."""
        before = self.life.buffers.copy()
        above = self._first(step, phi, v, h)
        self.life.buffers.load(before)  # both sides see the same buffers
        return _quotients(above, self._first(step, phi, v, -h), 2.0 * h)

    def _kernels(self) -> contextlib.AbstractContextManager[None]:
        """Choose the kernels: on a GPU those of the student's step, for others draw other masks.

        On a CPU fused ones are as good and faster: they are taken there without dropout only.
        """
        if self.life.flat.vector.is_cuda:
            return twice_differentiable(self.life.student.module)
        return contextlib.nullcontext()

    def _first(self, step: int, phi: Coefficients, v: Tensor, h: float) -> Parts:
        """Return the loss's first derivatives at omega + h v."""
        life, omega = self.life, self.life.shown
        life.show(torch.add(omega, v, alpha=h))
        with torch.enable_grad(), self._kernels():
            leaves = {name: part.detach().requires_grad_() for name, part in phi.items()}
            log_probs, targets = life.outputs(step)
            value = step_loss(self.loss, log_probs, targets, leaves, step).mean()
            found = torch.autograd.grad(
                value, [*life.flat.parameters, *leaves.values()], allow_unused=True
            )
        life.show(omega)
        return list(found)


@SECOND.register("one-sided-difference")
class OneSidedDifference(FiniteDifference):
    """Differences between the gradient beside omega and the step's own, which is kept.

    H v = (g(omega + h v) - g(omega)) / h: one gradient a step, and a forward pass for phi. The
    formula's error is of order h with the sign of h, which changes from step to step, so that it
    does not add up along the way back. Six times the precision's root is a compromise in float32:
    smooth students (LSTM, Transformer) want less, those with kinks (LeNet) more; errors of 0.3 to
    5 % of the hypergradient's norm over 100 steps.
    """

    needs_gradient = True
    factor, root = 6.0, 2

    def _quotients(
        self, step: int, phi: Coefficients, v: Tensor, h: float, gradient: Tensor | None
    ) -> Parts:
        assert gradient is not None
        before = self.life.buffers.copy()
        here = [*self.life.flat.split(gradient), *self._of_phi(step, phi)]
        self.life.buffers.load(before)
        h = h if step % 2 else -h
        above = self._first(step, phi, v, h)
        # What this process's share of the batch does not use, others' may: g is all processes'.
        filled = [
            torch.zeros_like(b) if a is None and b is not None else a
            for a, b in zip(above, here, strict=True)
        ]
        return _quotients(filled, here, h)

    def _of_phi(self, step: int, phi: Coefficients) -> Parts:
        """Return the loss's derivatives by phi at omega: a pass forward."""
        with torch.no_grad(), self._kernels():
            log_probs, targets = self.life.outputs(step)
        with torch.enable_grad():
            leaves = {name: part.detach().requires_grad_() for name, part in phi.items()}
            value = step_loss(self.loss, log_probs, targets, leaves, step).mean()
            return list(torch.autograd.grad(value, list(leaves.values()), allow_unused=True))


def _quotients(above: Parts, below: Parts, width: float) -> Parts:
    return [
        None if a is None or b is None else (a - b).div_(width)
        for a, b in zip(above, below, strict=True)
    ]


def _gradient(life: Life, loss: LossSpec, step: int, phi: Coefficients) -> Tensor:
    """Return g [P] of ``step``, as :meth:`Life.gathered`, leaving the buffers as they were."""
    before = life.buffers.copy()
    with torch.enable_grad(), twice_differentiable(life.student.module):
        log_probs, targets = life.outputs(step)
        value = step_loss(loss, log_probs, targets, phi, step).mean()
        gradient = life.gathered(life.gradients(value))
    life.buffers.load(before)
    return gradient
