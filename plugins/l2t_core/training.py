"""Teacher training: Algorithm 1 of L2T-DLF over fresh students, resumable to the bit."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2t_core.differentiation import DIFFERENTIATIONS, Episode, Outcome
from l2t_core.double_backward import probe
from l2t_core.errors import UserError
from l2t_core.losses import SIGMAS, coefficient_shapes, step_loss
from l2t_core.run_folder import RunFolder
from l2t_core.specs import LossSpec, TeacherSpec, TrainingSpec
from l2t_core.student import Student
from l2t_core.student_state import feature_count
from l2t_core.teacher_file import TeacherHeader, save_teacher
from l2t_core.teachers import TEACHERS, build_teacher
from l2t_core.unroll import Life, parse_bytes

# A dense W beyond this many classes takes more memory than any student of that size.
DENSE_LIMIT = 1000

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What teacher training leaves: files, the best true dev measure and the episodes' log."""

    best_path: Path
    last_path: Path
    best_measure: float
    best_episode: int
    skipped: int
    history: list[dict[str, Any]]


@dataclass
class Progress:
    """The part of a run that changes from episode to episode, theta and its Adam aside."""

    episode: int = 0
    best_measure: float = -math.inf
    best_episode: int = -1
    skipped: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class TeacherTraining:
    """One run: theta, its optimiser, the best theta so far and the progress."""

    def __init__(
        self,
        student: Student,
        loss: LossSpec,
        teacher_spec: TeacherSpec,
        spec: TrainingSpec,
        folder: RunFolder,
        record: dict[str, Any],
    ) -> None:
        check_settings(loss, teacher_spec, spec, student.total_steps)
        if loss.form == "dense" and student.num_classes > DENSE_LIMIT:
            raise UserError(
                f"loss.form=dense would hold {student.num_classes} x {student.num_classes} numbers "
                "in every slot; use diagonal, lowrank or shared"
            )
        self.student, self.loss, self.spec, self.folder = student, loss, spec, folder
        names = tuple(teacher_spec.features) or student.default_features
        self.teacher_spec = dataclasses.replace(teacher_spec, features=list(names))
        self.record = record
        self.differentiate = DIFFERENTIATIONS.get(spec.differentiation)
        features = feature_count(names, student.num_classes)
        self.life = Life(student)
        # theta lives where omega does: phi enters the student's graph.
        self.teacher = build_teacher(
            self.teacher_spec, loss, student.num_classes, features, spec.seed
        ).to(self.life.flat.vector.device)
        self.optimiser = torch.optim.Adam(self.teacher.parameters(), lr=spec.lr)
        self.best = {k: v.clone() for k, v in self.teacher.state_dict().items()}
        self.progress = Progress()
        self._resume()

    def run(self, on_event: OnEvent) -> TrainingResult:
        """Run the episodes that are left, saving after each."""
        if not self._finished():
            self._probe()
        while not self._finished():
            self._episode(on_event)
        best = build_teacher(
            self.teacher_spec,
            self.loss,
            self.student.num_classes,
            self.teacher.num_features,
            self.spec.seed,
        )
        best.load_state_dict(self.best)
        save_teacher(self.folder.teacher_best, best, self._header())
        save_teacher(self.folder.teacher_last, self.teacher, self._header())
        p = self.progress
        return TrainingResult(
            self.folder.teacher_best,
            self.folder.teacher_last,
            p.best_measure,
            p.best_episode,
            p.skipped,
            p.history,
        )

    def _finished(self) -> bool:
        p, spec = self.progress, self.spec
        stale = p.episode - 1 - p.best_episode
        # The last update's teacher still has to be measured, hence one more episode than updates.
        return p.episode > spec.episodes or bool(spec.patience and stale >= spec.patience)

    def _episode(self, on_event: OnEvent) -> None:
        p, spec = self.progress, self.spec
        began = time.monotonic()
        number = p.episode
        steps = self.student.total_steps

        def on_step(phase: str, step: int) -> None:
            on_event(
                {"event": "step", "episode": number, "phase": phase, "step": step, "of": steps}
            )

        turn = number % spec.student_seeds if spec.student_seeds else number
        # Far from the small seeds that people give to applications.
        seed = spec.seed * 1_000_003 + turn
        features = tuple(self.teacher_spec.features)
        episode = Episode(self.life, self.loss, features, spec, seed, seed)
        row: dict[str, Any] = {"event": "episode", "episode": number}
        try:
            outcome = self.differentiate(episode, self.teacher, on_step)
        except FloatingPointError as error:
            p.skipped += 1
            row |= {"smoothed": None, "dev_measure": None, "hypergradient_norm": None,
                    "growth": None, "skipped": True, "best": False, "reason": str(error)}
        else:
            row |= self._learn(outcome)
        row |= {"seconds": round(time.monotonic() - began, 3), "skipped_total": p.skipped}
        p.episode += 1
        p.history.append(row)
        self._save()
        on_event(row)

    def _learn(self, outcome: Outcome) -> dict[str, Any]:
        """Take the outcome in: remember the best theta, then make one Adam step of ascent."""
        p, spec = self.progress, self.spec
        sound = math.isfinite(outcome.true) and math.isfinite(outcome.smoothed)
        better = sound and outcome.true > p.best_measure
        if better:
            p.best_measure, p.best_episode = outcome.true, p.episode
            self.best = {k: v.clone() for k, v in self.teacher.state_dict().items()}
        norm = float(torch.stack([g.norm() for g in outcome.gradient]).norm())
        usable = sound and math.isfinite(norm)
        last = p.episode >= spec.episodes
        if not usable:
            p.skipped += 1
        elif not last:
            scale = min(1.0, spec.clip_norm / (norm + 1e-12)) if spec.clip_norm > 0 else 1.0
            for parameter, g in zip(self.teacher.parameters(), outcome.gradient, strict=True):
                parameter.grad = -scale * g  # ascent on M-tilde
            self.optimiser.step()
        return {
            "smoothed": outcome.smoothed if sound else None,
            "dev_measure": outcome.true if sound else None,
            "measure": self.student.measure_name,
            "hypergradient_norm": norm if usable else None,
            "growth": outcome.growth if math.isfinite(outcome.growth) else None,
            "keep_every": outcome.keep_every,
            "skipped": not usable,
            "best": better,
        }

    def _header(self) -> TeacherHeader:
        p = self.progress
        record = {
            **self.record,
            "episodes": p.episode,
            "best_episode": p.best_episode,
            "best_dev_measure": p.best_measure if math.isfinite(p.best_measure) else None,
            "measure": self.student.measure_name,
            "training": dataclasses.asdict(self.spec),
        }
        return TeacherHeader(
            self.teacher_spec,
            self.loss,
            self.student.num_classes,
            self.student.total_steps,
            self.student.dev_interval(),
            self.student.fingerprint(),
            record,
        )

    def _probe(self) -> None:
        """Differentiate the first step twice before hours are spent."""
        self.life.begin(self.spec.seed)
        features = torch.zeros(self.teacher.num_features, device=self.life.flat.vector.device)

        def loss() -> Tensor:
            log_probs, targets = self.life.outputs(0)
            phi = self.teacher(features)
            return step_loss(
                self.loss, log_probs, targets, phi, self.loss.warmup_steps
            ).mean()

        probe(self.student.module, loss)

    def _save(self) -> None:
        tensors = {f"theta.{k}": v for k, v in self.teacher.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in slots.items()}
        self.folder.save_state(tensors, dataclasses.asdict(self.progress))
        self.folder.write_metrics(self.progress.history)

    def _resume(self) -> None:
        stored = self.folder.load_state()
        if stored is None:
            return
        tensors, record = stored
        try:
            self.progress = Progress(**record)
            self.teacher.load_state_dict(_with_prefix(tensors, "theta."))
            self.best = _with_prefix(tensors, "best.")
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in _with_prefix(tensors, "adam.").items():
                index, name = key.split(".", 1)
                state.setdefault(int(index), {})[name] = value
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.folder.state} does not belong to this run "
                f"({str(error).splitlines()[0]}); choose another --out"
            ) from error
        self.folder.write_metrics(self.progress.history)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}


