"""Making training data worse on purpose: wrong labels and unequal classes.

Pure functions of labels [N] and a generator, exact in their numbers: what is asked for is what
comes out, class by class, and not only on average.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l2t_core.registry import Registry

# From (classes [M] of the labels to make wrong, K, generator) to wrong classes [M].
NOISES: Registry[Callable[[Tensor, int, torch.Generator], Tensor]] = Registry(
    "label noise"
)


@NOISES.register("symmetric")
def _symmetric(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return any other class, all alike; the true class is not drawn (Patrini et al. 2017)."""
    away = torch.randint(1, num_classes, labels.shape, generator=generator)
    return (labels + away) % num_classes


@NOISES.register("pair")
def _pair(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return the next class, the first after the last (pair flipping, Han et al. 2018)."""
    return (labels + 1) % num_classes


def noisy_labels(
    labels: Tensor, rate: float, kind: str, num_classes: int, generator: torch.Generator
) -> Tensor:
    """Return ``labels`` [N] of which the fraction ``rate`` of each class, rounded, is wrong.

    The transition matrix has 1 - rate on its diagonal; ``kind`` says what stands beside it: under
    symmetric noise rate / (K - 1) everywhere, under pair noise the rate at the next class.

    Raises:
        UserError: if the kind is unknown.
    """
    wrong = NOISES.get(kind)
    result = labels.clone()
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = int(rate * len(members) + 0.5)
        chosen = members[torch.randperm(len(members), generator=generator)[:count]]
        result[chosen] = wrong(labels[chosen], num_classes, generator)
    return result


def label_confusion(classes: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return T [K, K], float64: the share of examples of true class k that are labelled j.

    ``classes`` and ``labels`` are [N]. A class without examples is taken to be labelled rightly.
    """
    pairs = classes * num_classes + labels
    counts = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).double()
    counts += torch.diag((counts.sum(1) == 0).double())
    return counts / counts.sum(1, keepdim=True)


def long_tail(labels: Tensor, imbalance: float, num_classes: int) -> Tensor:
    """Return the indices of the examples that stay, in their order, when classes get unequal.

    Of class k, ``imbalance`` ** (-k / (K - 1)) of its examples stay, rounded down but at least
    one: the exponential profile of Cui et al. 2019. The first examples of a class stay.
    """
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        share = imbalance ** (-float(label) / (num_classes - 1))
        # Just below a whole number by rounding is that number.
        kept[members[: max(1, int(len(members) * share + 1e-9))]] = True
    return kept.nonzero().squeeze(1)
