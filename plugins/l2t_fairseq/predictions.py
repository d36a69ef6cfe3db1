"""What a fairseq model predicts for a batch, as all of ours read it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from l2t_core.errors import UserError


def predictions(model: Any, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [N, K] and targets [N] of a batch's N positions, padding too."""
    output = model(**sample["net_input"])
    log_probs = model.get_normalized_probs(output, log_probs=True)
    return log_probs.view(-1, log_probs.shape[-1]), model.get_targets(sample, output).view(-1)


def unwrapped(model: Any) -> Any:
    """Return the encoder-decoder itself: gradients reach its parameters all the same."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def refuse_other_model(model: Any) -> None:
    """Refuse a model that does not predict each token from those before it, to be learnt from.

    Raises:
        UserError: in words that fit a command and the flags of a recipe.
    """
    bare = unwrapped(model)
    name = type(bare).__name__
    if "tgt_tokens" in inspect.signature(bare.forward).parameters:
        raise UserError(
            f"{name} does not translate word by word, and cannot be taught; choose an --arch that "
            "fairseq trains by cross_entropy, such as transformer"
        )
    if getattr(getattr(bare, "decoder", None), "adaptive_softmax", None) is not None:
        # fairseq writes over log-probabilities that their gradient needs.
        raise UserError(
            f"the log-probabilities of {name} with --adaptive-softmax-cutoff have no gradient in "
            "fairseq, which trains it by adaptive_loss alone; leave the flag out"
        )
