"""A trained teacher as a drop-in for ``nn.CrossEntropyLoss`` in anyone's loop."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2t_core.errors import UserError
from l2t_core.losses.products import in_float32, target_log_probs
from l2t_core.students.state import (
    DevStatistics,
    TrainStatistics,
    dev_statistics,
    train_statistics,
)
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.file import load_header
from l2t_core.teachers.ready import find_teacher

# Batches before the first `step`; hardly any step accumulates the gradients of more.
_MOST_WITHOUT_A_STEP = 100


class TaughtLoss(nn.Module):
    """The loss that a trained teacher writes for this student, step by step.

    ::

        steps = len(loader) * epochs
        criterion = TaughtLoss("teacher_best.safetensors", steps, optimizer)
        loss = criterion(model(x), y)
        loss.backward(); optimizer.step(); criterion.step()

    and, where the teacher looks at dev statistics, ``criterion.observe_dev(logits, targets)``
    after each validation; where the first one is overdue, a warning says so once, with how often
    the teacher is used to it. Without ``step`` the teacher keeps writing its first loss, and after
    ``total_steps`` its last: warnings say either once. The module has no parameters; ``state_dict``
    carries the student's state for a resume. In evaluation mode and under ``torch.no_grad`` it is
    plain cross-entropy, and the teacher learns nothing of it. Targets of ``ignore_index`` are left
    out and logits may be [K], [N, K] or [N, K, d1, ...], as in ``nn.CrossEntropyLoss``. What that
    has besides is the teacher's business: class weights, label smoothing, other reductions than the
    mean, and targets that are probabilities are not taken; nor are classes masked by a logit of
    -inf, as most teachers' losses weigh the log-probability of every class. It may be called within
    autocast; compile the model, not this.

    Where a process group is initialised (DistributedDataParallel) every process has to call
    ``step`` at every step: the statistics of all are put together there, so that the teacher
    writes the same loss for all. What any of them gave to ``observe_dev``, the first one that did,
    is then seen by all, from the next step on.

    Args:
        teacher: path of a teacher file, or name of one that comes with l2t (`l2t teachers ls`).
        total_steps: T, the number of optimiser steps of this training.
        optimizer: the student's, for teachers that look at its learning rate.
        warmup_steps: steps on cross-entropy; None scales the teacher's own.
        ignore_index: the target that is none.
        num_classes: K, if it is not that of the teacher's own students; ``l2t inspect`` tells which
            teachers fit any.

    Raises:
        UserError: if the file cannot be used, ``total_steps`` is not positive, the teacher looks
            at the learning rate and there is no ``optimizer``, or it does not fit ``num_classes``.
    """

    def __init__(
        self,
        teacher: str | Path,
        total_steps: int,
        optimizer: torch.optim.Optimizer | None = None,
        warmup_steps: int | None = None,
        ignore_index: int = -100,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if total_steps < 1:
            raise UserError(f"TaughtLoss: total_steps is {total_steps}; it must be at least 1")
        # A list hides the teacher from the module tree: it must not become a parameter.
        fingerprint = None
        if num_classes is not None:
            known = load_header(find_teacher(teacher)).fingerprint
            fingerprint = {**known, "num_classes": num_classes}
        self._applied = [
            AppliedTeacher.from_file(teacher, total_steps, fingerprint, warmup_steps=warmup_steps)
        ]
        header = self.applied.header
        assert header is not None  # from_file always has one
        if optimizer is None and "log_learning_rate" in header.sees:
            raise UserError(
                f"TaughtLoss: the teacher {teacher} looks at the learning rate; give the student's "
                "optimizer"
            )
        self._optimizer = optimizer
        self.ignore_index = ignore_index
        # Sums over the step's batches: nll in nats, right answers, examples.
        self._seen = (0.0, 0.0, 0)
        self._dev: DevStatistics | None = None  # to be shared with the other processes
        self._device = torch.device("cpu")
        self._dev_interval = header.dev_interval_for(total_steps)
        self._may_miss_dev = header.reads_dev  # until it saw dev, or it was said
        # One loss for the whole training does not mind how many steps are told.
        self._counts_steps = bool(header.sees) or self.applied.spec.warmup_steps > 0
        self._may_be_over = self._counts_steps  # until it was said
        self._batches = 0  # until the first step

    @property
    def applied(self) -> AppliedTeacher:
        """The teacher that follows this student."""
        return self._applied[0]

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a scalar, for logits [N, K, ...] and targets [N, ...].

        Raises:
            UserError: if the teacher was trained for another number of classes, or the targets are
                no classes or do not fit the logits.
        """
        logits, targets = self._examples(logits, targets)
        log_probs = torch.log_softmax(logits, 1)
        if not self.training or not torch.is_grad_enabled():
            return -target_log_probs(log_probs, targets).mean()
        self._check_classes(log_probs)
        self._device = logits.device
        self._tell_if_no_step_comes()
        # Read now: a scheduler may have moved the rate since the last step.
        rate = float(self._optimizer.param_groups[0]["lr"]) if self._optimizer else 0.0
        self.applied.begin_step(rate)
        if count := len(targets):
            new, (nll, right, examples) = train_statistics(log_probs, targets), self._seen
            self._seen = (nll + count * new.nll, right + count * new.accuracy, examples + count)
        return self.applied.loss(log_probs, targets).mean()

    def step(self) -> None:
        """Tell the teacher that the optimiser has made its step; call it once after each.

        All batches since the last call count as this step's (gradient accumulation). Warns once,
        in the first process, if the teacher looks at dev and has seen nothing of it for more than
        twice the steps that were between two looks in its own training, scaled to this one.
        """
        nll, right, examples = self._of_all_processes() if _several() else self._seen
        if examples:
            self.applied.commit(TrainStatistics(nll / examples, right / examples))
            self._tell_if_dev_is_missed()
            self._tell_if_it_is_over()
        self._seen = (0.0, 0.0, 0)

    def _tell_if_no_step_comes(self) -> None:
        if self.applied.step or not self._counts_steps:
            return
        self._batches += 1
        if self._batches == _MOST_WITHOUT_A_STEP + 1:
            _warn(
                f"{_MOST_WITHOUT_A_STEP} batches without criterion.step(): the teacher keeps "
                "writing its first loss; call it after each optimizer.step()",
                stacklevel=5,  # where the user's loop calls this module
            )

    def _tell_if_it_is_over(self) -> None:
        total = self.applied.state.total_steps
        if self._may_be_over and self.applied.step > total:
            self._may_be_over = False
            _warn(
                f"more than the {total} steps that were said: the teacher takes each further one "
                "for the last; give it all optimiser steps of the training as total_steps, such as "
                "len(loader) * epochs",
                stacklevel=4,
            )

    def _tell_if_dev_is_missed(self) -> None:
        # One interval late is a loop that validates at the end of its epochs.
        if not self._may_miss_dev or self.applied.step <= 2 * self._dev_interval:
            return
        self._may_miss_dev = False
        _warn(
            f"the teacher looks at dev and has not seen it in {self.applied.step} steps: it takes "
            "the student for one that still guesses; call criterion.observe_dev(logits, targets) "
            f"every {self._dev_interval} steps or so",
            stacklevel=4,  # where the user's loop calls step
        )

    def observe_dev(self, logits: Tensor, targets: Tensor) -> None:
        """Show the teacher logits [N, K, ...] and targets [N, ...] of dev after a validation.

        Raises:
            UserError: as :meth:`forward`.
        """
        logits, targets = self._examples(logits.detach(), targets)
        self._check_classes(logits)
        found = dev_statistics(torch.log_softmax(logits, 1), targets, logits.shape[1])
        self._may_miss_dev = False
        if _several():
            self._dev = found
        else:
            self.applied.observe_dev(found)

    def _of_all_processes(self) -> tuple[float, float, float]:
        """Return the step's sums over all processes, and take over the first one's look at dev."""
        begun = self.applied.begun
        numbers = [*self._seen, float(self._dev is not None), float(begun)]
        sums = torch.tensor(numbers, dtype=torch.float64, device=_exchanged_on(self._device))
        dist.all_reduce(sums)
        nll, right, examples, looked, knowing = sums.tolist()
        if self.applied.teacher.memory and 0 < knowing < dist.get_world_size():
            # One that had no batch has to remember what the others do.
            self.applied.features = _first(self.applied.features if begun else None)
        if looked:
            self.applied.observe_dev(_first(self._dev))
            self._dev, self._may_miss_dev = None, False
        return nll, right, examples

    def _examples(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [M, K], never in half, and targets [M] of all that is not ignored."""
        if targets.is_floating_point():
            raise UserError(
                f"TaughtLoss: the targets are {targets.dtype}, probabilities perhaps; teachers "
                "write the loss of a class: give class indices"
            )
        if logits.ndim == 1:
            logits, targets = logits.unsqueeze(0), targets.unsqueeze(0)
        if logits.ndim < 2 or targets.shape != (logits.shape[0], *logits.shape[2:]):
            raise UserError(
                f"TaughtLoss: targets {list(targets.shape)} do not fit logits "
                f"{list(logits.shape)}; logits are [N, K, ...] and targets [N, ...]"
            )
        if logits.ndim > 2:
            logits, targets = logits.movedim(1, -1).flatten(0, -2), targets.flatten()
        targets = targets.long()  # first: in bytes -100 would be class 156
        kept = targets != self.ignore_index
        sound = ~kept | ((targets >= 0) & (targets < logits.shape[1]))
        all_kept, all_sound = torch.stack([kept.all(), sound.all()]).tolist()  # one wait for a GPU
        if not all_sound:
            raise UserError(
                f"TaughtLoss: a target is {int(targets[~sound][0])}, the logits have "
                f"{logits.shape[1]} classes; give class indices from 0, or "
                f"{self.ignore_index} (ignore_index) where there is none"
            )
        if not all_kept:
            logits, targets = logits[kept], targets[kept]
        return in_float32(logits), targets

    def _check_classes(self, logits: Tensor) -> None:
        found, wanted = logits.shape[1], self.applied.state.num_classes
        if found != wanted:
            header = self.applied.header
            assert header is not None  # from_file always has one
            mend = f"give num_classes={found}" if header.fits_any_size else "use one of this task"
            raise UserError(
                f"TaughtLoss: the teacher was trained for {wanted} classes, the logits have "
                f"{found}; {mend}"
            )

    def get_extra_state(self) -> dict[str, Any]:
        """Return the student's state, for ``state_dict``, with what awaits the next :meth:`step`.

        Of several processes each has its own share of that; a look at dev is in the state of the
        one that looked.
        """
        dev = self._dev.as_plain() if self._dev else None
        waiting = {"seen": list(self._seen), "dev": dev}
        return {**self.applied.state_dict(), "waiting": waiting}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the student's state, from ``load_state_dict``."""
        self.applied.load_state_dict(state)
        self._seen, self._dev = (0.0, 0.0, 0), None
        if waiting := state.get("waiting"):  # younger than some checkpoints
            nll, right, examples = waiting["seen"]
            self._seen = (float(nll), float(right), int(examples))
            self._dev = DevStatistics.from_plain(waiting["dev"]) if waiting["dev"] else None
        if state["state"]["dev"] or self._dev:
            self._may_miss_dev = False
        if self._dev and not _several():
            self.applied.observe_dev(self._dev)
            self._dev = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TaughtLoss:
        """Copy it, but for the optimiser: an average of a model learns at the model's own rate."""
        state, optimizer = self.__dict__.copy(), self._optimizer
        del state["_optimizer"]
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(state, memo))
        new._optimizer = memo.get(id(optimizer), optimizer)
        return new


def _warn(text: str, stacklevel: int) -> None:
    """Warn, in the first process alone."""
    if not _several() or dist.get_rank() == 0:
        warnings.warn(f"TaughtLoss: {text}", stacklevel=stacklevel)


def _exchanged_on(device: torch.device) -> torch.device:
    """Return where numbers of a process that computes on ``device`` can be added up over all."""
    if device.type == "cpu" and dist.get_backend() == "nccl":  # one that had no batch so far
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _first(mine: Any) -> Any:
    """Return what the first process has that has something; a collective call."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next(one for one in found if one is not None)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
