"""fairseq's criterion ``l2t_dynamic``: a frozen teacher's loss instead of cross-entropy.

One path serves the task ``l2t_translation`` and the stock ``translation``. What happened in an
update is read where fairseq reports it, in ``reduce_metrics``: that runs once after an optimiser
step, never for a batch that was dropped, overflowed or only validated, and sees the same numbers
on every process. The student's state s_t moves there and nowhere else.
"""

# No `from __future__ import annotations`: fairseq reads the types of its configurations.

import logging
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.losses.taught import cross_entropy
from l2t_core.runs.files import file_digest
from l2t_core.students.state import DevStatistics, TrainStatistics
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.ready import find_teacher
from l2t_fairseq.fingerprint import dictionary_fingerprint
from l2t_fairseq.predictions import predictions
from l2t_fairseq.ranks import end_with, fingerprint_of, is_first, refuse_differences
from l2t_fairseq.reporting import (
    announced_update,
    end_at_other_model,
    log_losses,
    logging_output,
    refuse_other_task,
    refuse_unreported_metric,
    summed,
)

logger = logging.getLogger(__name__)
# All processes of a run have the same to say; fairseq lets the others' warnings through.
logger.addFilter(lambda record: is_first())

# Marks the logging outputs of training batches; they are summed, so it counts batches.
TRAINING = "l2t_training"


@dataclass
class L2TDynamicCriterionConfig(FairseqDataclass):
    """Settings of ``l2t_dynamic``; everything else is in the teacher file."""

    l2t_teacher: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "teacher file written by `l2t train-teacher` (required)"},
    )
    l2t_warmup_steps: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "first updates on cross-entropy (default: the teacher's own, scaled "
            "to this run's length)"
        },
    )
    l2t_total_steps: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={"help": "length of this student's training in updates (default: --max-update)"},
    )
    l2t_debug: bool = field(
        default=False,
        metadata={"help": "compare s_t and phi_t over all processes at every update"},
    )
    # Not interpolated in the field above: under argparse, one with a flag of its own ends as null.
    max_update: int = II("optimization.max_update")
    sentence_avg: bool = II("optimization.sentence_avg")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")


