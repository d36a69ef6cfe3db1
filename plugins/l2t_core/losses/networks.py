"""Losses with a small network in them, after L2T-DLN's dynamic loss network (Hai et al. 2023).

Both are the z of ``shared`` and a network that says nothing at the start: a teacher begins at
cross-entropy, and what ``shared`` holds stays in reach. Hidden layers are random, always the same,
under an output of zeros.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_core.losses.products import Product, target_and_mean

NETWORK_WIDTH = 16
# The authors' network: four hidden layers of 40, without biases.
PAIRWISE_WIDTH = 40
_SHARED: dict[str, tuple[int, ...]] = {"d": (), "s": ()}
NETWORK_SHAPES = _SHARED | {
    "A": (4, NETWORK_WIDTH), "B": (NETWORK_WIDTH, NETWORK_WIDTH), "c": (NETWORK_WIDTH,)
}
PAIRWISE_SHAPES = _SHARED | {
    "A": (3, PAIRWISE_WIDTH), "B1": (PAIRWISE_WIDTH, PAIRWISE_WIDTH),
    "B2": (PAIRWISE_WIDTH, PAIRWISE_WIDTH), "B3": (PAIRWISE_WIDTH, PAIRWISE_WIDTH),
    "c": (PAIRWISE_WIDTH,),
}


def neutral(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the phi of ``shapes`` at which z is cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: torch.randn(shape, generator=generator) * (2.0 / shape[0]) ** 0.5
        for name, shape in shapes.items() if len(shape) == 2
    }
    return parts | {"d": torch.tensor(1.0), "s": torch.tensor(0.0), "c": torch.zeros(shapes["c"])}


def network_logit(log_probs: Tensor, targets: Tensor, phi: dict[str, Tensor]) -> Tensor:
    """Return z [N] of ``network``: n sees log p_y, mean_k log p_k and p_y."""
    picked, mean = target_and_mean(log_probs, targets)
    # In units of four times log K, the entropy of a student that knows nothing. Beyond what
    # training shows it a network says anything; with inputs that are bounded, what is left out
    # there is the linear part, which does not reward a student for running away.
    unit = 4.0 * math.log(max(2, log_probs.shape[1]))
    inputs = torch.stack(
        [torch.tanh(picked / unit), torch.tanh(mean / unit), picked.exp(), torch.ones_like(mean)], 1
    )
    hidden = _layer(_layer(inputs, phi["A"]), phi["B"])
    return (hidden * phi["c"]).sum(1) - phi["d"] * picked - phi["s"] * mean


def pairwise_logit(log_probs: Tensor, targets: Tensor, phi: dict[str, Tensor]) -> Tensor:
    """Return z [N] of ``pairwise``: the mean over classes j other than y of n(q_y, q_j, 1).

    q is the sigmoid of the logits less their mean, which log-probabilities do not tell.
    """
    (count, classes), (picked, mean) = log_probs.shape, target_and_mean(log_probs, targets)
    q = torch.sigmoid(log_probs - mean.unsqueeze(1))
    own = q.gather(1, targets.unsqueeze(1)).expand(count, classes)
    hidden = torch.stack([own, q, torch.ones_like(q)], 2).flatten(0, 1)
    for name in ("A", "B1", "B2", "B3"):
        hidden = _layer(hidden, phi[name])
    values = Product.apply(hidden, phi["c"].unsqueeze(1)).view(count, classes)
    # The target beside itself is no pair.
    pairs = values.sum(1) - values.gather(1, targets.unsqueeze(1)).squeeze(1)
    return pairs / (classes - 1) - phi["d"] * picked - phi["s"] * mean


def _layer(inputs: Tensor, weight: Tensor) -> Tensor:
    # Smooth, as the second derivative of a ReLU is nothing, and through zero.
    return F.softplus(Product.apply(inputs, weight)) - math.log(2.0)
