"""What a fairseq model predicts for a batch, as all of ours read it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def predictions(model: Any, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N, K] and targets [N] of a batch's N positions, padding too."""
    output = model(**sample["net_input"])
    log_probs = model.get_normalized_probs(output, log_probs=True)
    return log_probs.view(-1, log_probs.shape[-1]), model.get_targets(sample, output).view(-1)
