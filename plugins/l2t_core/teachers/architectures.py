"""Teachers mu_theta: from the student's state s_t [F] to the loss's coefficients phi_t.

A teacher has parameters only (theta). What one remembers of the states before, m_t [M], is kept by
who follows the student and handed to it behind s_t; most remember nothing, M = 0. All start near
the neutral coefficients with small random differences: at the exact neutral point the slots would
be equal and the attention's gradient zero. They start on the side that rewards no certainty
(:func:`l2t_core.losses.forms.differences`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from l2t_core.losses.forms import (
    FORMS,
    Coefficients,
    coefficient_shapes,
    differences,
    neutral_coefficients,
)
from l2t_core.registry import Registry
from l2t_core.specs import LossSpec, TeacherSpec

TEACHERS: Registry[type[Teacher]] = Registry("teacher")
# Of an LSTM teacher's units, the one that remembers longest does so for about so many steps.
_LONGEST_MEMORY = 1000.0


class Teacher(nn.Module):
    """What every teacher is: a module from what it sees, s_t and m_t [F + M], to phi_t.

    ``num_features`` is F, ``memory`` M. ``sees`` tells whether phi_t depends on s_t at all,
    ``features`` is all that a teacher can look at where that is not for the recipe to say.
    ``settings`` are those of the spec's sizes that it reads.
    """

    memory = 0
    sees = True
    features: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("slots", "hidden")

    def __init__(
        self, spec: TeacherSpec, loss: LossSpec, num_classes: int, num_features: int
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = num_features

    def forward(self, features: Tensor) -> Coefficients:
        """Return phi_t for ``features`` [F + M]: the state s_t, and m_t behind it."""
        raise NotImplementedError

    def remember(self, features: Tensor) -> Tensor:
        """Return m_{t+1} [M] from ``features`` [F + M]; a student's life begins with zeros."""
        return features[self.num_features :]

    def keep_from_below_zero(self, parts: tuple[str, ...]) -> None:
        """Move theta, in place, to where these parts of phi_t are not below zero in any state.

        A teacher without it can be trained with ``training.bounded=false`` only.
        """
        raise NotImplementedError


def _raise_to_zero(values: nn.ParameterDict, parts: tuple[str, ...]) -> None:
    # phi_t is a mean of the slots, weighed by shares: none below zero, no mean below it.
    for name in parts:
        values[name].data.clamp_(min=0.0)


def _slots(loss: LossSpec, num_classes: int, slots: int, scale: float) -> nn.ParameterDict:
    neutral = neutral_coefficients(loss, num_classes)
    start = differences(loss, num_classes, slots, scale)
    return nn.ParameterDict({name: nn.Parameter(neutral[name] + d) for name, d in start.items()})


@TEACHERS.register("attention")
class AttentionTeacher(Teacher):
    """Attention over N memory slots (L2T-DLF, section 3.2).

    W_t = sum_n softmax(K_W s_t)_n V_W,n and b_t = sum_n softmax(K_b s_t)_n V_b,n, with
    theta = {K_W, K_b, V_W, V_b}. A structured W attends with the one K_W for all its parts, and
    so does a loss without a b, which needs no K_b.
    """

    settings: tuple[str, ...] = ("slots",)

    def __init__(
        self, spec: TeacherSpec, loss: LossSpec, num_classes: int, num_features: int
    ) -> None:
        super().__init__(spec, loss, num_classes, num_features)
        # Keys of standard deviation 1/sqrt(F) give each slot a different share from the start.
        scale = num_features**-0.5
        self.weight_keys = nn.Parameter(scale * torch.randn(spec.slots, num_features))
        if "b" in coefficient_shapes(loss, num_classes):
            self.bias_keys = nn.Parameter(scale * torch.randn(spec.slots, num_features))
        self.values = _slots(loss, num_classes, spec.slots, spec.init_scale)

    def forward(self, features: Tensor) -> Coefficients:
        """Return phi_t for the state s_t, ``features`` [F]."""
        shares = dict.fromkeys(self.values, torch.softmax(self.weight_keys @ features, 0))
        if "b" in shares:
            shares["b"] = torch.softmax(self.bias_keys @ features, 0)
        return {
            name: torch.tensordot(shares[name], slots, 1) for name, slots in self.values.items()
        }

    def keep_from_below_zero(self, parts: tuple[str, ...]) -> None:
        """Raise what is below zero in these parts' slots, in place, to zero."""
        _raise_to_zero(self.values, parts)


