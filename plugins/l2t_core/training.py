"""Teacher training: Algorithm 1 of L2T-DLF over fresh students, resumable to the bit."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2t_core.diagnostics import finite, largest, mean
from l2t_core.differentiation import DIFFERENTIATIONS, Outcome
from l2t_core.double_backward import probe
from l2t_core.engine import Engine, Episode, describe_plan
from l2t_core.errors import UserError
from l2t_core.life import Life
from l2t_core.losses import step_loss
from l2t_core.processes import ALONE, Processes
from l2t_core.run_folder import RunFolder
from l2t_core.settings import check_processes, check_settings
from l2t_core.specs import (
    WITHIN_A_LIFE,
    WITHOUT_DERIVATIVES,
    LossSpec,
    TeacherSpec,
    TrainingSpec,
)
from l2t_core.student import Student
from l2t_core.student_state import feature_count
from l2t_core.teacher_file import TeacherHeader, save_teacher
from l2t_core.teachers import build_teacher
from l2t_core.update import advice, combine, phi_penalty, signal_to_noise

# A dense W beyond this many classes takes more memory than any student of that size.
DENSE_LIMIT = 1000
# So many episodes in a row without a usable hypergradient end a run: more would not help.
MOST_SKIPPED = 8

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
    skipped_in_a_row: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class TeacherTraining:
    """One run: theta, its optimiser, the best theta so far and the progress.

    ``sound`` is the last theta whose students told something: where one kills or saturates them,
    theta goes half the way back to it.
    """

    def __init__(
        self,
        student: Student,
        loss: LossSpec,
        teacher_spec: TeacherSpec,
        spec: TrainingSpec,
        folder: RunFolder,
        record: dict[str, Any],
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        processes.agree(lambda: self._check(student, loss, teacher_spec, spec))
        self.student, self.loss, self.spec, self.folder = student, loss, spec, folder
        names = tuple(teacher_spec.features) or student.default_features
        self.teacher_spec = dataclasses.replace(teacher_spec, features=list(names))
        self.record = record
        self.differentiate = DIFFERENTIATIONS.get(spec.differentiation)
        features = feature_count(names, student.num_classes)
        sharing = processes if spec.parallel == "data" else ALONE
        self.life = processes.agree(lambda: Life(student, spec.precision, sharing))
        self.engine = processes.agree(lambda: Engine(self.life, loss, spec, folder.path))
        # theta lives where omega does: phi enters the student's graph.
        self.teacher = build_teacher(
            self.teacher_spec, loss, student.num_classes, features, spec.seed
        ).to(self.life.flat.vector.device)
        self.optimiser = torch.optim.Adam(self.teacher.parameters(), lr=spec.lr)
        self.best = self._theta()
        self.sound = self._theta()
        self.progress = Progress()
        self._resume()

    def _check(
        self, student: Student, loss: LossSpec, teacher: TeacherSpec, spec: TrainingSpec
    ) -> None:
        check_settings(loss, teacher, spec, student.total_steps)
        check_processes(spec, self.processes.world)
        if loss.form == "dense" and student.num_classes > DENSE_LIMIT:
            raise UserError(
                f"loss.form=dense would hold {student.num_classes} x {student.num_classes} numbers "
                "in every slot; use diagonal, lowrank or shared"
            )

    def _theta(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.teacher.state_dict().items()}

    def run(self, on_event: OnEvent) -> TrainingResult:
        """Run the episodes that are left, saving after each."""
        if not self._finished():
            if self.spec.hvp == "exact" and self.spec.differentiation not in WITHOUT_DERIVATIVES:
                self.processes.agree(self._probe)
            on_event({"event": "plan", "plan": describe_plan(self.engine, self.processes)})
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
        if self.processes.rank == 0:
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
        p = self.progress
        began = time.monotonic()
        row: dict[str, Any] = {"event": "episode", "episode": p.episode}
        for outcomes in self._outcomes(on_event):
            row |= self._learn(outcomes)
        row |= {"seconds": round(time.monotonic() - began, 3), "skipped_total": p.skipped}
        if warning := advice(row, self.spec):
            row["warning"] = warning
        p.episode += 1
        p.history.append(row)
        self._save()
        on_event(row)
        if p.skipped_in_a_row >= MOST_SKIPPED and not self._finished():
            raise UserError(
                f"{MOST_SKIPPED} episodes in a row gave no usable hypergradient (the last: "
                f"{row['reason']}); lower the student's learning rate or training.lr"
            )

    def _outcomes(self, on_event: OnEvent) -> Iterator[list[Outcome]]:
        """Yield the outcomes of all students wherever theta may be updated."""
        spec, processes = self.spec, self.processes
        alone = spec.parallel == "data" or processes.world == 1
        mine = range(spec.students) if alone else processes.share(spec.students)
        lives = [self._life(number, on_event) for number in mine]
        # One life ends before the next begins, but for ways that update within one life.
        for outcomes in zip(*lives, strict=True):
            if spec.parallel == "data":
                # The same in all processes but for the last bit, which must not part them.
                together = processes.from_first(list(outcomes))
            else:
                together = processes.gather(list(outcomes))
            yield together
            if spec.differentiation in WITHIN_A_LIFE and any(o.failure for o in together):
                return

    def _life(self, number: int, on_event: OnEvent) -> Iterator[Outcome]:
        """Yield the outcomes of one student, a failure as the last one where it dies."""
        episode, spec = self.progress.episode, self.spec
        steps = self.student.total_steps

        def on_step(phase: str, step: int) -> None:
            on_event(
                {"event": "step", "episode": episode, "phase": phase, "step": step, "of": steps,
                 "student": number, "students": spec.students}
            )

        turn = episode * spec.students + number
        if spec.student_seeds:
            turn %= spec.student_seeds
        # Far from the small seeds that people give to applications.
        seed = spec.seed * 1_000_003 + turn
        noise = (spec.seed * 1_000_003 + episode) * 1_009 + number
        features = tuple(self.teacher_spec.features)
        try:
            yield from self.differentiate(
                Episode(self.engine, features, seed, seed, noise), self.teacher, on_step
            )
        except FloatingPointError as error:
            yield Outcome(failure=str(error))

    def _learn(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """Take outcomes in: remember the best theta, then make one Adam step of ascent."""
        p, spec = self.progress, self.spec
        for outcome in outcomes:
            outcome.failure = outcome.failure or _unusable(outcome, spec.max_growth)
        alive = [o for o in outcomes if not o.failure]
        needed = 2 if spec.differentiation == "mixed" else 1
        usable = len(alive) >= needed
        row: dict[str, Any] = {
            "smoothed": mean([o.smoothed for o in alive]),
            "dev_measure": mean([o.true for o in alive if o.true is not None]),
            "measure": self.student.measure_name,
            "students": len(outcomes),
            "students_lost": len(outcomes) - len(alive),
            "growth": mean([o.way_back.growth for o in alive]),
            "largest": largest([o.way_back.largest for o in alive]),
            "sharpness": largest([o.way_back.sharpness for o in alive]),
            "skipped": not usable, "best": False, "hypergradient_norm": None,
        }
        if not usable:
            p.skipped += 1
            p.skipped_in_a_row += 1
            self._retreat()
            return row | {"reason": next(o.failure for o in outcomes if o.failure)}
        p.skipped_in_a_row = 0
        if row["dev_measure"] is not None and row["dev_measure"] > p.best_measure:
            p.best_measure, p.best_episode = row["dev_measure"], p.episode
            self.best, row["best"] = self._theta(), True
        return row | self._ascend(alive)

    def _ascend(self, alive: list[Outcome]) -> dict[str, Any]:
        spec = self.spec
        estimates = torch.stack([torch.stack(o.estimates) for o in alive])
        gradient = combine(estimates)
        if spec.phi_penalty:
            features = [f for o in alive for f in o.features]
            gradient = gradient - phi_penalty(
                self.teacher, self.loss, features, spec.phi_penalty
            )[1]
        norm = float(gradient.norm())
        if self.progress.episode < spec.episodes:
            self.sound = self._theta()
            scale = min(1.0, spec.clip_norm / (norm + 1e-12)) if spec.clip_norm > 0 else 1.0
            start = 0
            for parameter in self.teacher.parameters():
                piece = gradient[start : start + parameter.numel()]
                parameter.grad = (-scale * piece).view_as(parameter)  # ascent on M-tilde
                start += parameter.numel()
            self.optimiser.step()
        return {
            "hypergradient_norm": norm,
            "signal_to_noise": finite(signal_to_noise(estimates[:, 0])),
        }

    def _retreat(self) -> None:
        """Take theta half the way back to the last one whose students lived."""
        for name, value in self.teacher.state_dict().items():
            value.lerp_(self.sound[name], 0.5)

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
        if self.processes.rank:
            return
        tensors = {f"theta.{k}": v for k, v in self.teacher.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors |= {f"sound.{k}": v for k, v in self.sound.items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in slots.items()}
        self.folder.save_state(tensors, dataclasses.asdict(self.progress))
        self.folder.write_metrics(self.progress.history)

    def _resume(self) -> None:
        processes = self.processes
        first = processes.rank == 0
        mine = processes.agree(lambda: self.folder.load_state() if first else None)
        stored = processes.from_first(mine)
        if stored is None:
            return
        tensors, record = stored
        try:
            self.progress = Progress(**record)
            self.teacher.load_state_dict(_with_prefix(tensors, "theta."))
            self.best = _with_prefix(tensors, "best.")
            device = self.life.flat.vector.device
            sound = _with_prefix(tensors, "sound.") or self._theta()
            self.sound = {k: v.to(device) for k, v in sound.items()}
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
        if first:
            self.folder.write_metrics(self.progress.history)


def _unusable(outcome: Outcome, max_growth: float) -> str:
    if not math.isfinite(outcome.smoothed):
        return "the smoothed measure is not finite"
    if outcome.true is not None and not math.isfinite(outcome.true):
        return "the dev measure is not finite"
    if not all(bool(e.isfinite().all()) for e in outcome.estimates):
        return "the hypergradient is not finite"
    if max_growth and outcome.way_back.largest > max_growth:
        return f"the hypergradient grew {outcome.way_back.largest:.0f}-fold on its way back"
    if outcome.true is not None and not any(bool(e.any()) for e in outcome.estimates):
        # Adam would go on by momentum, away from where there was something to learn.
        return "the hypergradient is zero: the smoothed measure is flat there (saturated?)"
    return ""


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}


def train_teacher(
    student: Student,
    loss: LossSpec,
    teacher: TeacherSpec,
    spec: TrainingSpec,
    folder: RunFolder,
    *,
    record: dict[str, Any],
    on_event: OnEvent = lambda event: None,
    processes: Processes = ALONE,
) -> TrainingResult:
    """Train a teacher (Algorithm 1), or continue the run that ``folder`` holds.

    Each episode trains fresh students (or the next of ``spec.student_seeds``) under the current
    teacher, measures them on dev, and makes one Adam step on theta, or one a window. The last of
    ``spec.episodes`` + 1 episodes measures the last teacher. A student without a finite
    hypergradient is left out; without any, the episode is skipped and counted and theta goes half
    the way back.

    The students of an update, or the batches of a step, are shared by ``processes``; the number
    of processes may change when a run goes on. Only the first of them writes.

    Raises:
        UserError: if a setting is impossible, the student cannot be differentiated twice, the
            folder cannot be written, or no student lives any more.
        PeerLost: if another process has ended.
    """
    training = TeacherTraining(student, loss, teacher, spec, folder, record, processes)
    return training.run(on_event)
