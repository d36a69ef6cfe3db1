"""The forms in which phi writes a loss: z of sigma(z) = sigma(-log(p)^T W y + b^T y), and beyond.

All are pure functions from log-probabilities [N, K], integer targets [N] and coefficients phi to
z [N]. K classes may be a vocabulary, so W (L2T-DLF, section 3.1) comes in five forms; two more,
``network`` and ``confusion``, leave the bilinear family:

========  ==========================================  ==========================================
form      phi                                         W
========  ==========================================  ==========================================
dense     W [K, K], b [K]                             W
diagonal  d [K], b [K]                                diag(d)
lowrank   d [K], U [K, r], V [K, r], b [K]            diag(d) + U V^T / K
shared    d [], s [], b []                            d I + (s / K) 1 1^T
banded    d [B], s [B], b [B]                         diag(d_B) + 1 s_B^T / K
========  ==========================================  ==========================================

The 1/K in the structured forms turns the sum over classes into a mean, so that a coefficient
means the same for 10 classes and for 40,000. Cross-entropy is W = I, b = 0 with the identity;
label smoothing is W = (1 - eps) I + (eps / K) 1 1^T, inside every form but ``diagonal``.

``banded`` is ``shared`` with coefficients of their own for each band of classes: class y lies in
band floor(log2(y + 1)), B = floor(log2 K) + 1. Vocabularies, and classes of long-tailed data, are
sorted by frequency, so that a band is a range of frequencies; fairseq's end of a sentence, class
2, shares one with the padding that is never a target. Few numbers, each with many examples.

``network`` adds to the z of ``shared`` a small network n_phi of log p_y, mean_k log p_k and p_y,
the same for all classes and zero at the start: the idea of the loss network of L2T-DLN (Hai et
al. 2023), in a form whose cost does not grow with K and that begins at cross-entropy. What
``shared`` can only weigh it can bend: bounded losses are in its reach.

``confusion`` is z = -d_y log sum_k C_ky^2 p_k, C [K, K] and d [K]: the logarithm of a sum of
probabilities, which no W can write. Where C_ky^2 is how often class k is labelled y it is the
forward correction of Patrini et al. (2017, theorem 2), here with a C that the teacher learns from
the dev set; d weighs the targets. In C^2 itself the derivative at cross-entropy has no bound where
the student is sure that a label is wrong, p_k / p_y; in C it is small there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_core.registry import Registry
from l2t_core.specs import LossSpec

Coefficients = dict[str, Tensor]

# What ``confusion`` adds to a label's probability, which may be nothing: 18 nats are its most.
CONFUSION_FLOOR = 1e-8

_WIDTH = 16
_NETWORK_SHAPES: dict[str, tuple[int, ...]] = {
    "d": (), "s": (), "A": (4, _WIDTH), "B": (_WIDTH, _WIDTH), "c": (_WIDTH,)
}


@dataclass(frozen=True)
class LossForm:
    """One way to write W: its shapes, its neutral point (W = I, b = 0) and its logit z.

    ``others`` is the part of phi that weighs classes other than the target, ``mean_of_others``
    whether z has their mean over the classes, not their sum. ``weights`` are the parts of phi of
    which W is made: where none of them is below zero, z is bounded below. ``per_class``: phi has a
    part for each class, so that the classes' order matters; ``per_band``: one for each band of
    classes.
    """

    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    neutral: Callable[[int, int], Coefficients]
    logit: Callable[[Tensor, Tensor, Coefficients], Tensor]
    others: str = ""
    mean_of_others: bool = True
    per_class: bool = True
    per_band: bool = False
    weights: tuple[str, ...] = ()


def target_log_probs(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return log p_y, [N], of log-probabilities [N, K] and targets [N]."""
    return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)


def _dense_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    # Column y of W, row by row: z_i = sum_k -log p_ik W_k,y_i + b_y_i.
    return -(log_probs * phi["W"].t()[targets]).sum(1) + phi["b"][targets]


def _diagonal_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    return phi["b"][targets] - target_log_probs(log_probs, targets) * phi["d"][targets]


