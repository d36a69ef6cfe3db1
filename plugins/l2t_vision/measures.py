"""The smoothed measures M-tilde that an image recipe may name, and those of the user's own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from l2t_core.own_functions import own_function, try_out
from l2t_core.registry import Registry
from l2t_core.students.measures import (
    expected_accuracy,
    log_likelihood,
    margin_surrogate,
    smoothed_accuracy,
)
from l2t_core.user_code import is_import_path

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
    tried out on a few predictions.

    Raises:
        UserError: if there is none, or the user's own fails, returns no scalar or is not the same
            each time. What is returned raises it, too, if it does so later.
    """
    if not is_import_path(name):
        return MEASURES.get(name)
    measure = own_function(name, KEY, each=False)
    try_out(measure, num_classes, f"{KEY} {name}")
    return measure
