"""The functions of the fixed losses, pure, with what each was published as.

Those whose name ends in ``_at`` have the one signature by which
:data:`l2t_core.losses.baselines.BASELINES` names them: they map log-probabilities [N, K], targets
[N], the loss's own settings and the :class:`Moment` of the training step to per-example losses [N],
in nats where nothing else is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2t_core.losses.baselines import Settings
from l2t_core.losses.forms import neutral_coefficients
from l2t_core.losses.taught import cross_entropy, label_smoothing, step_loss
from l2t_core.specs import LossSpec

# The published annealing of L-Softmax, of Liu et al.'s own MNIST settings: lambda = 1000 * (1 +
# 2.5e-5 t)^-35 over 30,000 iterations, here stretched over a training of any length.
_ANNEALING_START, _ANNEALING_GROWTH, _ANNEALING_POWER = 1000.0, 2.5e-5 * 30_000, 35


@dataclass(frozen=True)
class Moment:
    """The training step for which a loss is asked, 0-based ``step`` of ``total_steps``.

    ``features`` [N, D] and ``weight`` [K, D] are input and weight of the student's last layer,
    for losses that need them; ``told`` is what a loss asked the student.
    """

    step: int = 0
    total_steps: int = 1
    features: Tensor | None = None
    weight: Tensor | None = None
    told: Tensor | None = None


def focal(log_probs: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Return -(1 - p_y)^gamma log p_y, [N] (Lin et al. 2017, equation 4)."""
    nll = cross_entropy(log_probs, targets)
    # 1 - p without cancellation; kept off zero, where the power has no slope for gamma < 1.
    rest = -torch.expm1(-nll)
    return rest.clamp_min(torch.finfo(rest.dtype).tiny) ** gamma * nll


def generalised_cross_entropy(log_probs: Tensor, targets: Tensor, q: float) -> Tensor:
    """Return (1 - p_y^q) / q, [N] (Zhang & Sabuncu 2018, equation 6); q = 0 is its limit, CE."""
    nll = cross_entropy(log_probs, targets)
    return nll if q == 0.0 else -torch.expm1(-q * nll) / q


def logit_adjusted(log_probs: Tensor, targets: Tensor, shares: Tensor, tau: float) -> Tensor:
    """Return CE of the logits z + tau log(shares), [N] (Menon et al. 2021, equation 10).

    ``shares`` [K] are the classes' shares of the training data. Classes without any example are
    left out of the sum over classes, as their share of zero says, unless tau is 0.
    """
    moved = log_probs + (tau * shares.double().log()).to(log_probs) if tau else log_probs
    return cross_entropy(torch.log_softmax(moved, 1), targets)


def forward_corrected(log_probs: Tensor, targets: Tensor, confusion: Tensor) -> Tensor:
    """Return -log sum_k p_k T[k, y], [N] (Patrini et al. 2017, theorem 2).

    ``confusion`` T [K, K] is the share of examples of the true class k that are labelled y: the
    student's probabilities are those of the true class, the loss is CE of the label's.
    """
    of_label = confusion.double().log().to(log_probs).t()[targets]
    return -torch.logsumexp(log_probs + of_label, 1)


def margin_cosine(cosine: Tensor, margin: int) -> Tensor:
    """Return psi(theta) = (-1)^k cos(m theta) - 2k with k pi/m <= theta <= (k+1) pi/m.

    The monotone continuation of cos(m theta) over [0, pi] (Liu et al. 2016, equation 6), from
    ``cosine`` = cos(theta), any shape, without an arc cosine, whose slope is infinite at its ends.
    """
    before, now = torch.ones_like(cosine), cosine
    for _ in range(margin - 1):  # Chebyshev: cos((m+1) t) = 2 cos t cos(m t) - cos((m-1) t)
        before, now = now, 2.0 * cosine * now - before
    k = torch.zeros_like(cosine)
    for j in range(1, margin):
        k += (cosine.detach() < math.cos(j * math.pi / margin)).to(k.dtype)
    return (1.0 - 2.0 * (k % 2)) * now - 2.0 * k