class _PickAndProject(torch.autograd.Function):
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
        back = None
        with no_autocast(log_probs):
            if ctx.needs_input_grad[0]:
                back = projected @ factors.t()
                back.scatter_add_(1, column, picked.unsqueeze(1))
            return back, None, log_probs.t() @ projected if ctx.needs_input_grad[2] else None


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Leave products at the precision of ``tensor`` and others on its device.

    In half a sum of log-probabilities overflows.
    """
    if tensor.device.type not in ("cpu", "cuda"):  # torch refuses those that know no autocast
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def _lowrank_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    picked, projected = _PickAndProject.apply(log_probs, targets, phi["U"])
    spread = -projected / log_probs.shape[1]  # [N, r]
    return phi["b"][targets] - picked * phi["d"][targets] + (spread * phi["V"][targets]).sum(1)


def _target_and_mean(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p_y and mean_k log p_k, both [N]."""
    ones = log_probs.new_ones(log_probs.shape[1], 1)
    picked, total = _PickAndProject.apply(log_probs, targets, ones)
    return picked, total.squeeze(1) / log_probs.shape[1]


def _shared_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    picked, mean = _target_and_mean(log_probs, targets)
    return phi["b"] - phi["d"] * picked - phi["s"] * mean


def bands(targets: Tensor) -> Tensor:
    """Return floor(log2(y + 1)) of classes y, any shape."""
    return torch.frexp((targets + 1).double()).exponent.long() - 1


def _banded_shapes(num_classes: int, rank: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("d", "s", "b"), (num_classes.bit_length(),))


def _banded_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    band = bands(targets)
    picked, mean = _target_and_mean(log_probs, targets)
    return phi["b"][band] - phi["d"][band] * picked - phi["s"][band] * mean


def _network_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    picked, mean = _target_and_mean(log_probs, targets)
    # In units of four times log K, the entropy of a student that knows nothing. Beyond what
    # training shows it a network says anything; with inputs that are bounded, what is left out
    # there is the linear part, which does not reward a student for running away.
    unit = 4.0 * math.log(max(2, log_probs.shape[1]))
    inputs = torch.stack(
        [torch.tanh(picked / unit), torch.tanh(mean / unit), picked.exp(), torch.ones_like(mean)], 1
    )
    hidden = _layer(_layer(inputs, phi["A"]), phi["B"])
    return (hidden * phi["c"]).sum(1) - phi["d"] * picked - phi["s"] * mean


def _layer(inputs: Tensor, weight: Tensor) -> Tensor:
    # Not a matrix product, which autocast would make in half, also on the way back. Smooth, as the
    # second derivative of a ReLU is nothing, and through zero.
    return F.softplus((inputs.unsqueeze(2) * weight).sum(1)) - math.log(2.0)


