"""fairseq's criterion ``l2t_expected_measure``: a student trained on its own expected measure.

Minimum risk training (Shen et al. 2016) without any teacher: the baseline that learned losses of
translation are set against. Candidates are the student's own, found without dropout and weighed
with it, as any training step computes; the references are the target side of the training data.
"""

# No `from __future__ import annotations`: fairseq reads the types of its configurations.

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.losses.taught import cross_entropy
from l2t_core.students.measures import distinct_mask, mrt_expectations
from l2t_fairseq.checks import problems
from l2t_fairseq.corpora.folder import open_data
from l2t_fairseq.measures.candidates import CANDIDATES, refuse_wide_beam
from l2t_fairseq.measures.sampling import Candidate, candidate_log_probs, greedy, length_limit
from l2t_fairseq.measures.sentence_scores import LIKELIHOOD, build_measure
from l2t_fairseq.predictions import predictions, unwrapped
from l2t_fairseq.ranks import end_with
from l2t_fairseq.recipe import NmtSpec
from l2t_fairseq.reporting import (
    announced_update,
    end_at_other_model,
    log_losses,
    logging_output,
    refuse_other_task,
    refuse_unreported_metric,
    summed,
)

# What is logged: the measure, and how many sentences it was taken of.
MEASURE, MEASURED = "l2t_measure", "l2t_measured"


@dataclass
class L2TExpectedMeasureConfig(FairseqDataclass):
    """Settings of ``l2t_expected_measure``; candidates are as in a recipe's ``nmt``."""

    l2t_measure: str = field(
        default="expected_bleu",
        metadata={"help": "expected_bleu, expected_chrf, expected_ter, ..., or module:function"},
    )
    l2t_ce_mix: float = field(
        default=0.5,
        metadata={"help": "weight of cross-entropy beside the risk, in [0, 1]"},
    )
    l2t_warmup_steps: int = field(
        default=0, metadata={"help": "first updates on plain cross-entropy"}
    )
    l2t_samples: int = field(default=8, metadata={"help": "candidates for each source"})
    l2t_alpha: float = field(
        default=1.0, metadata={"help": "sharpness of the candidates' weights, p^alpha"}
    )
    l2t_candidates: str = field(
        default="ancestral",
        metadata={"help": "where they come from: ancestral, temperature, top-k, nucleus, beam"},
    )
    l2t_temperature: float = field(default=1.0, metadata={"help": "of sampled candidates"})
    l2t_top_k: int = field(default=0, metadata={"help": "symbols that top-k draws from"})
    l2t_top_p: float = field(default=1.0, metadata={"help": "mass that nucleus draws from"})
    l2t_beam: int = field(default=0, metadata={"help": "width of beam (0: as many as samples)"})
    l2t_tokenizer: str = field(
        default="none",
        metadata={"help": "moses: undo that tokenizer's work before scoring; else none"},
    )
    sentence_avg: bool = II("optimization.sentence_avg")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")


