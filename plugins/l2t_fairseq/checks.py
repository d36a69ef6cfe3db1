"""What can be said against an ``nmt`` section before any data is read, and without fairseq."""

from __future__ import annotations

import math

from l2t_core.errors import Limit, UserError, out_of_range, unknown_choice
from l2t_core.students.devices import device_problems
from l2t_core.user_code import import_problems
from l2t_fairseq.commands.shell_script import split_flags
from l2t_fairseq.measures.candidates import candidate_problems
from l2t_fairseq.measures.sentence_scores import check_measure_name
from l2t_fairseq.recipe import NmtSpec

ESTIMATORS = ("mrt", "reinforce")


def problems(spec: NmtSpec) -> list[str]:
    """Return a line for every unknown name and impossible number, none if there is none."""
    found = []
    try:
        check_measure_name(spec.measure)
    except UserError as error:
        found.append(str(error))
    found += import_problems([("nmt.measure", spec.measure)])
    found += unknown_choice("nmt.estimator", spec.estimator, ESTIMATORS)
    for key in ("train", "teach", "generate"):
        try:
            split_flags(getattr(spec, key), f"nmt.{key}")
        except UserError as error:
            found.append(str(error))
    found += device_problems("nmt.device", spec.device)
    limits: list[Limit] = [
        ("steps", spec.steps, spec.steps >= 1, "at least 1"),
        ("dev_interval", spec.dev_interval, spec.dev_interval >= 1, "at least 1"),
        ("dev_sentences", spec.dev_sentences, spec.dev_sentences >= 1, "at least 1"),
        (
            "samples", spec.samples, spec.samples >= 2,
            "at least 2: an expectation over one candidate has no gradient",
        ),
        ("alpha", spec.alpha, 0.0 < spec.alpha < math.inf, "above 0"),
        ("lenpen", spec.lenpen, 0.0 <= spec.lenpen < math.inf, "0 (weights by p) or more"),
        (
            "true_measure_sentences", spec.true_measure_sentences,
            spec.true_measure_sentences >= 0, "0 (the whole dev set) or more",
        ),
    ]
    return [*found, *out_of_range("nmt", limits), *candidate_problems(spec)]
