"""The students that a teacher is applied to, in any field: one for each seed and loss, kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from l2t_cli.applying.result import (
    CROSS_ENTROPY,
    LABELS,
    TAUGHT,
    ApplicationResult,
    Score,
    worded,
)
from l2t_cli.applying.teacher_copies import TeacherCopies
from l2t_cli.errors import Interrupted
from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat
from l2t_cli.tidying import FreshFolder
from l2t_core.errors import UserError
from l2t_core.runs.files import SNAPSHOT, atomic_write

_MOST_STUDENTS = 10_000
_LAST_SEED = 2**31 - 1
_SCORE = "score.json"
_SEED = "seed-"  # and the seed: a student's folder


class Application(Protocol):
    """What a field does to apply a teacher.

    ``name`` names the output folder, ``measure`` the score and ``worst`` its worst value, ``rate``
    the setting that is the learning rate, ``default_seed`` the first student's; ``config``
    identifies the student, so that another run's folder is refused, ``may_change`` are those of its
    dotted keys that do not, ``defaults`` what its settings have where nothing is set. ``teacher``
    None trains by cross-entropy.
    """

    name: str
    measure: str
    lower_is_better: bool
    worst: float
    rate: str
    default_seed: int
    may_change: tuple[str, ...]
    defaults: dict[str, Any]

    def config(self) -> dict[str, Any]: ...

    def check(self, teacher: Path) -> None:
        """Raise UserError if the teacher or the data cannot be used."""

    def notes(self, teacher: Path, baseline: bool) -> list[str]:
        """Return lines about what is odd or changed in what the user gave, with their heads."""

    def plan(self, seed: int, teacher: Path | None, folder: Path) -> list[str]:
        """Return the lines that say exactly what :meth:`run` would do."""

    def begun(self, seed: int, teacher: Path | None, folder: Path) -> bool:
        """Tell whether :meth:`run` has left something to go on from."""

    def run(self, seed: int, teacher: Path | None, folder: Path, log_format: LogFormat) -> Score:
        """Train one student, or go on training it, and score it on test unless it diverges."""


def student_title(teacher: Path | None, seed: int) -> str:
    """Return what a student is called: ``taught, seed 1``."""
    return f"{LABELS[TAUGHT if teacher else CROSS_ENTROPY]}, seed {seed}"


def seeds_from(first: int, count: int) -> range:
    """Return ``count`` seeds from ``first`` on.

    Raises:
        UserError: if there are none or too many, or one that not every random number generator
            takes.
    """
    if not 1 <= count <= _MOST_STUDENTS:
        raise UserError(f"--seeds is {count}; it must be at least 1 and at most {_MOST_STUDENTS:,}")
    if not 0 <= first <= _LAST_SEED - count + 1:
        raise UserError(f"--seed is {first}; the students' seeds must lie in [0, 2^31)")
    return range(first, first + count)


def show_plan(
    application: Application, teacher: Path, folder: Path, seeds: range, baseline: bool
) -> None:
    """Print what :func:`apply` would do, and do nothing."""
    found = TeacherCopies(folder).take(teacher)
    application.check(found.readable())
    for note in application.notes(found.readable(), baseline):
        console.line(f"# {note}")
    if found.changed:
        console.line(f"# note: {found.note()}")
    for _, seed, used, place in _jobs(folder, seeds, found.readable(), baseline):
        console.line(f"# {student_title(used, seed)}")
        for text in application.plan(seed, used, place):
            console.line(text)


def apply(
    application: Application,
    teacher: Path,
    folder: Path,
    seeds: range,
    *,
    baseline: bool,
    log_format: LogFormat,
) -> ApplicationResult:
    """Train and score a student for each seed and arm; finished ones are reused.

    All are taught by one copy of the teacher, which stays in ``folder``. The result holds the
    students that earlier commands have finished there, too.

    Raises:
        UserError: if the teacher does not fit, the folder holds another application, a finished
            student's score is damaged, or no student lives.
        Interrupted: after Ctrl-C.
    """
    from l2t_core.runs.folder import open_run

    copies = TeacherCopies(folder)
    copy = copies.take(teacher)
    application.check(copy.readable())
    config = {"teacher": copy.sha256, "student": application.config()}
    if log_format.wordy:
        for note in application.notes(copy.readable(), baseline):
            console.line(note)
        if copy.changed:
            console.line(f"note: {copy.note()}")
    before = FreshFolder.before(folder)
    free = [f"student.{key}" for key in application.may_change]
    claimed = open_run(  # its own as long as this lives
        folder, config, may_change=free, defaults={"student": application.defaults}
    )
    jobs = list(_jobs(folder, seeds, copy.path, baseline))
    try:
        scores = _finished_before(folder)  # first, for a damaged one is told before any training
        claimed.adopt()
        copies.write()
        application.check(copy.path)  # the file may have been replaced since it was looked at
        for arm, seed, used, place in jobs:
            score = _finished_or_run(application, seed, used, place, log_format)
            scores[arm][seed] = score
        _refuse_if_none_lived(application, [s for arm in scores.values() for s in arm.values()])
    except KeyboardInterrupt:
        raise Interrupted("finished students are kept; the same command continues") from None
    except Exception as error:
        for _, seed, used, place in jobs:
            if _lived(place) or application.begun(seed, used, place):
                raise
        raise _taken_back(before, error) from None
    result = ApplicationResult(
        application.name, application.measure, application.lower_is_better, application.worst,
        {arm: by_seed for arm, by_seed in scores.items() if by_seed}, claimed.path,
    )
    _write_result(result, teacher, config)
    return result


def _taken_back(before: FreshFolder, error: Exception) -> Exception:
    """Remove the new folder; keep the log that ``error`` names beside it and name that."""
    message = str(error)
    for log in before.path.rglob("*.log") if before.fresh else ():
        if isinstance(error, UserError) and str(log) in message:
            kept = before.path.with_name(f"{before.path.name}.failed.log")
            log.replace(kept)
            error = UserError(message.replace(str(log), str(kept)))
            break
    before.take_back()
    return error


def _jobs(
    folder: Path, seeds: range, teacher: Path, baseline: bool
) -> Iterator[tuple[str, int, Path | None, Path]]:
    """Yield each student's arm, seed, teacher and folder."""
    for seed in seeds:
        for arm in (TAUGHT, CROSS_ENTROPY) if baseline else (TAUGHT,):
            yield arm, seed, teacher if arm == TAUGHT else None, folder / arm / f"{_SEED}{seed}"


