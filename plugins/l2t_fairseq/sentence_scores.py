"""Scores of whole sentences, on detokenised text as sacreBLEU scores it."""

from __future__ import annotations

from sacrebleu.metrics import BLEU

# Add-one smoothing on orders n >= 2 (Lin and Och 2004); sacreBLEU leaves unigrams unsmoothed. With
# it no order is ever empty, so effective_order changes nothing but a warning per sentence.
_SENTENCE = BLEU(smooth_method="add-k", smooth_value=1, effective_order=True)


def sentence_bleu(hypothesis: str, reference: str) -> float:
    """Return smoothed sentence BLEU in [0, 1]."""
    return float(_SENTENCE.sentence_score(hypothesis, [reference]).score) / 100.0
