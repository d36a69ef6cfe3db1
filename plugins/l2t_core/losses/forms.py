"""The forms in which phi writes a loss: z of sigma(z) = sigma(-log(p)^T W y + b^T y), and beyond.

All are pure functions from log-probabilities [N, K], integer targets [N] and coefficients phi to
z [N]. K classes may be a vocabulary, so W (L2T-DLF, section 3.1) comes in five forms; three more,
``network``, ``pairwise`` and ``confusion``, leave the bilinear family:

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
2, shares one with the padding that is never a target. Few numbers, each with many examples, and
they fit other vocabularies: classes beyond the last band count as of the last.

``network`` and ``pairwise`` add a small network to the z of ``shared``, the same for all classes
and zero at the start (:mod:`l2t_core.losses.networks`). What ``shared`` can only weigh they can
bend: bounded losses and margins are in their reach. ``network`` sees log p_y, mean_k log p_k and
p_y, at a cost that does not grow with K; ``pairwise``, the loss network of L2T-DLN (Hai et al.
2023), the target beside each other class.

``confusion`` is z = -d_y log sum_k C_ky^2 p_k, C [K, K] and d [K]: the logarithm of a sum of
probabilities, which no W can write. Where C_ky^2 is how often class k is labelled y it is the
forward correction of Patrini et al. (2017, theorem 2), here with a C that the teacher learns from
the dev set; d weighs the targets. In C^2 itself the derivative at cross-entropy has no bound where
the student is sure that a label is wrong, p_k / p_y; in C it is small there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from l2t_core.losses.networks import (
    NETWORK_SHAPES,
    PAIRWISE_SHAPES,
    network_logit,
    neutral,
    pairwise_logit,
)
from l2t_core.losses.products import PickAndProject, target_and_mean, target_log_probs
from l2t_core.registry import Registry
from l2t_core.specs import LossSpec

Coefficients = dict[str, Tensor]
# From log-probabilities [N, K], targets [N] and phi to z [N].
Logit = Callable[[Tensor, Tensor, Coefficients], Tensor]

# What ``confusion`` adds to a label's probability, which may be nothing: 18 nats are its most.
CONFUSION_FLOOR = 1e-8

@dataclass(frozen=True)
class LossForm:
    """One way to write W: its shapes, its neutral point (W = I, b = 0) and its logit z.

    ``others`` is the part of phi that weighs classes other than the target, ``mean_of_others``
    whether z has their mean over the classes, not their sum. ``weights`` are the parts of phi of
    which W is made: where none of them is below zero, z is bounded below. ``per_class``: phi has a
    part for each class, so that it fits these classes alone, in this order; ``per_band``: one for
    each band of classes. ``for_pairs``: memory grows with the square of K, or with K for each
    example.
    """

    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    neutral: Callable[[int, int], Coefficients]
    logit: Logit
    others: str = ""
    mean_of_others: bool = True
    per_class: bool = True
    per_band: bool = False
    for_pairs: bool = False
    weights: tuple[str, ...] = ()


def _dense_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    # Column y of W, row by row: z_i = sum_k -log p_ik W_k,y_i + b_y_i.
    return -(log_probs * phi["W"].t()[targets]).sum(1) + phi["b"][targets]


def _diagonal_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    return phi["b"][targets] - target_log_probs(log_probs, targets) * phi["d"][targets]


def _lowrank_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    picked, projected = PickAndProject.apply(log_probs, targets, phi["U"])
    spread = -projected / log_probs.shape[1]  # [N, r]
    return phi["b"][targets] - picked * phi["d"][targets] + (spread * phi["V"][targets]).sum(1)


def _shared_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    picked, mean = target_and_mean(log_probs, targets)
    return phi["b"] - phi["d"] * picked - phi["s"] * mean


def bands(targets: Tensor) -> Tensor:
    """Return floor(log2(y + 1)) of classes y, any shape."""
    return torch.frexp((targets + 1).double()).exponent.long() - 1


def _banded_shapes(num_classes: int, rank: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("d", "s", "b"), (num_classes.bit_length(),))


def _banded_logit(log_probs: Tensor, targets: Tensor, phi: Coefficients) -> Tensor:
    band = bands(targets).clamp(max=len(phi["d"]) - 1)
    picked, mean = target_and_mean(log_probs, targets)
    return phi["b"][band] - phi["d"][band] * picked - phi["s"][band] * mean


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
        for_pairs=True,
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
        per_class=False,
        per_band=True,
    )
)


def _with_network(
    shapes: dict[str, tuple[int, ...]], logit: Logit, for_pairs: bool = False
) -> LossForm:
    return LossForm(
        shapes=lambda k, r: dict(shapes),
        neutral=lambda k, r: neutral(shapes),
        logit=logit,
        weights=("d", "s"),
        others="s",
        per_class=False,
        for_pairs=for_pairs,
    )


FORMS.register("network")(_with_network(NETWORK_SHAPES, network_logit))
FORMS.register("pairwise")(_with_network(PAIRWISE_SHAPES, pairwise_logit, for_pairs=True))
FORMS.register("confusion")(
    LossForm(
        shapes=lambda k, r: {"C": (k, k), "d": (k,)},
        neutral=lambda k, r: {"C": torch.eye(k), "d": torch.ones(k)},
        logit=_confusion_logit,
        weights=("d",),
        for_pairs=True,
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
