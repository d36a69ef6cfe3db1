"""The smoothed measures M-tilde that an image recipe may name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from l2t_core.measures import (
    expected_accuracy,
    log_likelihood,
    margin_surrogate,
    smoothed_accuracy,
)
from l2t_core.registry import Registry

MEASURES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("image measure")
MEASURES.register("expected_accuracy")(expected_accuracy)
MEASURES.register("log_likelihood")(log_likelihood)
MEASURES.register("margin")(margin_surrogate)
MEASURES.register("smoothed_accuracy")(smoothed_accuracy)