def _finished_before(folder: Path) -> dict[str, dict[int, Score]]:
    """Return the scores of the students in ``folder`` that are finished, by arm and seed."""
    scores: dict[str, dict[int, Score]] = {arm: {} for arm in (TAUGHT, CROSS_ENTROPY)}
    for arm, by_seed in scores.items():
        for place in (folder / arm).glob(f"{_SEED}*"):
            seed = place.name.removeprefix(_SEED)
            if seed.isdecimal() and (score := _stored(place)):
                by_seed[int(seed)] = score
    return scores


def _finished_or_run(
    application: Application,
    seed: int,
    teacher: Path | None,
    place: Path,
    log_format: LogFormat,
) -> Score:
    loud, title = log_format.wordy, student_title(teacher, seed)
    stored = _stored(place)
    if stored:
        if loud:
            console.line(f"{title}: {_said(application, stored)} (finished before)")
        (place / SNAPSHOT).unlink(missing_ok=True)
        return stored
    if loud:
        for text in application.plan(seed, teacher, place):
            if "fairseq" in text.split(" --")[0]:
                console.show_command(text)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror}") from None
    score = application.run(seed, teacher, place, log_format)
    atomic_write(place / _SCORE, json.dumps(asdict(score), indent=2) + "\n")
    (place / SNAPSHOT).unlink(missing_ok=True)
    if loud:
        said = _said(application, score)
        console.line(f"{title}: {said} in {console.duration(score.seconds)}")
    return score


def _stored(place: Path) -> Score | None:
    """Return the score of a student that is finished, None for another."""
    kept = place / _SCORE
    if not kept.exists():
        return None
    try:
        return Score(**json.loads(kept.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{kept} is damaged; delete {place} to train it again") from error


def _lived(place: Path) -> bool:
    """Tell whether a student is finished and did not diverge, or its file has to be looked at."""
    try:
        score = _stored(place)
    except UserError:
        return True
    return score is not None and not score.diverged


def _said(application: Application, score: Score) -> str:
    if score.value is None:
        return f"diverged ({score.diverged})"
    return worded(application.measure, score.value)


def _refuse_if_none_lived(application: Application, scores: Iterable[Score]) -> None:
    reasons = [score.diverged for score in scores]
    if all(reasons):
        who = f"all {len(reasons)} students" if len(reasons) > 1 else "the student"
        raise UserError(f"{who} diverged ({reasons[0]}); lower {application.rate}")


def _write_result(result: ApplicationResult, teacher: Path, config: dict[str, Any]) -> None:
    told = {"teacher": str(teacher), "teacher_sha256": config["teacher"]}
    content = {**told, **result.content()}
    atomic_write(result.folder / "result.json", json.dumps(content, indent=2) + "\n")
