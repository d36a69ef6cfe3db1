"""What the ways to differentiate share: the engine behind all episodes, and one episode."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.hypergradients.checkpointing import Plan, make_plan, parse_bytes
from l2t_core.hypergradients.double_backward import probe, refuse_untrue_gradients
from l2t_core.hypergradients.second_derivatives import SECOND, SecondDerivatives
from l2t_core.hypergradients.trajectory import Slots
from l2t_core.hypergradients.unroll import Trajectory
from l2t_core.losses.taught import step_loss
from l2t_core.runs.processes import ALONE, Processes, processes_here
from l2t_core.specs import WITHOUT_DERIVATIVES, LossSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import Teacher


class Engine:
    """What outlives an episode: a student's life, its second derivatives, and their memory.

    ``folder`` is where a trajectory may be spilled to a file, the system's temporary one if None.
    ``comparable`` tells whether the student has exact second derivatives that approximate ones can
    be held against; processes that share a batch, where one may fail alone, do without.
    """

    def __init__(
        self, life: Life, loss: LossSpec, spec: TrainingSpec, folder: Path | None = None
    ) -> None:
        self.life, self.loss, self.spec = life, loss, spec
        self.folder = folder or Path(tempfile.gettempdir())
        self.second: SecondDerivatives = SECOND.get(spec.hvp)(life, loss, trace=spec.trace)
        student = life.student
        self.comparable = life.processes.world == 1
        self.first = first_differentiated_step(student.total_steps, loss, spec)
        # How many steps are walked back at a time.
        self.stretch = student.total_steps - self.first
        if spec.window:
            self.stretch = min(self.stretch, spec.window)
        if spec.differentiation in WITHOUT_DERIVATIVES:
            self.stretch = 0
        optimiser = student.optimiser
        self.keeps_gradient = self.second.needs_gradient or (
            optimiser.needs_gradient and self.second.wants_gradient
        )
        self.plan = self._plan()
        self._slots: Slots | None = None

    def _plan(self) -> Plan:
        life = self.life
        rows = life.student.optimiser.rows + int(self.keeps_gradient)
        size = life.flat.empty(1).stride(0) * life.flat.vector.element_size()
        buffers = sum(b.numel() * b.element_size() for b in life.buffers.tensors())
        on_gpu = life.flat.vector.device.type == "cuda"
        return make_plan(
            self.stretch, rows * size + buffers, parse_bytes(self.spec.memory),
            spill=self.spec.spill, on_gpu=on_gpu,
            host_free=_free_memory() // processes_here() if on_gpu else 0,
            file_free=shutil.disk_usage(self.folder).free // processes_here(),
        )

    def prepare(self, teacher: Teacher) -> None:
        """Differentiate the first step twice and claim the trajectory's memory, before hours go.

        Raises:
            UserError: if the student has no exact second derivative and is asked for it, or
                layers whose gradient is none, or there is no room.
        """
        refuse_untrue_gradients(self.life.student.module)
        self.life.begin(self.spec.seed)
        seen = teacher.num_features + teacher.memory
        features = torch.zeros(seen, device=self.life.flat.vector.device)

        def loss() -> Tensor:
            log_probs, targets = self.life.outputs(0)
            phi = teacher(features)
            return step_loss(self.loss, log_probs, targets, phi, self.loss.warmup_steps).mean()

        try:
            probe(self.life.student.module, loss)
        except UserError:
            if self.spec.hvp == "exact":
                raise
            self.comparable = False
        self.trajectory()

    def trajectory(self, first: int | None = None, steps: int | None = None) -> Trajectory:
        """Return an empty trajectory of ``steps`` steps from ``first`` on; there is one at a time.

        Without arguments, of all steps that the reverse pass visits.
        """
        if self._slots is None:
            rows = self.life.student.optimiser.rows
            self._slots = Slots(self.life.flat, rows, self.keeps_gradient, self.plan, self.folder)
        self._slots.clear()
        first = self.first if first is None else first
        steps = self.stretch if steps is None else steps
        return Trajectory(first, steps, self._slots, self.keeps_gradient)


def describe_plan(engine: Engine, processes: Processes = ALONE) -> str:
    """Return in one line how an episode's trajectory is held and what processes share."""
    plan = engine.plan.describe()
    if engine.spec.differentiation in WITHOUT_DERIVATIVES:
        plan = "none kept, no derivatives of the student are taken"
    if processes.world == 1:
        return plan
    what = "students of an update" if engine.spec.parallel == "students" else "batches of a step"
    return f"{plan}; {processes.world} processes share the {what}"


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Episode:
    """One fresh student's life: everything but theta that its outcome depends on.

    ``student_seed`` sets parameters, batches and dropout, ``measure_seed`` the dev sample of
    M-tilde, ``noise_seed`` theta's perturbations; ``feature_names`` is what the teacher sees.
    """

    engine: Engine
    feature_names: tuple[str, ...]
    student_seed: int
    measure_seed: int
    noise_seed: int = 0

    @property
    def life(self) -> Life:
        """The student's life."""
        return self.engine.life

    def follow(self, teacher: Teacher) -> AppliedTeacher:
        """Return ``teacher`` set to follow this episode's student from its first step."""
        student = self.life.student
        return AppliedTeacher(
            teacher, self.engine.loss, self.feature_names, student.num_classes,
            student.total_steps,
        )


def first_differentiated_step(total_steps: int, loss: LossSpec, spec: TrainingSpec) -> int:
    """Return the first step that the reverse pass visits.

    Steps of the cross-entropy warm-up come first and do not depend on theta, so nothing before
    the first taught step matters; truncation keeps the last ``spec.truncate`` steps.
    """
    first = min(loss.warmup_steps, total_steps) if loss.ce_mix < 1.0 else total_steps
    return max(first, total_steps - spec.truncate) if spec.truncate else first
