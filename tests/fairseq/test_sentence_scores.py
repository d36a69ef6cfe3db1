"""Smoothed sentence BLEU against its formula."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sacrebleu")
from l2t_fairseq.sentence_scores import sentence_bleu


def test_by_hand():
    """Hypothesis of 5 words, 4 right: precisions 4/5, (2+1)/(4+1), (1+1)/(3+1), (0+1)/(2+1)."""
    found = sentence_bleu("the cat sat on mats", "the cat sat in mats")
    expected = math.exp(sum(map(math.log, (4 / 5, 3 / 5, 2 / 4, 1 / 3))) / 4)
    assert found == pytest.approx(expected, rel=1e-6)


def test_brevity_and_edges():
    # Two of four words, all right: precisions 2/2, (1+1)/(1+1), (0+1)/(0+1) twice.
    assert sentence_bleu("a b", "a b c d") == pytest.approx(math.exp(1 - 4 / 2), rel=1e-6)
    assert sentence_bleu("", "a b") == 0.0
    assert sentence_bleu("March 3, 2015", "March 3, 2015") == pytest.approx(1.0)
    assert sentence_bleu("x y", "a b c") == 0.0
