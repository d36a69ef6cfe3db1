"""What changes in a run of teacher training from episode to episode, and how it is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from l2t_core.hypergradients.diagnostics import mean
from l2t_core.specs import TrainingSpec
from l2t_core.teachers.architectures import Teacher
from l2t_core.training.rules import UPDATE_RULES, part

Theta = dict[str, Tensor]


@dataclass
class Progress:
    """The part of a run that is numbers.

    ``ended``: as many episodes were made as were asked for; the last one changed no theta.
    """

    episode: int = 0
    ended: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def best_episode(self) -> int:
        """Return the last episode that was the best so far, -1 if there is none."""
        return max((row["episode"] for row in self.history if row["best"]), default=-1)

    def skips(self) -> dict[str, int]:
        """Return the counts of skipped hypergradients, as an episode's row holds them."""
        return {"skipped_total": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def take_back(self) -> None:
        """Forget the last episode."""
        self.ended = False
        self.episode -= 1
        self.history.pop()
        last = self.history[-1] if self.history else {}
        self.skipped = last.get("skipped_total", 0)
        self.skipped_in_a_row = last.get("skipped_in_a_row", 0)


@dataclass
class Leader:
    """A teacher that may become the best: theta, and its own episode's true dev measure.

    ``scores`` are the true dev measures of the final students that it has taught, None for one
    that died, and ``seconds`` the time that they took.
    """

    episode: int
    measure: float
    theta: Theta
    scores: list[float | None] = field(default_factory=list)
    seconds: float = 0.0

    def mark(self) -> float:
        """Return what it is chosen by: its final students' mean if it has any."""
        if not self.scores:
            return self.measure
        return chosen_by(self.scores)

    def row(self) -> dict[str, Any]:
        """Return the log's row on its final students."""
        return {
            "event": "final", "episode": self.episode,
            "dev_measure": mean([s for s in self.scores if s is not None]),
            "scores": self.scores, "students": len(self.scores),
            "students_lost": self.scores.count(None), "seconds": self.seconds,
        }


def chosen_by(scores: Sequence[float | None]) -> float:
    """Return what a teacher is chosen by: its students' mean true dev measure.

    Each student that died (None) costs 1: of teachers with measures in [0, 1] the one that loses
    fewer students wins. Where no student lived, it is minus infinity.
    """
    alive = [s for s in scores if s is not None]
    if not alive:
        return -math.inf
    return math.fsum(alive) / len(alive) - (len(scores) - len(alive))


class TrainingState:
    """Theta in its teacher, the rule of its updates, the best thetas so far and the numbers.

    ``sound`` is the last theta whose students told something. ``leaders`` are the best by their
    own episode's measure, at most ``keep`` of them, the best first and of equals the earliest;
    until an episode has given a measure, the theta of the start stands for it. ``ousted`` is the
    one whose place the last of them took: a run that goes on takes its last episode back. ``life``
    is the best
    of the lives whose loss has changed (:mod:`l2t_core.training.lived`), with theta of all of it.
    """

    def __init__(self, teacher: Teacher, spec: TrainingSpec) -> None:
        self.teacher, self.keep = teacher, spec.finalists
        self.rule = UPDATE_RULES.get(spec.update_rule)(teacher, spec)
        self.sound = self.theta()
        self.leaders = [Leader(-1, -math.inf, self.theta())]
        self.ousted: list[Leader] = []
        self.life: Leader | None = None
        self.progress = Progress()

    def theta(self) -> Theta:
        """Return a copy of theta."""
        return {k: v.clone() for k, v in self.teacher.state_dict().items()}

    def offer(self, measure: float) -> bool:
        """Let the present theta be a leader if it is good enough; tell whether it is the first."""
        new = Leader(self.progress.episode, measure, self.theta())
        known = [leader for leader in self.leaders if leader.episode >= 0]
        ranked = sorted([*known, new], key=lambda leader: -leader.measure)
        self.leaders, self.ousted = ranked[: self.keep], ranked[self.keep :]
        return self.leaders[0] is new

    def offer_life(self, measure: float, theta: Theta) -> None:
        """Let the life that has just ended be remembered if it is the best so far."""
        if theta and (self.life is None or measure > self.life.measure):
            self.life = Leader(self.progress.episode, measure, theta)

    def winner(self) -> Leader:
        """Return the leader with the best mark, of equals the first."""
        return max(self.leaders, key=Leader.mark)

    def last(self, episodes: int) -> tuple[int, float | None]:
        """Return the present theta's episode and dev measure, None if it has none yet.

        Each episode updates theta after measuring it, but for the one after ``episodes`` updates.
        """
        p = self.progress
        if p.episode <= episodes:
            return p.episode, None
        return p.episode - 1, p.history[-1]["dev_measure"]

    def rows(self) -> list[dict[str, Any]]:
        """Return the log: a row for each episode, then for each leader with final students."""
        return [*self.progress.history, *(x.row() for x in self.leaders if x.scores)]

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything as tensors by name and a JSON-compatible record."""
        tensors = _named("theta", self.teacher.state_dict()) | _named("sound", self.sound)
        tensors |= self.rule.pack()
        kept: dict[str, list[dict[str, Any]]] = {}
        for name, leaders in {"leader": self.leaders, "ousted": self.ousted}.items():
            kept[name] = []
            for index, leader in enumerate(leaders):
                tensors |= _named(f"{name}.{index}", leader.theta)
                kept[name].append({k: v for k, v in vars(leader).items() if k != "theta"})
        life = self.life
        tensors |= _named("life", life.theta if life else {})
        return tensors, {
            "life": {"episode": life.episode, "measure": life.measure} if life else None,
            "progress": dataclasses.asdict(self.progress), "leaders": kept["leader"],
            "ousted": kept["ousted"],
            "threads": torch.get_num_threads(),
        }

    def unpack(self, tensors: dict[str, Tensor], record: dict[str, Any], episodes: int) -> None:
        """Take over what :meth:`pack` returned, on the teacher's device.

        If that was the end of a run of fewer than ``episodes`` updates, the run goes on as if it
        had been asked for them at once: its last episode is taken back, to be made again and
        followed, and so are the final students.

        torch computes on as many threads again as when it was packed: a sum that other threads
        share out has other last bits.

        Raises:
            RuntimeError, KeyError, TypeError, ValueError: if it is another run's.
        """
        device = next(self.teacher.parameters()).device
        self.progress = Progress(**record["progress"])
        self.leaders, self.ousted = (
            [
                Leader(theta=part(tensors, f"{name}.{index}."), **numbers)
                for index, numbers in enumerate(found)
            ]
            # The second is younger than some states.
            for name, found in (("leader", record["leaders"]), ("ousted", record.get("ousted", [])))
        )
        self.teacher.load_state_dict(part(tensors, "theta."))
        self.sound = {k: v.to(device) for k, v in part(tensors, "sound.").items()}
        self.rule.unpack(tensors)
        if life := record.get("life"):  # younger than some states
            self.life = Leader(theta=part(tensors, "life."), **life)
        torch.set_num_threads(int(record["threads"]))
        if self.progress.ended and self.progress.episode <= episodes:
            self._reopen()

    def _reopen(self) -> None:
        p = self.progress
        p.take_back()
        # Until it is made again, some theta has to stand where its own was the only leader.
        known = [x for x in [*self.leaders, *self.ousted] if x.episode != p.episode]
        self.ousted = []
        self.leaders = known or [Leader(-1, -math.inf, self.sound)]
        for leader in self.leaders:
            leader.scores, leader.seconds = [], 0.0


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
