"""A frozen teacher following one student: its state s_t, the coefficients phi_t and the loss.

One class serves the unroll of teacher training, the image application, the fairseq criterion and
``TaughtLoss``, so that a student is taught in the same way wherever it lives.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2t_core.losses.forms import Coefficients
from l2t_core.losses.products import in_float32, no_autocast
from l2t_core.losses.taught import step_loss
from l2t_core.runs.tensor_digest import tensor_digest
from l2t_core.specs import LossSpec
from l2t_core.students.state import DevStatistics, StudentState, TrainStatistics
from l2t_core.teachers.architectures import Teacher
from l2t_core.teachers.file import TeacherHeader, check_fits, load_teacher
from l2t_core.teachers.ready import find_teacher


class AppliedTeacher:
    """Follows a student through :meth:`begin_step`, :meth:`loss` and :meth:`commit`.

    The step number and s_t move on with :meth:`commit` only: a batch that is thrown away, a
    validation pass or a repeated call of :meth:`begin_step` leaves them as they were.
    """

    def __init__(
        self,
        teacher: Teacher,
        loss: LossSpec,
        feature_names: Sequence[str],
        num_classes: int,
        total_steps: int,
        header: TeacherHeader | None = None,
    ) -> None:
        self.teacher = teacher
        self.spec = loss
        self.state = StudentState(total_steps, num_classes, feature_names)
        self.header = header
        self.step = 0
        self.features = torch.zeros(self.state.num_features)  # s_t, with m_t behind it
        self.memory = torch.zeros(teacher.memory)
        self.coefficients: Coefficients = {}
        self.begun = False  # whether begin_step was called since the last commit
        self._computed_at: tuple[int, float] | None = None
        self._moved: dict[tuple[torch.device, torch.dtype], Coefficients] = {}

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        total_steps: int,
        fingerprint: dict[str, Any] | None = None,
        *,
        warmup_steps: int | None = None,
    ) -> AppliedTeacher:
        """Load a teacher for a student of ``total_steps`` steps and with ``fingerprint``.

        ``path`` may be the name of one that comes with l2t. ``fingerprint`` None is that of the
        students it was trained on; ``warmup_steps`` None scales the teacher's own warm-up by the
        ratio of total steps.

        Raises:
            UserError: if the file cannot be used, or does not fit the student.
        """
        path = find_teacher(path)
        teacher, header = load_teacher(path)
        if fingerprint is not None:
            check_fits(header, fingerprint, path)
        classes = header.num_classes if fingerprint is None else int(fingerprint["num_classes"])
        loss = header.loss_for(total_steps, warmup_steps)
        return cls(teacher, loss, header.teacher.features, classes, total_steps, header)

    def fork(self) -> AppliedTeacher:
        """Return one that follows the student from here on by itself, under the same teacher."""
        other = copy.copy(self)
        other.state = copy.deepcopy(self.state)
        other._moved = {}
        return other

    def begin_step(self, learning_rate: float, step: int | None = None) -> Coefficients:
        """Return phi_t for the coming step, without gradient; ``step`` overrides the counter."""
        if step is not None:
            self.step = step
        self.begun = True
        key = (self.step, learning_rate)
        if self._computed_at != key:
            # theta may be float64 in tests; s_t follows it.
            dtype = next(self.teacher.parameters()).dtype
            device = next(self.teacher.parameters()).device
            state = self.state.features(self.step, learning_rate).to(device, dtype)
            self.features = torch.cat([state, self.memory.to(device, dtype)])
            # A user's loop may call this within autocast, which is for the student.
            with torch.no_grad(), no_autocast(self.features):
                self.coefficients = self.teacher(self.features)
            self._computed_at = key
            self._moved = {}
        return self.coefficients

    def loss(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        """Return the step's per-example loss [N] for log-probabilities [N, K], targets [N]."""
        log_probs = in_float32(log_probs)  # phi, too, which half precision would round
        place = (log_probs.device, log_probs.dtype)
        if place not in self._moved:
            self._moved[place] = {k: v.to(*place) for k, v in self.coefficients.items()}
        return step_loss(self.spec, log_probs, targets, self._moved[place], self.step)

    def commit(self, statistics: TrainStatistics) -> None:
        """Take note that the optimiser made the step with these training statistics."""
        # A memory begins with what it has a say in: before, no loss depends on theta.
        if self.teacher.memory and self.step >= self.spec.warmup_steps:
            with torch.no_grad(), no_autocast(self.features):
                self.memory = self.teacher.remember(self.features)
        self.state.observe_train(statistics)
        self.step += 1
        self.begun, self._computed_at = False, None

    def observe_dev(self, statistics: DevStatistics) -> None:
        """Take note of a pass over the dev set; the next :meth:`begin_step` sees it."""
        self.state.observe_dev(statistics)
        self._computed_at = None

    def state_dict(self) -> dict[str, Any]:
        """Return the step, s_t's statistics and m_t as plain Python values."""
        state: dict[str, Any] = {"step": self.step, "state": self.state.state_dict()}
        if self.teacher.memory:
            state["memory"] = {"of": self._theta_digest(), "content": self.memory.tolist()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.step = int(state["step"])
        self.state.load_state_dict(state["state"])
        # A teacher that takes over here has nothing to remember: it is another's memory.
        self.memory = torch.zeros(self.teacher.memory)
        match state.get("memory"):
            case {"of": of, "content": known} if of == self._theta_digest():
                self.memory = torch.tensor(known, dtype=torch.float64)
        self.begun, self._computed_at = False, None

    def _theta_digest(self) -> str:
        return tensor_digest(self.teacher.state_dict(), "")
