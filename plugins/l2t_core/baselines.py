"""Fixed losses that a taught loss is compared with: pure functions behind one signature.

Each maps log-probabilities [N, K], targets [N], its own settings and the :class:`Moment` of the
training step to per-example losses [N], in nats where nothing else is said. A new baseline is one
function and one entry in ``BASELINES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l2t_core.errors import UserError, suggestion
from l2t_core.loss_forms import neutral_coefficients
from l2t_core.losses import cross_entropy, label_smoothing, step_loss
from l2t_core.registry import Registry
from l2t_core.specs import LossSpec

Settings = Mapping[str, float]

# The published annealing of L-Softmax, of Liu et al.'s own MNIST settings: lambda = 1000 * (1 +
# 2.5e-5 t)^-35 over 30,000 iterations, here stretched over a training of any length.
_ANNEALING_START, _ANNEALING_GROWTH, _ANNEALING_POWER = 1000.0, 2.5e-5 * 30_000, 35


@dataclass(frozen=True)
class Moment:
    """The training step for which a loss is asked, 0-based ``step`` of ``total_steps``.

    ``features`` [N, D] and ``weight`` [K, D] are input and weight of the student's last layer,
    for losses that need them; ``told`` is what a loss asked the student (``Baseline.asks``).
    """

    step: int = 0
    total_steps: int = 1
    features: Tensor | None = None
    weight: Tensor | None = None
    told: Tensor | None = None


@dataclass(frozen=True)
class Setting:
    """One number of a loss: its default and the range [low, high] in which it has a meaning."""

    default: float
    low: float
    high: float = math.inf
    whole: bool = False


@dataclass(frozen=True)
class Baseline:
    """A fixed loss, its settings, and what it needs: the last layer, or what a student can tell.

    ``asks`` names the student's method whose tensor the loss finds as ``Moment.told``.
    """

    loss: Callable[[Tensor, Tensor, Settings, Moment], Tensor]
    settings: dict[str, Setting] = field(default_factory=dict)
    needs_classifier: bool = False
    asks: str = ""


BASELINES: Registry[Baseline] = Registry("loss")

# Losses of whole sequences, which a field trains by means of its own; here are their settings.
# mrt, minimum risk training: the last ``share`` of the updates on ``mix`` CE + (1 - ``mix``) risk,
# the risk over ``samples`` candidates, weighed by p^``alpha``.
SEQUENCE_LOSSES: dict[str, dict[str, Setting]] = {
    "mrt": {
        "share": Setting(0.25, 0.0, 1.0),
        "mix": Setting(0.5, 0.0, 1.0),
        "samples": Setting(8, 2, whole=True),
        "alpha": Setting(1.0, 1e-6),
    }
}


def loss_names() -> list[str]:
    """Return the names of all losses that a comparison may list, sorted."""
    return sorted([*BASELINES.names(), *SEQUENCE_LOSSES])


def settings_of(name: str) -> dict[str, Setting]:
    """Return the settings of the loss ``name``.

    Raises:
        UserError: if there is none of that name.
    """
    return SEQUENCE_LOSSES[name] if name in SEQUENCE_LOSSES else BASELINES.get(name).settings


def complete_settings(name: str, given: Settings) -> dict[str, float]:
    """Return the settings of the loss ``name`` with its defaults for those not ``given``.

    Raises:
        UserError: if the loss or a setting is unknown, or a value is out of range.
    """
    known = settings_of(name)
    for key, value in given.items():
        if key not in known:
            hint = suggestion(key, known) or f" (known: {', '.join(sorted(known)) or 'none'})"
            raise UserError(f"the loss {name} has no setting {key!r}{hint}")
        setting = known[key]
        if not setting.low <= value <= setting.high:
            limits = f"from {setting.low:g} to {setting.high:g}"
            if math.isinf(setting.high):
                limits = f"{setting.low:g} or more"
            raise UserError(f"{name}.{key} is {value:g}; it must be {limits}")
        if setting.whole and value != int(value):
            raise UserError(f"{name}.{key} is {value:g}; it must be a whole number")
    return {key: given.get(key, setting.default) for key, setting in known.items()}


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


BASELINES.register("cross_entropy")(Baseline(lambda lp, y, settings, at: cross_entropy(lp, y)))
BASELINES.register("label_smoothing")(
    Baseline(
        lambda lp, y, settings, at: label_smoothing(lp, y, settings["eps"]),
        {"eps": Setting(0.1, 0.0, 1.0)},
    )
)
BASELINES.register("focal")(
    Baseline(
        lambda lp, y, settings, at: focal(lp, y, settings["gamma"]), {"gamma": Setting(2.0, 0.0)}
    )
)
BASELINES.register("gce")(
    Baseline(
        lambda lp, y, settings, at: generalised_cross_entropy(lp, y, settings["q"]),
        {"q": Setting(0.7, 0.0, 1.0)},
    )
)


def _large_margin(log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment) -> Tensor:
    if at.features is None or at.weight is None:
        raise ValueError("large_margin needs the last layer's features and weight")
    annealed = annealing(at.step, at.total_steps, settings["lambda_min"])
    margin = int(settings["margin"])
    return large_margin(log_probs, targets, at.features, at.weight, margin, annealed)


BASELINES.register("large_margin")(
    Baseline(
        _large_margin,
        {"margin": Setting(2, 2, 4, whole=True), "lambda_min": Setting(0.0, 0.0)},
        needs_classifier=True,
    )
)


def _logit_adjusted(log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment) -> Tensor:
    if at.told is None:
        raise ValueError("logit_adjusted needs the classes' shares of the training data")
    return logit_adjusted(log_probs, targets, at.told, settings["tau"])


BASELINES.register("logit_adjusted")(
    Baseline(_logit_adjusted, {"tau": Setting(1.0, 0.0)}, asks="class_shares")
)


def _forward_corrected(
    log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment
) -> Tensor:
    if at.told is None:
        raise ValueError("forward_corrected needs the true confusion of the training labels")
    return forward_corrected(log_probs, targets, at.told)


BASELINES.register("forward_corrected")(Baseline(_forward_corrected, asks="label_confusion"))


def _sigmoid(log_probs: Tensor, targets: Tensor, settings: Settings, at: Moment) -> Tensor:
    spec = LossSpec(
        form="shared",
        sigma="sigmoid",
        warmup_steps=round(settings["warmup"] * at.total_steps),
        ce_mix=settings["mix"],
    )
    phi = neutral_coefficients(spec, log_probs.shape[1])
    phi = {name: value.to(log_probs) for name, value in phi.items()}
    return step_loss(spec, log_probs, targets, phi, at.step)


# The paper's form before any teacher has learned anything: sigma = sigmoid, W = I, b = 0, eased in
# as the authors' public MNIST demo does, by a warm-up on cross-entropy (``warmup``, a fraction of
# the training) and the mix alpha CE + (1 - alpha) l_phi (``mix`` = alpha).
BASELINES.register("sigmoid")(
    Baseline(_sigmoid, {"warmup": Setting(0.0, 0.0, 1.0), "mix": Setting(0.0, 0.0, 1.0)})
)
