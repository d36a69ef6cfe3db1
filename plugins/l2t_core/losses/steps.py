"""The loss of each training step behind one protocol: a frozen teacher's, or a fixed one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from l2t_core.errors import UserError
from l2t_core.losses.baselines import LOSSES_KEY, baseline, complete_settings
from l2t_core.losses.functions import Moment
from l2t_core.own_functions import try_out
from l2t_core.students.protocol import Student
from l2t_core.students.state import DevStatistics, TrainStatistics


class StepLoss(Protocol):
    """What follows a student through its training and says what it descends at each step.

    ``step`` counts the committed steps. :class:`l2t_core.teachers.applied.AppliedTeacher` is one.
    """

    step: int

    def begin_step(self, learning_rate: float, step: int | None = None) -> Any:
        """Prepare for the coming step; ``step`` overrides the counter."""

    def loss(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        """Return the step's per-example loss [N] for log-probabilities [N, K], targets [N]."""

    def commit(self, statistics: TrainStatistics) -> None:
        """Take note that the optimiser made the step."""

    def observe_dev(self, statistics: DevStatistics) -> None:
        """Take note of a pass over the dev set."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, as plain Python values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""


class FixedLoss:
    """A baseline of :mod:`l2t_core.losses.baselines` as a loss of training steps.

    ``last_layer`` is the student's and ``told`` what it tells of its data, for losses that need
    them. Make one with :func:`fixed_loss`.
    """

    def __init__(
        self,
        name: str = "cross_entropy",
        settings: Mapping[str, float] | None = None,
        total_steps: int = 1,
        last_layer: LastLayer | None = None,
        told: Tensor | None = None,
    ) -> None:
        self.function = baseline(name).load()
        self.settings = complete_settings(name, settings or {})
        self.total_steps = total_steps
        self.last_layer = last_layer
        self.told = told
        self.step = 0

    def begin_step(self, learning_rate: float, step: int | None = None) -> None:
        """Prepare for the coming step; ``step`` overrides the counter."""
        if step is not None:
            self.step = step

    def loss(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        """Return the step's per-example loss [N] for log-probabilities [N, K], targets [N]."""
        features, weight = self.last_layer.take() if self.last_layer else (None, None)
        moment = Moment(self.step, self.total_steps, features, weight, self.told)
        found: Tensor = self.function(log_probs, targets, self.settings, moment)
        return found

    def commit(self, statistics: TrainStatistics) -> None:
        """Take note that the optimiser made the step."""
        self.step += 1

    def observe_dev(self, statistics: DevStatistics) -> None:
        """Do nothing: a fixed loss does not look at the student."""

    def state_dict(self) -> dict[str, Any]:
        """Return the step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.step = int(state["step"])


class LastLayer:
    """Watches a classifier's last linear layer: its input x [N, D] and its weight W [K, D].

    It is ``module.classifier`` where that is an ``nn.Linear``, else the last ``nn.Linear`` of the
    module with an output for each class.

    Raises:
        UserError: if there is none.
    """

    def __init__(self, module: nn.Module, num_classes: int) -> None:
        named = getattr(module, "classifier", None)
        candidates = [named] if isinstance(named, nn.Linear) else list(module.modules())
        linear = [
            m for m in candidates if isinstance(m, nn.Linear) and m.out_features == num_classes
        ]
        if not linear:
            raise UserError(
                f"large_margin needs a student whose last layer is an nn.Linear with {num_classes} "
                "outputs (or that has one as `classifier`), this one has none; leave large_margin "
                "out"
            )
        self.layer = linear[-1]
        self._seen: tuple[Tensor, Tensor] | None = None
        self._hook = self.layer.register_forward_hook(self._note)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer.training:
            self._seen = (inputs[0], output)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return x and W of the last pass in training mode, and forget x."""
        if self._seen is None:
            raise UserError(
                "large_margin: the student's last nn.Linear took no part in the step; leave "
                "large_margin out"
            )
        features, _ = self._seen
        self._seen = None
        return features, self.layer.weight

    def check(self, student: Student) -> None:
        """Try one batch: the layer's output must be what the log-probabilities are made of.

        Raises:
            UserError: if it is not.
        """
        with torch.no_grad():
            log_probs, _ = student.predict(student.batch(0))
        output = self._seen[1] if self._seen else None
        self._seen = None
        if (
            output is None
            or output.shape != log_probs.shape
            or not torch.allclose(torch.log_softmax(output, -1), log_probs, atol=1e-4)
        ):
            raise UserError(
                "large_margin needs a student whose class scores are the output of its last "
                "nn.Linear; here something follows or repeats it: leave large_margin out"
            )


def fixed_loss(name: str, settings: Mapping[str, float], student: Student) -> FixedLoss:
    """Return the baseline ``name`` for ``student``.

    Raises:
        UserError: if the loss or a setting is unknown or impossible, or the student cannot give
            what it needs.
    """
    last_layer, told, found = None, None, baseline(name)
    if found.asks:
        ask = getattr(student, found.asks, None)
        if ask is None:
            raise UserError(
                f"{name} needs a student that has a method {found.asks}(), this one has none; "
                f"leave {name} out"
            )
        told = ask()
    if found.needs_classifier:
        last_layer = LastLayer(student.module, student.num_classes)
        last_layer.check(student)
    loss = FixedLoss(name, settings, student.total_steps, last_layer, told)
    if found.own:
        device = next(student.module.parameters()).device
        try_out(loss.loss, student.num_classes, f"{LOSSES_KEY} {name}", device)
    return loss


class Recorded:
    """A loss of training steps whose student's learning curve and time are kept.

    ``curve`` holds ``[steps made, dev nll in nats, dev accuracy]`` of every pass over dev.
    """

    def __init__(self, inner: StepLoss) -> None:
        self.inner = inner
        self.curve: list[list[float]] = []
        self._began, self._before = time.monotonic(), 0.0

    @property
    def step(self) -> int:
        """The number of committed steps."""
        return self.inner.step

    @step.setter
    def step(self, value: int) -> None:
        self.inner.step = value

    def seconds(self) -> float:
        """Return the time so far, that of an interrupted start up to its snapshot included."""
        return self._before + time.monotonic() - self._began

    def begin_step(self, learning_rate: float, step: int | None = None) -> Any:
        """Prepare for the coming step; ``step`` overrides the counter."""
        return self.inner.begin_step(learning_rate, step)

    def loss(self, log_probs: Tensor, targets: Tensor) -> Tensor:
        """Return the step's per-example loss [N] for log-probabilities [N, K], targets [N]."""
        return self.inner.loss(log_probs, targets)

    def commit(self, statistics: TrainStatistics) -> None:
        """Take note that the optimiser made the step."""
        self.inner.commit(statistics)

    def observe_dev(self, statistics: DevStatistics) -> None:
        """Take note of a pass over the dev set."""
        self.curve.append([self.step, statistics.nll, statistics.accuracy])
        self.inner.observe_dev(statistics)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, as plain Python values."""
        return {
            "inner": self.inner.state_dict(), "curve": self.curve, "seconds": self.seconds(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.inner.load_state_dict(state["inner"])
        self.curve = [list(point) for point in state["curve"]]
        self._before = float(state["seconds"])