@TEACHERS.register("lstm")
class LstmTeacher(AttentionTeacher):
    """The attention teacher with a memory: its keys meet s_t and what an LSTM remembers.

    phi_t is :class:`AttentionTeacher`'s, with [s_t, h_t] in the place of s_t, where (h_t, c_t) is
    an LSTM cell's answer to s_t and (h_{t-1}, c_{t-1}) = m_t: the loss may depend on how the
    student came to where it is, the idea of L2T-DLN's teacher (Hai et al. 2023). Theta's
    derivative goes back through the memory, s_t is a constant.
    """

    settings = ("slots", "hidden")

    def __init__(
        self, spec: TeacherSpec, loss: LossSpec, num_classes: int, num_features: int
    ) -> None:
        super().__init__(spec, loss, num_classes, num_features + spec.hidden)
        self.num_features = num_features
        self.memory = 2 * spec.hidden
        self.cell = nn.LSTMCell(num_features, spec.hidden)
        # Forget gates' biases log(tau - 1), the input gates' the opposite (Tallec & Ollivier 2018,
        # section 2): a unit remembers for about tau steps, here from 2 to as long as many lives.
        # With the usual zeros all would forget within two.
        taus = torch.logspace(math.log10(2.0), math.log10(_LONGEST_MEMORY), spec.hidden)
        with torch.no_grad():
            self.cell.bias_hh.zero_()
            self.cell.bias_ih.zero_()
            self.cell.bias_ih[: spec.hidden] = -(taus - 1.0).log()
            self.cell.bias_ih[spec.hidden : 2 * spec.hidden] = (taus - 1.0).log()

    def _answer(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return h_t and c_t [H] from s_t, h_{t-1} and c_{t-1} in one [F + 2 H]."""
        sizes = [self.num_features, self.cell.hidden_size, self.cell.hidden_size]
        state, hidden, before = features.split(sizes)
        own = self.cell  # whose call knows no vmap
        gates = own.weight_ih @ state + own.bias_ih + own.weight_hh @ hidden + own.bias_hh
        enter, keep, candidate, answer = gates.chunk(4)
        cell = torch.sigmoid(keep) * before + torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.sigmoid(answer) * torch.tanh(cell), cell

    def forward(self, features: Tensor) -> Coefficients:
        """Return phi_t for ``features`` [F + M]: the state s_t, and m_t behind it."""
        return super().forward(
            torch.cat([features[: self.num_features], self._answer(features)[0]])
        )

    def remember(self, features: Tensor) -> Tensor:
        """Return m_{t+1} [M], h_t and c_t, from ``features`` [F + M]."""
        return torch.cat(self._answer(features))


@TEACHERS.register("affine")
class AffineTeacher(Teacher):
    """phi_t = phi + phi_2 h(s_t) with h = 2 sigmoid(A s_t + c) - 1 of ``slots`` units.

    The form of the authors' public MNIST demo; with b beside W, and not from all zeros, where its
    dynamic part has no gradient.
    """

    settings = ("slots",)

    def __init__(
        self, spec: TeacherSpec, loss: LossSpec, num_classes: int, num_features: int
    ) -> None:
        super().__init__(spec, loss, num_classes, num_features)
        self.keys = nn.Parameter(num_features**-0.5 * torch.randn(spec.slots, num_features))
        self.offsets = nn.Parameter(torch.zeros(spec.slots))
        self.base = _slots(loss, num_classes, 1, 0.0)
        # What is added to the neutral point; h has either sign, so others' weights stay neutral.
        start = differences(loss, num_classes, spec.slots, spec.init_scale)
        if others := FORMS.get(loss.form).others:
            start[others] = torch.where(self.base[others] == 0.0, 0.0, start[others])
        self.values = nn.ParameterDict({name: nn.Parameter(d) for name, d in start.items()})

    def forward(self, features: Tensor) -> Coefficients:
        """Return phi_t for the state s_t, ``features`` [F]."""
        h = 2.0 * torch.sigmoid(self.keys @ features + self.offsets) - 1.0
        return {
            name: self.base[name][0] + torch.tensordot(h, slots, 1)
            for name, slots in self.values.items()
        }

    def keep_from_below_zero(self, parts: tuple[str, ...]) -> None:
        """Raise these parts' base to zero and shrink, in place, what h may take from it."""
        _raise_to_zero(self.base, parts)
        for name in parts:
            slots = self.values[name].data
            reach = slots.abs().sum(0).clamp_min(torch.finfo(slots.dtype).tiny)  # |h| < 1
            room = (1.0 - 1e-6) * self.base[name].data[0]  # less what rounding takes
            slots.mul_((room / reach).clamp(max=1.0))


@TEACHERS.register("static")
class StaticTeacher(Teacher):
    """phi learned but constant over the student's life: the ablation of "dynamic"."""

    sees = False
    settings = ()

    def __init__(
        self, spec: TeacherSpec, loss: LossSpec, num_classes: int, num_features: int
    ) -> None:
        super().__init__(spec, loss, num_classes, num_features)
        self.values = _slots(loss, num_classes, 1, spec.init_scale)

    def forward(self, features: Tensor) -> Coefficients:
        """Return the same phi whatever ``features`` [F] says."""
        return {name: slots[0] for name, slots in self.values.items()}

    def keep_from_below_zero(self, parts: tuple[str, ...]) -> None:
        """Raise what is below zero in these parts, in place, to zero."""
        _raise_to_zero(self.values, parts)


@TEACHERS.register("timed")
class TimedTeacher(Teacher):
    """phi by time alone: one for each of ``slots`` stretches of a life, all of the same length.

    Dynamic, and blind: what a student does changes nothing.
    """

    features = ("progress",)
    settings = ("slots",)

    def __init__(
        self, spec: TeacherSpec, loss: LossSpec, num_classes: int, num_features: int
    ) -> None:
        super().__init__(spec, loss, num_classes, num_features)
        self.values = _slots(loss, num_classes, spec.slots, spec.init_scale)

    def forward(self, features: Tensor) -> Coefficients:
        """Return the phi of the stretch that ``features`` [F], the progress in [-1, 1], is in."""
        count = len(next(iter(self.values.values())))
        # A little more: rounding must not leave a stretch's first step to the one before.
        progress = 0.5 * (features[:1] + 1.0) + 1e-6
        at = (progress * count).long().clamp(0, count - 1)
        return {name: slots.index_select(0, at)[0] for name, slots in self.values.items()}

    def keep_from_below_zero(self, parts: tuple[str, ...]) -> None:
        """Raise what is below zero in these parts, in place, to zero."""
        _raise_to_zero(self.values, parts)


def build_teacher(
    spec: TeacherSpec, loss: LossSpec, num_classes: int, num_features: int, seed: int
) -> Teacher:
    """Return a new teacher whose initial theta depends on ``seed`` alone.

    Raises:
        UserError: if the teacher or the loss form is unknown.
    """
    kind = TEACHERS.get(spec.name)
    coefficient_shapes(loss, num_classes)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs of the user's process, too.
        torch.default_generator.manual_seed(seed)
        return kind(spec, loss, num_classes, num_features)