def annealing(step: int, total_steps: int, smallest: float) -> float:
    """Return lambda of 0-based ``step``: 1000 (1 + 0.75 t/T)^-35, at least ``smallest``."""
    grown = 1.0 + _ANNEALING_GROWTH * step / total_steps
    return max(smallest, _ANNEALING_START * grown**-_ANNEALING_POWER)


def large_margin(
    log_probs: Tensor,
    targets: Tensor,
    features: Tensor,
    weight: Tensor,
    margin: int,
    annealed: float = 0.0,
) -> Tensor:
    """Return L-Softmax [N] (Liu et al. 2016, equations 4 to 7) with lambda = ``annealed``.

    The target's logit |W_y||x| cos(theta) becomes |W_y||x| (lambda cos(theta) + psi(theta)) /
    (1 + lambda). Log-probabilities are logits up to a constant, so it is the difference of the
    two that is added to the target's. A bias, which the paper leaves out, stays as it is.
    ``features`` [N, D] and ``weight`` [K, D] are those of the last layer.
    """
    of_target = weight[targets]
    scale = torch.linalg.vector_norm(of_target, dim=1) * torch.linalg.vector_norm(features, dim=1)
    cosine = (of_target * features).sum(1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    shift = scale * (margin_cosine(cosine, margin) - cosine) / (1.0 + annealed)
    moved = log_probs.scatter_add(1, targets.unsqueeze(1), shift.unsqueeze(1))
    return cross_entropy(torch.log_softmax(moved, 1), targets)


def cross_entropy_at(
    log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment
) -> Tensor:
    """Return -log p_y, [N]."""
    return cross_entropy(log_probs, targets)


def label_smoothing_at(
    log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment
) -> Tensor:
    """Return :func:`l2t_core.losses.taught.label_smoothing` by ``eps``, [N]."""
    return label_smoothing(log_probs, targets, settings["eps"])


def focal_at(log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment) -> Tensor:
    """Return :func:`focal` of ``gamma``, [N]."""
    return focal(log_probs, targets, settings["gamma"])


def generalised_cross_entropy_at(
    log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment
) -> Tensor:
    """Return :func:`generalised_cross_entropy` of ``q``, [N]."""
    return generalised_cross_entropy(log_probs, targets, settings["q"])


def large_margin_at(
    log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment
) -> Tensor:
    """Return :func:`large_margin` of ``margin``, lambda not below ``lambda_min``, [N]."""
    if at.features is None or at.weight is None:
        raise ValueError("large_margin needs the last layer's features and weight")
    annealed = annealing(at.step, at.total_steps, settings["lambda_min"])
    margin = int(settings["margin"])
    return large_margin(log_probs, targets, at.features, at.weight, margin, annealed)


def logit_adjusted_at(
    log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment
) -> Tensor:
    """Return :func:`logit_adjusted` by ``tau``, the classes' shares being what was told, [N]."""
    if at.told is None:
        raise ValueError("logit_adjusted needs the classes' shares of the training data")
    return logit_adjusted(log_probs, targets, at.told, settings["tau"])


def forward_corrected_at(
    log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment
) -> Tensor:
    """Return :func:`forward_corrected` by the confusion that was told, true or estimated, [N]."""
    if at.told is None:
        raise ValueError("a forward correction needs the confusion of the training labels")
    return forward_corrected(log_probs, targets, at.told)


def sigmoid_at(log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment) -> Tensor:
    """Return sigmoid(-log p_y) after ``warmup`` of the steps, with ``mix`` cross-entropy, [N]."""
    spec = LossSpec(
        form="shared",
        sigma="sigmoid",
        warmup_steps=round(settings["warmup"] * at.total_steps),
        ce_mix=settings["mix"],
    )
    phi = neutral_coefficients(spec, log_probs.shape[1])
    phi = {name: value.to(log_probs) for name, value in phi.items()}
    return step_loss(spec, log_probs, targets, phi, at.step)
