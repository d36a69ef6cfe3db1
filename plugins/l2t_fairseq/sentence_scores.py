"""Scores of whole sentences, as sacreBLEU scores them."""

from __future__ import annotations

import functools

from sacrebleu.metrics import BLEU


@functools.cache
def _metric(tokenize: str) -> BLEU:
    # Add-one smoothing on orders n >= 2 (Lin and Och 2004); sacreBLEU leaves unigrams unsmoothed.
    # With it no order is ever empty, so effective_order changes nothing but a warning per sentence.
    return BLEU(smooth_method="add-k", smooth_value=1, effective_order=True, tokenize=tokenize)


def sentence_bleu(hypothesis: str, reference: str, tokenize: str = "13a") -> float:
    """Return smoothed sentence BLEU in [0, 1]; ``tokenize`` none takes both for tokenised."""
    return float(_metric(tokenize).sentence_score(hypothesis, [reference]).score) / 100.0
