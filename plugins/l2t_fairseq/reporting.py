"""What our criterions report to fairseq alike, what they read from it, and whom they refuse."""

from __future__ import annotations

import math
from typing import Any

import torch
from fairseq import utils
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationTask
from torch import Tensor

from l2t_core.errors import UserError, suggestion
from l2t_fairseq.predictions import refuse_other_model
from l2t_fairseq.ranks import end_with

# The tasks of which it is known what they report of a validation beside the criterion's.
_KNOWN_TASKS = ("fairseq.tasks.translation", "l2t_fairseq.task")
_REPORTED = ("loss", "nll_loss", "ppl", "l2t_accuracy")
_ALWAYS = ("wpb", "bsz", "num_updates")  # by fairseq itself, of no use here
_BLEU = "bleu"


def refuse_other_task(task: Any, criterion: str) -> None:
    """Refuse a task whose students and dictionaries are not those of translation.

    A task of the user's own that builds on translation passes; fairseq's own that do have other
    batches or dictionaries.

    Raises:
        UserError: naming the task.
    """
    kind = type(task)
    fairseqs_own = kind.__module__.startswith("fairseq.") and kind is not TranslationTask
    # Tasks of an older kind have no configuration, although they build on translation.
    builds_on = isinstance(task, TranslationTask) and getattr(task, "cfg", None) is not None
    if fairseqs_own or not builds_on:
        raise UserError(
            f"--criterion {criterion} teaches translation, and this is a {kind.__name__}; "
            "use --task translation or l2t_translation"
        )


def refuse_unreported_metric(cfg: Any, task: Any, *more: str) -> None:
    """Refuse a ``--best-checkpoint-metric`` that no validation will report.

    fairseq would end in a KeyError, but not before the first validation is over. ``more`` is what
    a criterion reports beside :func:`log_losses`; a task of the user's own may report anything.

    Raises:
        UserError: naming what is reported.
    """
    if type(task).__module__ not in _KNOWN_TASKS:
        return
    reported = [*_REPORTED, *more, *([_BLEU] if task.cfg.eval_bleu else [])]
    metric = cfg.best_checkpoint_metric
    if metric in (*reported, *_ALWAYS):
        return
    mend = "; add --eval-bleu" if metric == _BLEU else suggestion(metric, reported)
    raise UserError(
        f"--best-checkpoint-metric {metric} is not reported by this run's validation{mend} "
        f"(reported: {', '.join(reported)})"
    )


def end_at_other_model(model: Any) -> None:
    """End the program in one line where ``model`` cannot be taught: fairseq would show a trace."""
    try:
        refuse_other_model(model)
    except UserError as error:
        raise end_with(error) from None


def logging_output(
    sample: dict[str, Any],
    loss: Tensor,
    nll: Tensor,
    log_probs: Tensor,
    pad: Tensor,
    sentence_avg: bool,
) -> dict[str, Any]:
    """Return a batch's logging output: numbers that fairseq may add up over batches.

    ``loss`` is a sum or a value for each position; ``nll`` [N] is in nats and 0 where ``pad`` [N]
    is set; ``log_probs`` [N, K]. The sample size counts tokens, or with ``sentence_avg`` sentences.
    """
    sentences = sample["target"].size(0)
    with torch.no_grad():
        correct = (is_best(log_probs, nll) & ~pad).sum()
    return {
        "loss": loss.detach().sum(),
        "nll_loss": nll.detach().sum(),
        "ntokens": sample["ntokens"],
        "nsentences": sentences,
        "sample_size": sentences if sentence_avg else sample["ntokens"],
        "n_correct": correct,
    }


def summed(logging_outputs: list[dict[str, Any]], *keys: str) -> dict[str, Any]:
    """Return the sums of ``keys`` and of :func:`logging_output`'s over batches and processes."""
    always = ("ntokens", "sample_size", "loss", "nll_loss", "n_correct")
    return {key: sum(log.get(key, 0) for log in logging_outputs) for key in (*always, *keys)}


def log_losses(sums: dict[str, Any]) -> tuple[Any, Any]:
    """Log loss and nll_loss (base 2), ppl and accuracy; return nll in nats and accuracy a token."""
    ntokens, sample_size = sums["ntokens"], sums["sample_size"]
    nll, accuracy = sums["nll_loss"] / ntokens, sums["n_correct"] / ntokens
    # The same expressions, in the same order, as fairseq's cross_entropy: base 2, 3 digits.
    loss = sums["loss"] / sample_size / math.log(2)
    metrics.log_scalar("loss", loss, sample_size, round=3)
    metrics.log_scalar("nll_loss", nll / math.log(2), ntokens, round=3)
    metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
    metrics.log_scalar("l2t_accuracy", accuracy, ntokens, round=4)
    return nll, accuracy


def is_best(log_probs: Tensor, nll: Tensor) -> Tensor:
    """Tell [N] where no class is more probable than the target, whose -log p_y is ``nll`` [N].

    As the argmax tells it, in a fifth of the time on a CPU. Where all classes are equally
    probable, nothing is predicted, and nothing counts as correct.
    """
    chance = math.log(log_probs.shape[1])
    return (-nll >= log_probs.amax(1)) & (nll < chance - 1e-5)


def announced_update() -> tuple[int, float]:
    """Return update number and learning rate as fairseq's trainer logged them last.

    The path of tasks that do not feed the criterion. The trainer logs the rate before the first
    update and the number after it. Read from the live aggregator: after a resume, the one called
    "default" is a copy from the checkpoint that nobody writes to.
    """
    live = metrics.get_active_aggregators()[0]
    update = live.get_smoothed_value("num_updates") if "num_updates" in live else 0
    rate = next((live.get_smoothed_value(k) for k in ("lr", "lr_default") if k in live), 0.0)
    return int(update), float(rate)