@register_criterion("l2t_dynamic", dataclass=L2TDynamicCriterionConfig)
class L2TDynamicCriterion(FairseqCriterion):
    """The loss l_phi of a frozen teacher (L2T-DLF, section 3.1), phi_t from the state s_t.

    In training the loss is the sum of l_phi over the target tokens; in validation it is the plain
    negative log-likelihood, so that checkpoints of all criterions compare. The teacher is held
    outside the module tree: fairseq sees a criterion without parameters.

    Raises:
        UserError: if the teacher file cannot be used or does not fit the target dictionary, or if
            the length of the training is not given.
    """

    # The criterion whose outputs are being reduced: fairseq's reduce_metrics is static.
    _live: ClassVar["weakref.ref[L2TDynamicCriterion] | None"] = None

    def __init__(
        self,
        task: Any,
        l2t_teacher: str | None,
        l2t_total_steps: int,
        l2t_warmup_steps: int | None = None,
        sentence_avg: bool = False,
        debug: bool = False,
    ) -> None:
        super().__init__(task)
        if not l2t_teacher:
            raise UserError(
                "--criterion l2t_dynamic needs --l2t-teacher FILE, a teacher that "
                "`l2t train-teacher` wrote"
            )
        if l2t_total_steps <= 0:
            raise UserError(
                "--criterion l2t_dynamic has to know how long the student trains; "
                "add --max-update N (or --l2t-total-steps N)"
            )
        if l2t_warmup_steps is not None and l2t_warmup_steps < 0:
            raise UserError(f"--l2t-warmup-steps is {l2t_warmup_steps}; it must be 0 or more")
        self.sentence_avg, self.debug = sentence_avg, debug
        # In full: hydra changes the working folder, and a message has to say where it looked.
        file = find_teacher(l2t_teacher).absolute()
        if not file.is_file():  # a checkpoint remembers where it was, for fairseq-validate
            raise UserError(
                f"no teacher file at {file}; `l2t train-teacher` writes one, and if it has moved, "
                "give --criterion l2t_dynamic --l2t-teacher FILE"
            )
        found = dictionary_fingerprint(task.target_dictionary)
        self.applied = AppliedTeacher.from_file(
            file, l2t_total_steps, found, warmup_steps=l2t_warmup_steps
        )
        header = self.applied.header
        assert header is not None  # from_file always has one
        if found["sha256"] != header.fingerprint.get("sha256"):
            logger.info(
                "the teacher was trained for another dictionary, of %s; its loss has no number "
                "for a single entry and fits this one of %s, too",
                f"{header.num_classes:,}",
                f"{found['num_classes']:,}",
            )
        # What a resumed run should have in common with the one that it goes on with.
        self._origin = {"teacher_sha256": file_digest(file, "sha256"), "steps": l2t_total_steps}
        self._dev_interval = header.dev_interval_for(l2t_total_steps)
        self._dev = _DevPass()
        self._dev_counted_at = 0
        self._may_miss_dev = header.reads_dev  # until it was said
        # Set by a task that calls begin_update itself.
        self.fed_by_task = False

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "L2TDynamicCriterion":
        """Build the criterion for fairseq; the user's mistakes end the program in one line."""
        steps = cfg.max_update if cfg.l2t_total_steps is None else cfg.l2t_total_steps
        if 0 < steps < cfg.max_update:
            logger.warning(
                "--l2t-total-steps %d is less than --max-update %d; from update %d on the teacher "
                "takes every update for the last",
                steps,
                cfg.max_update,
                steps,
            )
        try:
            refuse_other_task(task, "l2t_dynamic")
            refuse_unreported_metric(cfg, task)
            return cls(
                task,
                cfg.l2t_teacher,
                steps,
                cfg.l2t_warmup_steps,
                cfg.sentence_avg,
                cfg.l2t_debug,
            )
        except UserError as error:
            raise end_with(error) from None

    # -- the update that comes

    def begin_update(self, update: int, learning_rate: float) -> None:
        """Take note of the 0-based update that comes and of its learning rate.

        Called before each of the update's batches; all but the first call change nothing. An
        update that does not follow the last committed one (a fresh optimiser, a checkpoint
        without s_t) starts a new s_t.
        """
        self._settle_dev()
        if update != self.applied.step:
            logger.info(
                "the student's state starts anew at update %d; %s", update, self._why_anew(update)
            )
            self._restart(update)
        self.applied.begin_step(learning_rate)

    def _why_anew(self, update: int) -> str:
        if update == 0:
            return (
                "fairseq keeps the update's number with the optimiser's state, which "
                "--no-save-optimizer-state or --reset-optimizer leaves out"
            )
        if self.fed_by_task:
            return "it is kept with the train iterator, which --reset-dataloader leaves out"
        return "--task l2t_translation carries it through checkpoints"

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Return loss (a sum, in nats), sample size and summable logging outputs of ``sample``.

        With ``reduce`` False the loss is one value per target position, zero at padding.
        """
        type(self)._live = weakref.ref(self)
        training = self.training and torch.is_grad_enabled()
        end_at_other_model(model)
        log_probs, target = predictions(model, sample)
        pad = target.eq(self.padding_idx)
        with torch.no_grad():
            nll = cross_entropy(log_probs, target).masked_fill(pad, 0.0)
        if training:
            if not self.fed_by_task:
                self.begin_update(*announced_update())
            loss = self.applied.loss(log_probs, target).masked_fill(pad, 0.0)
        else:
            loss = nll
        if reduce:
            loss = loss.sum()
        outputs = logging_output(sample, loss, nll, log_probs, pad, self.sentence_avg)
        return loss, outputs["sample_size"], {**outputs, TRAINING: int(training)}

    # -- what happened

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log loss and nll_loss (base 2), ppl and accuracy; move the student's state s_t on."""
        sums = summed(logging_outputs, TRAINING)
        if not sums["ntokens"]:
            return  # nothing but dummy batches, which only keep processes in step
        nll, accuracy = log_losses(sums)
        live = cls._live() if cls._live is not None else None
        if live is None:
            return
        if sums[TRAINING] > 0:
            live.finish_update(TrainStatistics(float(nll), float(accuracy)))
        else:
            totals = (sums["nll_loss"], sums["n_correct"], sums["ntokens"])
            live._dev.add(*map(float, totals))

    def finish_update(self, statistics: TrainStatistics) -> None:
        """Log a summary of phi_t, check it if asked to, and move s_t on."""
        for name, part in self.applied.coefficients.items():
            # No weight: the logs show the last value, as they do of the learning rate.
            metrics.log_scalar(f"l2t_{name}", float(part.mean()), weight=0, round=4)
            if part.numel() > 1:
                metrics.log_scalar(f"l2t_{name}_std", float(part.std()), weight=0, round=4)
        if self.debug:
            try:
                refuse_differences(fingerprint_of(self.applied), self.applied.step)
            except UserError as error:
                raise end_with(error) from None
        self.applied.commit(statistics)
        self._tell_if_dev_is_missed()

    def _tell_if_dev_is_missed(self) -> None:
        """Say once that the teacher sees the dev set more rarely than in its training."""
        since = self.applied.step - self._dev_counted_at
        if self._may_miss_dev and since > 2 * self._dev_interval and not self._dev:
            self._may_miss_dev = False
            logger.warning(
                "the teacher has not seen the dev set for %d updates; in its training it saw it "
                "every %d, scaled to this run; add --validate-interval-updates %d",
                since,
                self._dev_interval,
                self._dev_interval,
            )

    def _settle_dev(self) -> None:
        """Give the teacher the finished pass over the dev set, if there is one and it is due.

        It is due once the teacher's own interval (scaled to this run) has passed: a validation
        at an epoch's end in between would show the teacher fresher numbers than in its training.
        """
        found = self._dev.take()
        if found and self.applied.step - self._dev_counted_at >= self._dev_interval:
            self.applied.observe_dev(found)
            self._dev_counted_at = self.applied.step

    def _restart(self, update: int) -> None:
        fresh = {"step": update, "state": {"train": None, "dev": None}}
        self.applied.load_state_dict(fresh)
        self._dev_counted_at = update

    # -- life beyond this process

    def teacher_state(self) -> dict[str, Any]:
        """Return s_t and the update it belongs to as plain Python values, for a checkpoint."""
        self._settle_dev()
        return {
            "applied": self.applied.state_dict(),
            "dev_counted_at": self._dev_counted_at,
            "origin": self._origin,
        }

    def load_teacher_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`teacher_state` returned, and say what has changed since."""
        before = {**self._origin, **state.get("origin", {})}  # none in those of early versions
        if before["teacher_sha256"] != self._origin["teacher_sha256"]:
            logger.warning("the run goes on under another teacher than it began with")
        if before["steps"] != self._origin["steps"]:
            logger.warning(
                "the run goes on as one of %d updates and began as one of %d; its progress and "
                "the teacher's warm-up follow the new length",
                self._origin["steps"],
                before["steps"],
            )
        self.applied.load_state_dict(state["applied"])
        self._dev_counted_at = int(state["dev_counted_at"])
        self._dev = _DevPass()

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Tell fairseq that all logging outputs are numbers which may be added up."""
        return True


class _DevPass:
    """Sums of one pass over the first validation subset."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0)  # nll in nats, correct tokens, tokens
        self._root: Any = None

    def add(self, nll: float, correct: float, tokens: float) -> None:
        """Count one batch, unless it is of another subset."""
        # fairseq opens a new root aggregator for every subset; the first one is the dev set.
        root = metrics.get_active_aggregators()[0]
        if self._root is None:
            self._root = root
        if root is self._root:
            old = self._sums
            self._sums = (old[0] + nll, old[1] + correct, old[2] + tokens)

    def __bool__(self) -> bool:
        return self._root is not None

    def take(self) -> DevStatistics | None:
        """Return the statistics, if there are any, and begin anew."""
        nll, correct, tokens = self._sums
        self._sums, self._root = (0.0, 0.0, 0.0), None
        return DevStatistics(nll / tokens, correct / tokens) if tokens else None
