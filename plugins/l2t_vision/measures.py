"""The smoothed measures M-tilde that an image recipe may name, and those of the user's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.measures import (
    expected_accuracy,
    log_likelihood,
    margin_surrogate,
    smoothed_accuracy,
)
from l2t_core.registry import Registry
from l2t_core.user_code import imported, is_import_path

Measure = Callable[[Tensor, Tensor], Tensor]
KEY = "image.measure"

MEASURES: Registry[Measure] = Registry("image measure")
MEASURES.register("expected_accuracy")(expected_accuracy)
MEASURES.register("log_likelihood")(log_likelihood)
MEASURES.register("margin")(margin_surrogate)
MEASURES.register("smoothed_accuracy")(smoothed_accuracy)


def build_measure(name: str, num_classes: int) -> Measure:
    """Return the measure that ``name`` says: an entry of ``MEASURES``, or an import path.

    It maps log-probabilities [N, K] and targets [N] to a scalar to maximise. The user's own is
    tried on a student that knows nothing.

    Raises:
        UserError: if there is none; if the user's own fails or returns no scalar, also later.
    """
    if not is_import_path(name):
        return MEASURES.get(name)
    function = imported(name, KEY)

    def measure(log_probs: Tensor, targets: Tensor) -> Tensor:
        try:
            value = function(log_probs, targets)
        except Exception as error:  # whatever the user's function does
            raise UserError(
                f"{KEY} {name}: {type(error).__name__}: {error}; it is called with "
                "log-probabilities [N, K] and targets [N]"
            ) from error
        lost = isinstance(value, Tensor) and log_probs.requires_grad and not value.requires_grad
        if not isinstance(value, Tensor) or value.ndim or lost:
            raise UserError(
                f"{KEY} {name} must return one number to maximise, a tensor [] made of the "
                "log-probabilities"
            )
        return value

    nothing = torch.zeros(4, num_classes).log_softmax(1).requires_grad_()
    measure(nothing, torch.arange(4) % num_classes)
    return measure
