"""Where a measure's candidates come from: the model's own law, a sharper one, or beam search.

A source is one function and one entry here. Only ``ancestral`` follows the model's own law, which
the score-function gradient (``nmt.estimator=reinforce``) needs to be unbiased: the law of the
others is zero where the model's is not, so that no weights mend it (temperature apart, whose
weights have no bounded variance). With ``mrt`` any source will do, since it weighs distinct
candidates by the model's own probabilities (Shen et al. 2016, equation 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2t_core.errors import Limit, NoEffect, UserError, out_of_range, unknown_choice
from l2t_core.registry import Registry
from l2t_fairseq.measures.sampling import Candidate, Law, sample
from l2t_fairseq.measures.sentence_scores import LIKELIHOOD
from l2t_fairseq.recipe import NmtSpec

Draw = Callable[[NmtSpec, Any, dict[str, Tensor], int, int, Any], list[list[Candidate]]]


@dataclass(frozen=True)
class Source:
    """A way to find candidates.

    ``draw(spec, model, net_input, max_length, seed, dictionary)`` returns ``spec.samples``
    candidates per source; the model is in evaluation mode. ``parameters`` are the settings that it
    reads beside ``samples``; ``own_law`` tells whether they are independent samples from the
    model's distribution.
    """

    draw: Draw
    parameters: tuple[str, ...] = ()
    own_law: bool = False


CANDIDATES: Registry[Source] = Registry("nmt.candidates")


def tempered(temperature: float) -> Law:
    """Return the law p^(1/temperature), renormalised: below 1 sharper, above 1 flatter."""
    return lambda log_probs: log_probs / temperature


def top_k(k: int) -> Law:
    """Return the law of the ``k`` most probable symbols, renormalised (Fan et al. 2018)."""

    def law(log_probs: Tensor) -> Tensor:
        best = log_probs.topk(min(k, log_probs.shape[1]), 1)
        return torch.full_like(log_probs, -torch.inf).scatter(1, best.indices, best.values)

    return law


def nucleus(p: float) -> Law:
    """Return the law of the fewest most probable symbols of mass ``p`` (Holtzman et al. 2020)."""

    def law(log_probs: Tensor) -> Tensor:
        ranked, indices = log_probs.softmax(1).sort(dim=1, descending=True, stable=True)
        before = ranked.cumsum(1) - ranked
        beyond = torch.empty_like(before, dtype=torch.bool).scatter(1, indices, before >= p)
        return log_probs.masked_fill(beyond, -torch.inf)

    return law


def _sampled(law: Callable[[NmtSpec], Law] | None) -> Draw:
    def draw(
        spec: NmtSpec, model: Any, net_input: dict[str, Tensor], longest: int, seed: int, words: Any
    ) -> list[list[Candidate]]:
        return sample(
            model, net_input, spec.samples, longest, seed, eos=words.eos(), pad=words.pad(),
            law=law(spec) if law else None,
        )  # fmt: skip

    return draw


def _after_temperature(spec: NmtSpec, law: Law) -> Law:
    """Return ``law`` of the tempered law: what is cut off depends on the temperature."""
    warm = tempered(spec.temperature)
    return lambda log_probs: law(warm(log_probs))


CANDIDATES.register("ancestral")(Source(_sampled(None), own_law=True))
CANDIDATES.register("temperature")(
    Source(_sampled(lambda spec: tempered(spec.temperature)), ("temperature",))
)
CANDIDATES.register("top-k")(
    Source(
        _sampled(lambda spec: _after_temperature(spec, top_k(spec.top_k))),
        ("top_k", "temperature"),
    )
)
CANDIDATES.register("nucleus")(
    Source(
        _sampled(lambda spec: _after_temperature(spec, nucleus(spec.top_p))),
        ("top_p", "temperature"),
    )
)


def beam_search(
    spec: NmtSpec, model: Any, net_input: dict[str, Tensor], longest: int, seed: int, words: Any
) -> list[list[Candidate]]:
    """Return the ``spec.samples`` best distinct sentences of fairseq's own beam search.

    ``spec.beam`` wide (0: as many as candidates), scores divided by length as fairseq-generate
    does by default, sentences may be empty. Where there are fewer, the last comes again, which
    mrt leaves out.

    Raises:
        UserError: if the beam is too wide for the dictionary.
    """
    from fairseq.sequence_generator import SequenceGenerator

    refuse_wide_beam(spec, words)
    generator = SequenceGenerator(
        [model], words, beam_size=spec.beam or spec.samples, max_len_a=0, max_len_b=longest,
        min_len=0,
    )  # fmt: skip
    try:
        finished = generator.generate([model], {"net_input": net_input})
    except AssertionError:  # no sentence has a finite score; nor has the measure then
        finished = [[] for _ in net_input["src_tokens"]]
    found = []
    for hypotheses in finished:
        spelled = [tuple(h["tokens"].tolist()[:-1]) for h in hypotheses] or [()]
        # At the limit the end is forced, and so costs nothing in our law.
        best = [Candidate(t, len(t) < longest) for t in spelled[: spec.samples]]
        found.append(best + [best[-1]] * (spec.samples - len(best)))
    return found


CANDIDATES.register("beam")(Source(beam_search, ("beam",)))

# What some sources read and others do not.
_OF_SOURCES = ("temperature", "top_k", "top_p", "beam")


def _is_set(spec: NmtSpec, name: str) -> bool:
    return bool(getattr(spec, name) != getattr(NmtSpec, name))


def refuse_wide_beam(spec: NmtSpec, words: Any) -> None:
    """Refuse a beam that fairseq cannot search with the dictionary ``words``.

    Raises:
        UserError: with the widest that there can be.
    """
    width = spec.beam or spec.samples
    # The search looks at twice the beam at once, and never at padding.
    if spec.candidates == "beam" and 2 * width >= len(words):
        raise UserError(
            f"a beam of {width} is too wide for the {len(words)} symbols of the dictionary; set "
            f"nmt.beam or nmt.samples to {(len(words) - 1) // 2} or less"
        )


def candidate_problems(spec: NmtSpec) -> list[str]:
    """Return a line for everything wrong with the candidates that ``spec`` asks for."""
    if spec.measure == LIKELIHOOD:
        return [
            NoEffect(f"nmt.{name}", "nmt.measure", spec.measure, "leave it out")
            for name in ("candidates", "samples", "estimator", "alpha", "lenpen", *_OF_SOURCES)
            if _is_set(spec, name)
        ]
    if unknown := unknown_choice("nmt.candidates", spec.candidates, CANDIDATES.names()):
        return unknown
    source = CANDIDATES.get(spec.candidates)
    found = _impossible(spec, source)
    for name in _OF_SOURCES:
        if name not in source.parameters and _is_set(spec, name):
            users = [n for n in CANDIDATES.names() if name in CANDIDATES.get(n).parameters]
            mend = f"use {' or '.join(users)}, or leave it out"
            found.append(NoEffect(f"nmt.{name}", "nmt.candidates", spec.candidates, mend))
    for name in ("alpha", "lenpen"):
        if spec.estimator == "reinforce" and _is_set(spec, name):
            mend = "use mrt, or leave it out"
            found.append(NoEffect(f"nmt.{name}", "nmt.estimator", "reinforce", mend))
    if spec.estimator == "reinforce" and not source.own_law:
        found.append(
            f"nmt.estimator=reinforce needs samples from the model's own law, and nmt.candidates="
            f"{spec.candidates} have another; use nmt.candidates=ancestral, or nmt.estimator=mrt"
        )
    return found


def _impossible(spec: NmtSpec, source: Source) -> list[str]:
    """Return a line for each of ``source``'s own numbers that cannot be."""
    where = f"with nmt.candidates={spec.candidates}"
    limits: list[Limit] = [
        ("temperature", spec.temperature, 0 < spec.temperature < math.inf, f"above 0 {where}"),
        ("top_k", spec.top_k, spec.top_k >= 2, f"at least 2 {where}: the symbols to draw from"),
        ("top_p", spec.top_p, 0 < spec.top_p < 1, f"in (0, 1) {where}: the mass to draw from"),
        (
            "beam", spec.beam, spec.beam == 0 or spec.beam >= spec.samples,
            f"0 (as wide as nmt.samples) or at least nmt.samples, {spec.samples}",
        ),
    ]
    found = out_of_range("nmt", (limit for limit in limits if limit[0] in source.parameters))
    if spec.candidates == "temperature" and spec.temperature == 1.0:
        found.append(
            "nmt.temperature is 1; with nmt.candidates=temperature set another, or use ancestral"
        )
    return found
