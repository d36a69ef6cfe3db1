"""Teacher training: Algorithm 1 of L2T-DLF over fresh students, resumable to the bit."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l2t_core.errors import UserError
from l2t_core.hypergradients.diagnostics import finite
from l2t_core.hypergradients.engine import Engine, Episode, describe_plan
from l2t_core.hypergradients.ways import DIFFERENTIATIONS, Outcome, true_measure
from l2t_core.runs.folder import RunFolder
from l2t_core.runs.processes import ALONE, Processes
from l2t_core.specs import (
    LEARNED_RULES,
    WITHIN_A_LIFE,
    WITHOUT_DERIVATIVES,
    LossSpec,
    TeacherSpec,
    TrainingSpec,
)
from l2t_core.students.life import Life, precision_of
from l2t_core.students.protocol import Student
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import TEACHERS, Teacher, build_teacher
from l2t_core.teachers.file import TeacherHeader, save_teacher
from l2t_core.training.checks import check_processes, check_settings
from l2t_core.training.lived import can_be_told, joined, timed_teacher
from l2t_core.training.state import Leader, Theta, TrainingState, chosen_by
from l2t_core.training.update import (
    FLAT_REMEDY,
    account,
    advice,
    ascend,
    combine,
    ends_calmly,
    judge,
    keep_bounded,
    nothing_usable,
    penalised,
    signal_to_noise,
    unusable,
)

# So many episodes, or windows, in a row without a usable hypergradient end a run.
MOST_SKIPPED = 8
# Beyond the students of any run's episodes.
FIRST_FINAL_STUDENT = 900_000

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What teacher training leaves: files, the best true dev measure and the episodes' log.

    ``lived_path`` is the file of the losses of the best life whose loss changed, None where none
    did, or where it was for a teacher that looked at the student.
    """

    best_path: Path
    last_path: Path
    best_measure: float
    best_episode: int
    skipped: int
    history: list[dict[str, Any]]
    lived_path: Path | None = None


