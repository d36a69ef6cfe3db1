"""The ``nmt`` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NmtSpec:
    """A translation student: what fairseq-train trains, and the teacher's measure on dev.

    ``data`` is a folder from ``l2t data prepare`` or fairseq-preprocess. ``train`` holds
    fairseq-train's flags as people write them, without data path and criterion, ``generate``
    fairseq-generate's.
    ``steps`` is T in teacher training, in updates; an application trains for ``--max-update``.
    ``measure`` is M-tilde: expected_bleu (``estimator`` mrt or reinforce, ``samples`` candidates
    for each of ``dev_sentences`` sources, sharpness ``alpha``) or log_likelihood.
    ``dev_interval`` is in updates; ``true_measure_sentences`` 0 decodes the whole dev set.
    """

    data: str = ""
    train: str = ""
    generate: str = "--beam 5"
    steps: int = 100
    measure: str = "expected_bleu"
    estimator: str = "mrt"
    alpha: float = 1.0
    samples: int = 8
    dev_sentences: int = 64
    true_measure_sentences: int = 0
    dev_interval: int = 20
