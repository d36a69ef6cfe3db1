"""Update rules: from a hypergradient to theta's next value.

``adam`` is torch's. ``cold-lstm`` is the teacher of L2T-DLN (Hai et al. 2023): an optimiser that
is learnt while it is used, the same for each number of theta. ``lstm`` is the same network beside
a direct way for a gradient's sign, which it begins with: alone it may learn to stand still.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from l2t_core.errors import UserError
from l2t_core.registry import Registry
from l2t_core.specs import TrainingSpec
from l2t_core.students.flat import overwrite, pieces_of
from l2t_core.teachers.architectures import Teacher

SIZES = (2, 64, 64, 64, 1)  # of the LSTM's input and its four cells, the authors' numbers
_SMALLEST = 10.0  # p: of numbers below e^-p the LSTM sees the size itself, not its logarithm
# Each number of theta has 386 of the LSTM's own, its cells' states, and twice as many gates.
COORDINATES_LIMIT = 100_000


class UpdateRule(Protocol):
    """Moves a teacher's theta; holds what it remembers from update to update."""

    def step(self, descent: Tensor) -> None:
        """Move theta, in place, given the gradient [D] of what is to fall, -M-tilde."""

    def learn(self, descent: Tensor) -> None:
        """Learn from that gradient [D] where the last :meth:`step` has led to.

        It is called by ways that live a window again under the new theta
        (:data:`l2t_core.specs.LEARNED_RULES`).
        """

    def forget(self) -> None:
        """Let the last :meth:`step` go unjudged: what it led to is not known."""

    def pack(self) -> dict[str, Tensor]:
        """Return what the rule remembers, by name."""

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`pack` returned, on theta's device.

        Raises:
            RuntimeError, KeyError, ValueError: if it is another run's.
        """


UPDATE_RULES: Registry[Callable[[Teacher, TrainingSpec], UpdateRule]] = Registry("update rule")


@UPDATE_RULES.register("adam")
class AdamRule:
    """Adam at ``training.lr``."""

    def __init__(self, teacher: Teacher, spec: TrainingSpec) -> None:
        self.theta = list(teacher.parameters())
        self.optimiser = torch.optim.Adam(self.theta, lr=spec.lr)

    def step(self, descent: Tensor) -> None:
        """Make Adam's step."""
        for parameter, piece in zip(self.theta, pieces_of(descent, self.theta), strict=True):
            parameter.grad = piece
        self.optimiser.step()

    def learn(self, descent: Tensor) -> None:
        """Learn nothing."""

    def forget(self) -> None:
        """Do nothing."""

    def pack(self) -> dict[str, Tensor]:
        """Return Adam's moments."""
        return packed_adam(self.optimiser)

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Take over Adam's moments."""
        unpack_adam(self.optimiser, tensors)