class TeacherTraining:
    """One run: what stays the same of it, and the state that its episodes change."""

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
        own = TEACHERS.get(teacher_spec.name).features
        names = tuple(teacher_spec.features) or own or student.default_features
        self.teacher_spec = dataclasses.replace(teacher_spec, features=list(names))
        self.record = record
        self.differentiate = DIFFERENTIATIONS.get(spec.differentiation)
        features = feature_count(names, student.num_classes)
        sharing = processes if spec.parallel == "data" else ALONE
        self.life = processes.agree(lambda: Life(student, spec.precision, sharing))
        self.engine = processes.agree(lambda: Engine(self.life, loss, spec, folder.path))
        # theta lives where omega does: phi enters the student's graph.
        self.teacher = self._new_teacher(features).to(self.life.flat.vector.device)
        self.state = processes.agree(lambda: TrainingState(self.teacher, spec))
        self._resume()
        if processes.rank == 0:
            folder.adopt()

    def _check(
        self, student: Student, loss: LossSpec, teacher: TeacherSpec, spec: TrainingSpec
    ) -> None:
        whole = dataclasses.replace(spec, precision=precision_of(student, spec.precision))
        check_settings(loss, teacher, whole, student.total_steps, student.num_classes)
        check_processes(spec, self.processes.world)

    def _new_teacher(self, features: int) -> Teacher:
        teacher = build_teacher(
            self.teacher_spec, self.loss, self.student.num_classes, features, self.spec.seed
        )
        keep_bounded(teacher, self.loss, self.spec)
        return teacher

    def _teacher_of(self, theta: Theta) -> Teacher:
        teacher = self._new_teacher(self.teacher.num_features)
        teacher.load_state_dict(theta)
        return teacher

    def run(self, on_event: OnEvent) -> TrainingResult:
        """Run the episodes that are left, saving after each, and the final students."""
        if history := self.state.progress.history:
            on_event({"event": "resumed", "history": history})
        if not self._finished():
            if self.spec.differentiation not in WITHOUT_DERIVATIVES:
                self.processes.agree(lambda: self.engine.prepare(self.teacher))
            plan = describe_plan(self.engine, self.processes)
            on_event({"event": "plan", "plan": plan, "threads": torch.get_num_threads()})
        while not self._finished():
            self._episode(on_event)
        if len(self.state.leaders) > 1:
            self._finals(on_event)
        best, folder, p = self._write_teachers(), self.folder, self.state.progress
        lived = folder.teacher_lived if self.state.life else None
        return TrainingResult(
            folder.teacher_best, folder.teacher_last, best.mark(), best.episode, p.skipped,
            p.history, lived,
        )

    def _write_teachers(self) -> Leader:
        """Write the best and the last teacher, to be applied while the training goes on."""
        best, last = self.state.winner(), self.state.last(self.spec.episodes)
        if self.processes.rank == 0:
            header = self._header(best.episode, best.mark())
            save_teacher(self.folder.teacher_best, self._teacher_of(best.theta), header)
            save_teacher(self.folder.teacher_last, self.teacher, self._header(*last))
            if life := self.state.life:
                header = self._header(life.episode, life.measure)
                save_teacher(self.folder.teacher_lived, *timed_teacher(life.theta, header))
        return best

    def _finals(self, on_event: OnEvent) -> None:
        """Have each leader teach the same fresh students: its own may have been lucky ones."""
        spec = self.spec
        for leader in self.state.leaders:
            if leader.scores:
                continue
            began = time.monotonic()
            teacher = self._teacher_of(leader.theta).to(self.life.flat.vector.device)
            scores = [
                self._final_score(teacher, leader.episode, number, on_event)
                for number in self._mine(spec.final_students)
            ]
            leader.scores = self._together(scores)
            leader.seconds = round(time.monotonic() - began, 3)
            self._save()
            on_event(leader.row())

    def _final_score(
        self, teacher: Teacher, episode: int, number: int, on_event: OnEvent
    ) -> float | None:
        """Return the true dev measure of a final student, None if it dies."""
        seed = self.spec.seed * 1_000_003 + FIRST_FINAL_STUDENT + number
        life = Episode(self.engine, tuple(self.teacher_spec.features), seed, seed)
        on_step = self._on_step(episode, number, self.spec.final_students, on_event)
        try:
            found = true_measure(life, teacher, on_step)
        except FloatingPointError:
            return None
        return found if math.isfinite(found) else None

    def _finished(self) -> bool:
        p, spec = self.state.progress, self.spec
        stale = p.episode - 1 - p.best_episode()
        # The last update's teacher still has to be measured, hence one more episode than updates.
        return p.episode > spec.episodes or bool(spec.patience and stale >= spec.patience)

    def _episode(self, on_event: OnEvent) -> None:
        p = self.state.progress
        began = time.monotonic()
        row: dict[str, Any] = {"event": "episode", "episode": p.episode}
        seen: list[dict[str, Any]] = []
        self.lived: list[Theta] = []  # by window
        for outcomes in self._outcomes(on_event):
            seen.append(self._learn(outcomes))
        # Of a life's windows the last one is told.
        row |= seen[-1] | {"skipped": all(one["skipped"] for one in seen)}
        row |= {"seconds": round(time.monotonic() - began, 3), **p.skips()}
        remedy = getattr(self.student, "flat_remedy", FLAT_REMEDY)
        if warning := advice(row, self.spec, ends_calmly(self.student), remedy):
            row["warning"] = warning
        p.episode += 1
        p.ended = p.episode > self.spec.episodes
        p.history.append(row)
        self._save()
        self._write_teachers()
        on_event(row)
        if p.skipped_in_a_row >= MOST_SKIPPED and not self._finished():
            what = "windows" if self.spec.differentiation in WITHIN_A_LIFE else "episodes"
            stuck = nothing_usable(f"none of the last {p.skipped_in_a_row} {what}", row)
            raise self.processes.told_once(stuck)

    def _outcomes(self, on_event: OnEvent) -> Iterator[list[Outcome]]:
        """Yield the outcomes of all students wherever theta may be updated."""
        spec = self.spec
        lives = [self._life(number, on_event) for number in self._mine(spec.students)]
        # One life ends before the next begins, but for ways that update within one life.
        for outcomes in zip(*lives, strict=True):
            # By way of the CPU: each process has a GPU of its own.
            gathered = self._together([o.to("cpu") for o in outcomes])
            together = [o.to(self.life.flat.vector.device) for o in gathered]
            yield together
            # A window without a usable hypergradient ends no life, a death does for all processes.
            if not all(o.lived for o in together):
                return

    def _mine(self, count: int) -> range:
        """Return which of ``count`` students this process trains, or helps to train."""
        return range(count) if self.spec.parallel == "data" else self.processes.share(count)

    def _together(self, mine: list[Any]) -> list[Any]:
        """Return what all students gave, in their order."""
        if self.spec.parallel == "data":
            # The same in all processes but for the last bit, which must not part them.
            return list(self.processes.from_first(mine))
        return self.processes.gather(mine)

    def _on_step(
        self, episode: int, number: int, students: int, on_event: OnEvent
    ) -> Callable[[str, int], None]:
        of = self.student.total_steps

        def on_step(phase: str, step: int) -> None:
            on_event(
                {"event": "step", "episode": episode, "phase": phase, "step": step, "of": of,
                 "student": number, "students": students}
            )

        return on_step

    def _life(self, number: int, on_event: OnEvent) -> Iterator[Outcome]:
        """Yield the outcomes of one student, a failure as the last one where it dies."""
        episode, spec = self.state.progress.episode, self.spec
        turn = episode * spec.students + number
        if spec.student_seeds:
            turn %= spec.student_seeds
        # Far from the small seeds that people give to applications.
        seed = spec.seed * 1_000_003 + turn
        noise = (spec.seed * 1_000_003 + episode) * 1_009 + number
        features = tuple(self.teacher_spec.features)
        try:
            yield from self.differentiate(
                Episode(self.engine, features, seed, seed, noise), self.teacher,
                self._on_step(episode, number, spec.students, on_event),
            )
        except FloatingPointError as error:
            yield Outcome(failure=str(error))

    def _learn(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """Take outcomes in: remember the best theta, then update it, or judge the last update."""
        p, spec = self.state.progress, self.spec
        judged = any(o.judges for o in outcomes)  # of several students some may have died
        rehearsed = spec.update_rule in LEARNED_RULES and not judged
        if can_be_told(self.teacher_spec, self.teacher, spec, self.student.total_steps):
            self.lived += [] if rehearsed else [self.state.theta()]
        telling = [o for o in outcomes if o.true is not None or not o.lived]
        scores = [o.true if o.lived else None for o in telling]
        for outcome in outcomes:
            outcome.failure = outcome.failure or unusable(outcome, spec.max_growth)
        needed = 2 if spec.differentiation == "mixed" else 1
        row = account(outcomes, self.student.measure_name, needed)
        if row["dev_measure"] is not None:
            row["best"] = self.state.offer(chosen_by(scores))
            if p.episode < spec.episodes:  # the last one's loss stays as it is
                steps = self.student.total_steps
                lived = joined(self.lived, self.engine.first, steps, spec.window)
                self.state.offer_life(chosen_by(scores), lived)
        if row["skipped"]:
            self.state.rule.forget()
            p.skipped += not judged  # what is judged calls for no update
            p.skipped_in_a_row += not judged
            if p.episode < spec.episodes:
                self._retreat()
            return row
        p.skipped_in_a_row = p.skipped_in_a_row if judged else 0
        return row | self._update([o for o in outcomes if not o.failure])

    def _update(self, alive: list[Outcome]) -> dict[str, Any]:
        spec, rule = self.spec, self.state.rule
        estimates = torch.stack([torch.stack(o.estimates) for o in alive])
        features = [f for o in alive for f in o.features]
        gradient = penalised(combine(estimates), self.teacher, self.loss, features, spec)
        norm = float(gradient.norm())
        if self.state.progress.episode < spec.episodes:
            self.state.sound = self.state.theta()
            if alive[0].judges:
                judge(gradient, rule, spec)
            else:
                ascend(self.teacher, self.loss, gradient, rule, spec)
        return {
            "hypergradient_norm": finite(norm),
            "signal_to_noise": finite(signal_to_noise(estimates[:, 0])),
        }

    def _retreat(self) -> None:
        """Take theta half the way back to the last one whose students lived."""
        for name, value in self.teacher.state_dict().items():
            value.lerp_(self.state.sound[name], 0.5)

    def _header(self, episode: int, measure: float | None) -> TeacherHeader:
        record = {
            **self.record,
            "episodes": self.state.progress.episode,
            "final_students": sum(len(leader.scores) for leader in self.state.leaders),
            "episode": episode,
            "dev_measure": measure if measure is not None and math.isfinite(measure) else None,
            "measure": self.student.measure_name,
            "training": dataclasses.asdict(self.spec),
        }
        student = self.student
        return TeacherHeader(
            self.teacher_spec, self.loss, student.num_classes, student.total_steps,
            student.dev_interval(), student.fingerprint(), record,
        )

    def _save(self) -> None:
        if self.processes.rank:
            return
        self.folder.save_state(*self.state.pack())
        self.folder.write_metrics(self.state.rows())

    def _resume(self) -> None:
        processes, first = self.processes, self.processes.rank == 0
        mine = processes.agree(lambda: self.folder.load_state() if first else None)
        stored = processes.from_first(mine)
        if stored is None:
            return
        try:
            tensors, numbers = stored
            self.state.unpack(tensors, numbers, self.spec.episodes)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise processes.told_once(
                UserError(
                    f"{self.folder.state} does not belong to this run; put its own there again, or "
                    "delete it to start this run afresh"
                )
            ) from error
        if first:
            self.folder.write_metrics(self.state.rows())


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
    teacher, measures them on dev, and updates theta once, or once a window. The last of
    ``spec.episodes`` + 1 episodes measures the last teacher. A student without a finite
    hypergradient is left out; without any, the episode is skipped and counted and theta goes half
    the way back. With ``spec.finalists`` above 1, so many of the best teachers then teach the same
    fresh students, and the best is chosen by their mean.

    The students of an update, or the batches of a step, are shared by ``processes``; the number
    of processes may change when a run goes on. Only the first of them writes.

    Raises:
        UserError: if a setting is impossible, the student cannot be differentiated twice, the
            folder cannot be written, or no student lives any more.
        PeerLost: if another process has ended.
    """
    training = TeacherTraining(student, loss, teacher, spec, folder, record, processes)
    return training.run(on_event)