@register_criterion("l2t_expected_measure", dataclass=L2TExpectedMeasureConfig)
class L2TExpectedMeasureCriterion(FairseqCriterion):
    """mix CE + (1 - mix) (1 - E_q[measure]), q ~ p^alpha over a source's distinct candidates.

    A target token's loss is ``mix`` times its own -log p and (1 - ``mix``) times its sentence's
    risk. So both are means over tokens, and ``--update-freq`` and several processes make the same
    update as a large batch. In validation the loss is the plain negative log-likelihood, and
    ``l2t_measure`` the mean measure of greedy output.

    Raises:
        UserError: if a setting is impossible, or the data folder cannot be used.
    """

    def __init__(
        self,
        task: Any,
        spec: NmtSpec,
        ce_mix: float = 0.5,
        warmup_steps: int = 0,
        tokenizer: str = "none",
        sentence_avg: bool = False,
    ) -> None:
        super().__init__(task)
        _refuse(spec, ce_mix, warmup_steps, tokenizer, task.target_dictionary)
        self.spec, self.ce_mix, self.warmup_steps = spec, ce_mix, warmup_steps
        self.sentence_avg = sentence_avg
        self.words = task.target_dictionary
        data = open_data(Path(utils.split_paths(task.cfg.data)[0]))
        flags, target = ["--tokenizer", tokenizer], task.cfg.target_lang
        self.form = data.form_of(target).as_generated(flags, target)
        self.measure = build_measure(spec.measure, self.form.bleu_tokenize)
        self.source = CANDIDATES.get(spec.candidates)

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "L2TExpectedMeasureCriterion":
        """Build the criterion for fairseq; the user's mistakes end the program in one line."""
        names = ("measure", "samples", "alpha", "candidates", "temperature", "top_k", "top_p")
        spec = NmtSpec(**{name: getattr(cfg, f"l2t_{name}") for name in (*names, "beam")})
        try:
            refuse_other_task(task, "l2t_expected_measure")
            refuse_unreported_metric(cfg, task, MEASURE)
            return cls(
                task,
                spec,
                cfg.l2t_ce_mix,
                cfg.l2t_warmup_steps,
                cfg.l2t_tokenizer,
                cfg.sentence_avg,
            )
        except UserError as error:
            raise end_with(UserError(_as_flags(str(error)))) from None

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Return loss (a sum), sample size and summable logging outputs of ``sample``.

        With ``reduce`` False the loss is one value per target position, zero at padding.
        """
        end_at_other_model(model)
        log_probs, target = predictions(model, sample)
        pad = target.eq(self.padding_idx)
        nll = cross_entropy(log_probs, target).masked_fill(pad, 0.0)
        measured = None
        loss = nll
        if not (self.training and torch.is_grad_enabled()):
            measured = self.greedy_scores(model, sample)
        elif announced_update()[0] >= self.warmup_steps:
            measured = self.expectations(model, sample)
            risk = (1.0 - measured).repeat_interleave(sample["target"].shape[1])
            loss = self.ce_mix * nll + (1.0 - self.ce_mix) * risk.masked_fill(pad, 0.0)
        if reduce:
            loss = loss.sum()
        outputs = logging_output(sample, loss, nll, log_probs, pad, self.sentence_avg)
        counted = {
            MEASURE: 0.0 if measured is None else measured.detach().sum(),
            MEASURED: 0 if measured is None else len(measured),
        }
        return loss, outputs["sample_size"], {**outputs, **counted}

    def expectations(self, model: Any, sample: dict[str, Any]) -> Tensor:
        """Return each sentence's expected measure [B] over its candidates, differentiable."""
        model, net_input, words = unwrapped(model), sample["net_input"], self.words
        # fairseq seeds this generator anew at every update, so that a resumed run draws the same.
        seed = int(torch.randint(2**31, ()))
        training = model.training
        model.eval()
        try:
            candidates = self.source.draw(
                self.spec, model, net_input, length_limit(model, net_input), seed, words
            )
        finally:
            model.train(training)
        scores = torch.tensor(self._scores(candidates, sample))
        log_probs = candidate_log_probs(
            model, net_input, candidates, eos=words.eos(), pad=words.pad()
        )
        mask = distinct_mask(candidates).to(log_probs.device)
        return mrt_expectations(log_probs, scores.to(log_probs), mask, self.spec.alpha)

    def greedy_scores(self, model: Any, sample: dict[str, Any]) -> Tensor:
        """Return the measure [B] of each sentence's greedy translation."""
        model, net_input, words = unwrapped(model), sample["net_input"], self.words
        found = greedy(
            model, net_input, length_limit(model, net_input), eos=words.eos(), pad=words.pad()
        )
        scores = self._scores([[candidate] for candidate in found], sample)
        return torch.tensor(scores, device=sample["target"].device).squeeze(1)

    def _scores(
        self, candidates: list[list[Candidate]], sample: dict[str, Any]
    ) -> list[list[float]]:
        form, words = self.form, self.words
        texts = [[form.of_candidate(c.tokens, words) for c in of] for of in candidates]
        targets = [utils.strip_pad(row, self.padding_idx) for row in sample["target"]]
        references = [form.of_target(target, words) for target in targets]
        try:
            return self.measure.scores(texts, references)
        except UserError as error:  # a measure of the user's own; fairseq would show a trace
            raise end_with(error, mine=True) from None

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log loss, nll_loss, ppl and accuracy, and the measure where it was taken."""
        sums = summed(logging_outputs, MEASURE, MEASURED)
        if not sums["ntokens"]:
            return  # nothing but dummy batches, which only keep processes in step
        log_losses(sums)
        if sums[MEASURED]:
            metrics.log_scalar(MEASURE, sums[MEASURE] / sums[MEASURED], sums[MEASURED], round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Tell fairseq that all logging outputs are numbers which may be added up."""
        return True


def _refuse(
    spec: NmtSpec, ce_mix: float, warmup_steps: int, tokenizer: str, words: Any
) -> None:
    found = problems(spec)
    try:
        refuse_wide_beam(spec, words)
    except UserError as error:
        found.append(str(error))
    if spec.measure == LIKELIHOOD:
        found.append(
            f"--l2t-measure {LIKELIHOOD} has no candidates; use --criterion cross_entropy"
        )
    if not 0.0 <= ce_mix <= 1.0:
        found.append(f"--l2t-ce-mix is {ce_mix:g}; it must lie in [0, 1]")
    if warmup_steps < 0:
        found.append(f"--l2t-warmup-steps is {warmup_steps}; it must be 0 or more")
    if tokenizer not in ("none", "moses"):
        found.append(f"--l2t-tokenizer is {tokenizer!r}; use moses or none")
    if found:
        raise UserError(_as_flags(found[0]))  # a recipe's settings are flags here


def _as_flags(text: str) -> str:
    """Return what is said of a recipe's settings as said of this criterion's flags."""
    return re.sub(r"nmt\.(\w+)", lambda name: "--l2t-" + name[1].replace("_", "-"), text)