def check_settings(
    loss: LossSpec, teacher: TeacherSpec, spec: TrainingSpec, total_steps: int
) -> None:
    """Refuse settings with which no teacher can learn anything.

    Raises:
        UserError: naming the first such setting, its value and what it may be.
    """
    limits: list[tuple[str, float, bool, str]] = [
        ("training.episodes", spec.episodes, spec.episodes >= 1, "must be at least 1"),
        ("training.lr", spec.lr, 0 < spec.lr < math.inf, "must be above 0"),
        ("training.clip_norm", spec.clip_norm, spec.clip_norm >= 0, "must be 0 (off) or more"),
        ("training.patience", spec.patience, spec.patience >= 0, "must be 0 (off) or more"),
        ("training.truncate", spec.truncate, spec.truncate >= 0, "must be 0 (off) or more"),
        ("training.discount", spec.discount, 0 < spec.discount <= 1, "must lie in (0, 1]"),
        (
            "training.student_seeds", spec.student_seeds, spec.student_seeds >= 0,
            "must be 0 (a fresh student each episode) or more",
        ),
        ("teacher.slots", teacher.slots, teacher.slots >= 1, "must be at least 1"),
        ("teacher.init_scale", teacher.init_scale, teacher.init_scale >= 0, "must be 0 or more"),
        ("loss.rank", loss.rank, loss.rank >= 1, "must be at least 1"),
        ("loss.ce_mix", loss.ce_mix, 0 <= loss.ce_mix < 1, "must lie in [0, 1)"),
        (
            "loss.warmup_steps", loss.warmup_steps, 0 <= loss.warmup_steps < total_steps,
            f"must lie below the student's {total_steps} steps, or the teacher never teaches",
        ),
    ]
    limits.append(("training.seed", spec.seed, 1 <= spec.seed < 2**31, "must lie in [1, 2^31)"))
    for name, value, fine, mend in limits:
        if not fine:
            raise UserError(f"{name} is {value}; it {mend}")
    coefficient_shapes(loss, 2)
    SIGMAS.get(loss.sigma)
    TEACHERS.get(teacher.name)
    DIFFERENTIATIONS.get(spec.differentiation)
    parse_bytes(spec.memory)


def train_teacher(
    student: Student,
    loss: LossSpec,
    teacher: TeacherSpec,
    spec: TrainingSpec,
    folder: RunFolder,
    *,
    record: dict[str, Any],
    on_event: OnEvent = lambda event: None,
) -> TrainingResult:
    """Train a teacher (Algorithm 1), or continue the run that ``folder`` holds.

    Each episode trains a fresh student (or the next of ``spec.student_seeds``) under the current
    teacher, measures it on dev, and makes one Adam step on theta. ``spec.episodes`` counts the
    steps on theta; one more episode measures the last teacher. A hypergradient that is not finite
    is skipped and counted.

    Raises:
        UserError: if a setting is impossible, the student cannot be differentiated twice, or the
            folder cannot be written.
    """
    return TeacherTraining(student, loss, teacher, spec, folder, record).run(on_event)