def _network_neutral(num_classes: int, rank: int) -> Coefficients:
    """Return random hidden layers, always the same, under an output of zeros."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: torch.randn(_NETWORK_SHAPES[name], generator=generator)
        * (2.0 / _NETWORK_SHAPES[name][0]) ** 0.5
        for name in ("A", "B")
    }
    parts |= {"d": torch.tensor(1.0), "s": torch.tensor(0.0), "c": torch.zeros(_WIDTH)}
    return parts


def _confusion_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    # The label's probability, up to a factor of the target's.
    label = (log_probs.exp() * phi["C"].square().t()[targets]).sum(1)
    return -phi["d"][targets] * (label + CONFUSION_FLOOR).log()


FORMS: Registry[LossForm] = Registry("loss form")
FORMS.register("dense")(
    LossForm(
        shapes=lambda k, r: {"W": (k, k), "b": (k,)},
        neutral=lambda k, r: {"W": torch.eye(k), "b": torch.zeros(k)},
        logit=_dense_logit,
        weights=("W",),
        others="W",
        mean_of_others=False,
    )
)
FORMS.register("diagonal")(
    LossForm(
        shapes=lambda k, r: {"d": (k,), "b": (k,)},
        neutral=lambda k, r: {"d": torch.ones(k), "b": torch.zeros(k)},
        logit=_diagonal_logit,
        weights=("d",),
    )
)
FORMS.register("lowrank")(
    LossForm(
        shapes=lambda k, r: {"d": (k,), "U": (k, r), "V": (k, r), "b": (k,)},
        # U = 1 and V = 0 is W = I, and lets the first gradient reach V: with both at zero the
        # product's gradient would vanish.
        neutral=lambda k, r: {
            "d": torch.ones(k),
            "U": torch.ones(k, r),
            "V": torch.zeros(k, r),
            "b": torch.zeros(k),
        },
        logit=_lowrank_logit,
        weights=("d", "U", "V"),
        others="V",
    )
)
FORMS.register("shared")(
    LossForm(
        shapes=lambda k, r: {"d": (), "s": (), "b": ()},
        neutral=lambda k, r: {
            "d": torch.tensor(1.0),
            "s": torch.tensor(0.0),
            "b": torch.tensor(0.0),
        },
        logit=_shared_logit,
        weights=("d", "s"),
        others="s",
        per_class=False,
    )
)
FORMS.register("banded")(
    LossForm(
        shapes=_banded_shapes,
        neutral=lambda k, r: {
            "d": torch.ones(k.bit_length()),
            "s": torch.zeros(k.bit_length()),
            "b": torch.zeros(k.bit_length()),
        },
        logit=_banded_logit,
        weights=("d", "s"),
        others="s",
        per_band=True,
    )
)
FORMS.register("network")(
    LossForm(
        shapes=lambda k, r: dict(_NETWORK_SHAPES),
        neutral=_network_neutral,
        logit=_network_logit,
        weights=("d", "s"),
        others="s",
        per_class=False,
    )
)
FORMS.register("confusion")(
    LossForm(
        shapes=lambda k, r: {"C": (k, k), "d": (k,)},
        neutral=lambda k, r: {"C": torch.eye(k), "d": torch.ones(k)},
        logit=_confusion_logit,
        weights=("d",),
    )
)


def square_parts(phi: Coefficients, num_classes: int) -> Coefficients:
    """Return the parts of phi with a number for each pair of the K = ``num_classes`` classes."""
    return {name: part for name, part in phi.items() if part.shape == (num_classes,) * 2}


def coefficient_shapes(spec: LossSpec, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every part of phi for K = ``num_classes``.

    Raises:
        UserError: if the form is unknown.
    """
    return FORMS.get(spec.form).shapes(num_classes, spec.rank)


def differences(spec: LossSpec, num_classes: int, slots: int, scale: float) -> Coefficients:
    """Return ``slots`` small differences from the neutral coefficients for every part of phi.

    [slots, ...], normal with deviation ``scale``. Those of the weights of other classes' log-
    probabilities are not below zero, and divided by K where z has their sum. A negative weight,
    however small, rewards certainty without bound: over a long life the hypergradient of a student
    that has learned its training set explodes.

    Raises:
        UserError: if the form is unknown.
    """
    form, found = FORMS.get(spec.form), {}
    for name, value in form.neutral(num_classes, spec.rank).items():
        found[name] = scale * torch.randn(slots, *value.shape)
        if name == form.others:
            above = found[name].abs() / (1 if form.mean_of_others else num_classes)
            found[name] = torch.where(value == 0.0, above, found[name])
    return found


def weights_to_bound(spec: LossSpec) -> tuple[str, ...]:
    """Return the parts of phi with which, none below zero, the loss has a lower bound.

    All of which W is made (a ``lowrank`` one's factors) under the identity, none under a sigma
    that is itself bounded below.

    Raises:
        UserError: if the form is unknown.
    """
    return FORMS.get(spec.form).weights if spec.sigma == "identity" else ()


def neutral_coefficients(spec: LossSpec, num_classes: int) -> Coefficients:
    """Return the phi at which W = I and b = 0, float32.

    Raises:
        UserError: if the form is unknown.
    """
    return FORMS.get(spec.form).neutral(num_classes, spec.rank)
