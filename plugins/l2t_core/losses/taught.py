"""The loss that a student descends: l_phi(p, y) = sigma(-log(p)^T W y + b^T y) (L2T-DLF, 3.1).

All losses are pure functions from log-probabilities [N, K], integer targets [N] and coefficients
phi to per-example losses [N], in nats where sigma is the identity. How phi writes W is the
business of :mod:`l2t_core.losses.forms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_core.losses.forms import FORMS, Coefficients
from l2t_core.losses.products import in_float32, target_log_probs
from l2t_core.registry import Registry
from l2t_core.specs import LossSpec

SIGMAS: Registry[Callable[[Tensor], Tensor]] = Registry("sigma")
SIGMAS.register("sigmoid")(torch.sigmoid)
SIGMAS.register("softplus")(F.softplus)
SIGMAS.register("identity")(lambda z: z)


def cross_entropy(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return -log p_y in nats, [N], for log-probabilities [N, K] and targets [N]."""
    return -target_log_probs(log_probs, targets)


def label_smoothing(log_probs: Tensor, targets: Tensor, eps: float) -> Tensor:
    """Return (1 - eps) CE + eps mean_k(-log p_k), [N] (Szegedy et al. 2016, section 7)."""
    return (1.0 - eps) * cross_entropy(log_probs, targets) - eps * log_probs.mean(1)


def taught_loss(
    spec: LossSpec, log_probs: Tensor, targets: Tensor, phi: Coefficients
) -> Tensor:
    """Return l_phi [N] for log-probabilities [N, K] and targets [N] (L2T-DLF, section 3.1).

    Computed in float32 where the log-probabilities are in half precision: they are added up over
    classes.

    Raises:
        UserError: if the form or sigma is unknown.
    """
    log_probs = in_float32(log_probs)
    phi = {name: part.to(log_probs.dtype) for name, part in phi.items()}  # of a student in float64
    logit = FORMS.get(spec.form).logit(log_probs, targets, phi)
    return SIGMAS.get(spec.sigma)(logit)


def step_loss(
    spec: LossSpec, log_probs: Tensor, targets: Tensor, phi: Coefficients, step: int
) -> Tensor:
    """Return the loss [N] that a student descends at 0-based training ``step``.

    Cross-entropy during the first ``spec.warmup_steps`` steps, with label smoothing if
    ``spec.warmup_smoothing`` says so, and alpha*CE + (1-alpha)*l_phi after them with alpha =
    ``spec.ce_mix``. Warm-up and mix come from the authors' public MNIST demo: at W = I
    the sigmoid form's gradient is cross-entropy's times p_y/(1+p_y)^2, next to nothing for a
    student that has not begun to learn.

    Raises:
        UserError: if the form or sigma is unknown.
    """
    if step < spec.warmup_steps and spec.warmup_smoothing:
        return label_smoothing(log_probs, targets, spec.warmup_smoothing)
    if not taught_at(spec, step):
        return cross_entropy(log_probs, targets)
    taught = taught_loss(spec, log_probs, targets, phi)
    if spec.ce_mix == 0.0:
        return taught
    return spec.ce_mix * cross_entropy(log_probs, targets) + (1.0 - spec.ce_mix) * taught


def taught_at(spec: LossSpec, step: int) -> bool:
    """Tell whether the loss of 0-based training ``step`` depends on phi."""
    return step >= spec.warmup_steps and spec.ce_mix < 1.0


def pull_beside_cross_entropy(
    spec: LossSpec, phi: Coefficients, num_classes: int, p_y: float, most: int = 64
) -> Tensor:
    """Return how strongly the loss pulls at an example, where cross-entropy has 1.

    That is dl / dz_y, z_y the target's logit, over cross-entropy's p_y - 1, for an example that
    gives its target the probability ``p_y`` in (0, 1) and all other classes the same share of the
    rest: one number for each of K = ``num_classes`` targets, or for ``most`` of them; where phi
    has a part for each band, for one target of each.

    Raises:
        UserError: if the form or sigma is unknown.
    """
    count = min(num_classes, most)
    targets = torch.linspace(0, num_classes - 1, count).round().long()
    if FORMS.get(spec.form).per_band:
        targets = 2 ** torch.arange(num_classes.bit_length()) - 1
        count = len(targets)
    rest = math.log((1.0 - p_y) / max(1, num_classes - 1))
    logits = torch.full((count, num_classes), rest, dtype=torch.float64)
    logits[range(count), targets] = math.log(p_y)
    logits.requires_grad_()
    log_probs = logits.log_softmax(1)
    exact = {name: part.double() for name, part in phi.items()}
    loss = step_loss(spec, log_probs, targets, exact, spec.warmup_steps).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient.gather(1, targets.unsqueeze(1)).squeeze(1) / (p_y - 1.0)