class CoordinateLstm(nn.Module):
    """LSTM cells one over the other, the same for every coordinate.

    What the last one gives, in (-1, 1), is the coordinate's change. If not ``cold``, the gradient's
    sign times a gain is added; it begins as that alone, with a gain of one.
    """

    def __init__(self, cold: bool) -> None:
        super().__init__()
        self.gain = None if cold else nn.Parameter(torch.ones(()))
        self.cells = nn.ModuleList(nn.LSTMCell(a, b) for a, b in pairwise(SIZES))
        if not cold:  # nothing is what the last cell takes in; that it learns to is in reach
            for parameter in self.cells[-1].parameters():
                parameter.data[2 * SIZES[-1] : 3 * SIZES[-1]] = 0.0

    def start(self, coordinates: int) -> list[Tensor]:
        """Return the states of cells that have seen nothing: h and c of each, [D, width]."""
        like = next(self.parameters())
        return [like.new_zeros(coordinates, width) for width in SIZES[1:] for _ in ("h", "c")]

    def forward(self, gradient: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the change [D] that answers ``gradient`` [D], and the cells' next states."""
        seen, after = preprocessed(gradient), []
        found = seen
        for i, cell in enumerate(self.cells):
            found, c = cell(found, (states[2 * i], states[2 * i + 1]))
            after += [found, c]
        change = found.squeeze(1)
        return change if self.gain is None else change + self.gain * seen[:, 1], after


def preprocessed(gradient: Tensor) -> Tensor:
    """Return what an LSTM sees of each number g of a gradient [D], [D, 2].

    (log|g| / p, sign g) where |g| >= e^-p, else (-1, e^p g), p = 10: sizes of all magnitudes in
    numbers near one (Andrychowicz et al. 2016, appendix A).
    """
    size = gradient.abs()
    large = size >= math.exp(-_SMALLEST)
    logs = size.clamp_min(math.exp(-_SMALLEST)).log() / _SMALLEST
    signs = torch.where(large, gradient.sign(), gradient * math.exp(_SMALLEST))
    return torch.stack([logs, signs], 1)  # the first is -1 for all that is small


class LstmRule:
    """A coordinate-wise LSTM, theta <- theta - ``training.lr`` g, that learns to update theta.

    Its own weights take a step of Adam at ``training.rule_lr`` each time that a window was lived
    again under the theta that it has made, along the gradient that the window's M-tilde has then
    through that last update; what the cells remembered before it counts as given.
    """

    def __init__(self, teacher: Teacher, spec: TrainingSpec, cold: bool = False) -> None:
        self.theta, self.lr = list(teacher.parameters()), spec.lr
        count = sum(p.numel() for p in self.theta)
        if count > COORDINATES_LIMIT:
            raise UserError(
                f"training.update_rule={spec.update_rule} is for teachers of up to "
                f"{COORDINATES_LIMIT:,} numbers, and this one has {count:,}; use adam, fewer "
                "teacher.slots or a smaller loss.form"
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(spec.seed)
            network = CoordinateLstm(cold)
        self.network = network.to(self.theta[0])
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=spec.rule_lr)
        self.states = self.network.start(count)
        self._change: Tensor | None = None  # the last one, with its graph
        self._after = parameters_to_vector(self.theta).detach()  # what it made of theta

    def step(self, descent: Tensor) -> None:
        """Move theta by the LSTM's answer."""
        with torch.enable_grad():
            self._change, states = self.network(descent, self.states)
        self.states = [s.detach() for s in states]
        before = parameters_to_vector(self.theta).detach()
        self._after = before - self.lr * self._change.detach()
        overwrite(self.theta, self._after)

    def learn(self, descent: Tensor) -> None:
        """Make a step of Adam on the LSTM's weights; none where there was no update."""
        if self._change is None:
            return
        # A number of theta that has been put back within its bounds would not have moved.
        kept = parameters_to_vector(self.theta).detach() == self._after
        self.optimiser.zero_grad()
        self._change.backward(-self.lr * descent * kept)
        self._change = None
        self.optimiser.step()

    def forget(self) -> None:
        """Drop the last update's graph."""
        self._change = None

    def pack(self) -> dict[str, Tensor]:
        """Return the LSTM's weights, its cells' states and its Adam's moments."""
        network = {f"lstm.{name}": value for name, value in self.network.state_dict().items()}
        states = {f"cells.{i}": state for i, state in enumerate(self.states)}
        return network | states | packed_adam(self.optimiser)

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Take over the LSTM, its cells' states and its Adam's moments."""
        self.network.load_state_dict(part(tensors, "lstm."))
        for i, state in enumerate(self.states):  # in place: aligned as they were
            state.copy_(tensors[f"cells.{i}"].view_as(state))
        unpack_adam(self.optimiser, tensors)


UPDATE_RULES.register("lstm")(LstmRule)
UPDATE_RULES.register("cold-lstm")(functools.partial(LstmRule, cold=True))


def packed_adam(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an Adam's moments and steps by name."""
    return {
        f"adam.{index}.{name}": value
        for index, slots in optimiser.state_dict()["state"].items()
        for name, value in slots.items()
    }


def unpack_adam(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take over what :func:`packed_adam` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part(tensors, "adam.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return those of ``tensors`` whose names begin with ``prefix``, without it."""
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
