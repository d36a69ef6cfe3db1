"""The ``nmt`` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NmtSpec:
    """A translation student: what fairseq-train trains, and the teacher's measure on dev.

    ``data`` is a folder from ``l2t data prepare`` or fairseq-preprocess. ``train`` holds
    fairseq-train's flags as people write them, without data path and criterion, ``generate``
    fairseq-generate's; with ``--tokenizer moses`` there, all scores are of detokenised text.
    ``steps`` is T in teacher training, in updates; an application trains for ``--max-update``.

    ``measure`` is M-tilde: expected_bleu (of sentences), expected_corpus_bleu (BLEU of what all
    are expected to add up to), expected_chrf, expected_chrf++, expected_ter (1 - TER), the
    expectation of ``module:function`` of the user's own, or log_likelihood. Expectations are over
    ``samples`` candidates for each of ``dev_sentences`` sources. ``candidates`` says where
    they come from: ancestral, temperature, top-k (``top_k`` symbols), nucleus (mass ``top_p``), all
    three at ``temperature``, or beam (``beam`` wide, 0: as many as ``samples``). ``estimator`` is
    mrt (sharpness ``alpha``; by log p over length^``lenpen``, as search ranks, 0: by p), or
    reinforce, which takes ancestral candidates only.
    ``measure_subset`` is the split that M-tilde's sources are drawn from: empty for the dev set, a
    further one of fairseq-preprocess's (valid1), or train: then those first that this student's T
    steps leave out. s_t and the measure that teachers are chosen by stay on dev.
    ``dev_interval`` is in updates; ``true_measure_sentences`` 0 decodes the whole dev set.
    ``teach`` holds flags that come after ``train``'s in teacher training alone, whose students
    live for less long: a shorter ``--warmup-updates``, a smaller ``--max-tokens``. ``device`` is
    where the teacher's students live: auto (the GPU if there is one, unless ``train`` has
    ``--cpu``), cpu or cuda; fairseq-train itself runs where its flags say.
    """

    data: str = ""
    train: str = ""
    generate: str = "--beam 5"
    steps: int = 100
    measure: str = "expected_bleu"
    estimator: str = "mrt"
    alpha: float = 1.0
    lenpen: float = 0.0
    samples: int = 8
    candidates: str = "ancestral"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beam: int = 0
    measure_subset: str = ""
    dev_sentences: int = 64
    true_measure_sentences: int = 0
    dev_interval: int = 20
    teach: str = ""
    device: str = "auto"
