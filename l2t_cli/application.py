"""Applying a teacher: what every field does alike. Seeds, reuse of finished students, the table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from l2t_cli import console
from l2t_cli.console import LogFormat
from l2t_cli.errors import Interrupted
from l2t_cli.tidying import FreshFolder
from l2t_core.comparison import deviation, mean
from l2t_core.errors import UserError
from l2t_core.files import atomic_write

TAUGHT, CROSS_ENTROPY = "taught", "cross_entropy"
_MOST_STUDENTS = 10_000
_LAST_SEED = 2**31 - 1
LABELS = {TAUGHT: "taught", CROSS_ENTROPY: "cross-entropy"}


@dataclass(frozen=True)
class Score:
    """What one trained student reached on test. ``signature`` makes the number repeatable.

    ``seconds`` are those of an image student's every start, of a fairseq command's last one.
    """

    value: float
    signature: str
    seconds: float


class Application(Protocol):
    """What a field does to apply a teacher.

    ``name`` names the output folder, ``measure`` the score; ``config`` identifies the student,
    so that another run's folder is refused. ``teacher`` None trains by cross-entropy.
    """

    name: str
    measure: str
    lower_is_better: bool

    def config(self) -> dict[str, Any]: ...

    def check(self, teacher: Path) -> None:
        """Raise UserError if the teacher or the data cannot be used."""

    def notes(self, teacher: Path, baseline: bool) -> list[str]:
        """Return lines about what is changed in what the user gave."""

    def plan(self, seed: int, teacher: Path | None, folder: Path) -> list[str]:
        """Return the lines that say exactly what :meth:`run` would do."""

    def begun(self, seed: int, teacher: Path | None, folder: Path) -> bool:
        """Tell whether :meth:`run` has left something to go on from."""

    def run(self, seed: int, teacher: Path | None, folder: Path, log_format: LogFormat) -> Score:
        """Train one student, or go on training it, and score it on test."""


@dataclass(frozen=True)
class ApplicationResult:
    """All scores of one application, by arm (``taught``, ``cross_entropy``) and seed."""

    name: str
    measure: str
    lower_is_better: bool
    scores: dict[str, dict[int, Score]]
    folder: Path

    def values(self, arm: str) -> list[float]:
        """Return the scores of an arm in the order of its seeds."""
        return [score.value for _, score in sorted(self.scores.get(arm, {}).items())]

    def signature(self) -> str:
        """Return the signature of the taught students' scores."""
        return next(iter(self.scores[TAUGHT].values())).signature

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's rows: arm, students, score, difference, seconds a student."""
        reference = self.values(CROSS_ENTROPY)
        rows: list[tuple[str, ...]] = []
        for arm in (TAUGHT, CROSS_ENTROPY):
            values = self.values(arm)
            if not values:
                continue
            difference = ""
            if arm == TAUGHT and reference:
                difference = f"{mean(values) - mean(reference):+.2f}"
            seconds = mean([s.seconds for s in self.scores[arm].values()])
            first, last = min(self.scores[arm]), max(self.scores[arm])
            seeds = str(first) if first == last else f"{first}-{last}"
            rows.append(
                (
                    LABELS[arm],
                    seeds,
                    mean_and_deviation(values),
                    difference,
                    console.duration(seconds),
                )
            )
        return rows

    def verdict(self) -> str:
        """Return one sentence that says what came out, win or not."""
        taught, reference = self.values(TAUGHT), self.values(CROSS_ENTROPY)
        if not reference:
            return ""
        gain = mean(taught) - mean(reference)
        better = gain < 0 if self.lower_is_better else gain > 0
        students = f"{len(taught)} student{'s' if len(taught) > 1 else ''} each"
        if len(taught) == 1:
            students += ": how much chance adds is not known"
        if abs(gain) < 0.005:
            return f"{self.name}: taught and cross-entropy came out equal ({students})."
        word = "better" if better else "worse"
        return (
            f"{self.name}: taught came out {word} than cross-entropy by {abs(gain):.2f} "
            f"{'points of error' if self.measure == 'error %' else self.measure} ({students})."
        )


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    application.check(teacher)
    for note in application.notes(teacher, baseline):
        console.line(f"# changed: {note}")
    for _, seed, used, place in _jobs(folder, seeds, teacher, baseline):
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

    Raises:
        UserError: if the teacher does not fit, or the folder holds another application.
        Interrupted: after Ctrl-C.
    """
    from l2t_core.run_folder import open_run

    application.check(teacher)
    config = {"teacher": checksum(teacher), "student": application.config()}
    if log_format.wordy:
        for note in application.notes(teacher, baseline):
            console.line(f"changed: {note}")
    before = FreshFolder.before(folder)
    open_run(folder, config)
    jobs = list(_jobs(folder, seeds, teacher, baseline))
    scores: dict[str, dict[int, Score]] = {}
    try:
        for arm, seed, used, place in jobs:
            score = _finished_or_run(application, seed, used, place, log_format)
            scores.setdefault(arm, {})[seed] = score
    except KeyboardInterrupt:
        raise Interrupted("finished students are kept; the same command continues") from None
    except Exception as error:
        for _, seed, used, place in jobs:
            if (place / "score.json").exists() or application.begun(seed, used, place):
                raise
        raise _taken_back(before, error) from None
    result = ApplicationResult(
        application.name, application.measure, application.lower_is_better, scores, folder
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


def report(result: ApplicationResult, log_format: LogFormat) -> None:
    """Print the table, the signature and what was written."""
    if log_format is LogFormat.json:
        content = json.loads((result.folder / "result.json").read_text(encoding="utf-8"))
        print(json.dumps({"event": "result", **content}), flush=True)
        return
    if log_format is LogFormat.none:
        return
    columns = ["student", "seeds", f"test {result.measure}", "difference", "time each"]
    console.table(
        f"{result.name}: same steps, batches and seeds"
        if len(result.scores) > 1
        else result.name,
        columns,
        result.rows(),
        numbers=(2, 3, 4),
    )
    console.line(f"signature: {result.signature()}")
    if verdict := result.verdict():
        console.line(verdict)
    console.files([("result", result.folder / "result.json"), ("students", result.folder)])


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """Return ``27.31 ± 0.12``, the deviation being the sample's; the number alone for one."""
    wide = deviation(values)
    return f"{mean(values):.{digits}f}" + (f" ± {wide:.{digits}f}" if wide is not None else "")


def worded(measure: str, value: float) -> str:
    """Return ``test BLEU 27.31`` or ``test error 3.00 %``."""
    name, _, unit = measure.partition(" ")
    return f"test {name} {value:.2f} {unit}".rstrip()


def _jobs(
    folder: Path, seeds: range, teacher: Path, baseline: bool
) -> Iterator[tuple[str, int, Path | None, Path]]:
    """Yield each student's arm, seed, teacher and folder."""
    for seed in seeds:
        for arm in (TAUGHT, CROSS_ENTROPY) if baseline else (TAUGHT,):
            yield arm, seed, teacher if arm == TAUGHT else None, folder / arm / f"seed-{seed}"


def _finished_or_run(
    application: Application,
    seed: int,
    teacher: Path | None,
    place: Path,
    log_format: LogFormat,
) -> Score:
    kept = place / "score.json"
    loud, title = log_format.wordy, student_title(teacher, seed)
    if kept.exists():
        try:
            score = Score(**json.loads(kept.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{kept} is damaged; delete {place} to train it again") from error
        if loud:
            console.line(
                f"{title}: {worded(application.measure, score.value)} "
                "(finished before)"
            )
        return score
    if loud:
        for text in application.plan(seed, teacher, place):
            if "fairseq" in text.split(" --")[0]:
                console.show_command(text)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror}") from None
    score = application.run(seed, teacher, place, log_format)
    atomic_write(kept, json.dumps(asdict(score), indent=2) + "\n")
    if loud:
        console.line(
            f"{title}: {worded(application.measure, score.value)} "
            f"in {console.duration(score.seconds)}"
        )
    return score


def _write_result(result: ApplicationResult, teacher: Path, config: dict[str, Any]) -> None:
    content = {
        "name": result.name,
        "teacher": str(teacher),
        "teacher_sha256": config["teacher"],
        "measure": result.measure,
        "lower_is_better": result.lower_is_better,
        "signature": result.signature(),
        "scores": {
            arm: [{"seed": seed, **asdict(score)} for seed, score in sorted(by_seed.items())]
            for arm, by_seed in result.scores.items()
        },
    }
    atomic_write(result.folder / "result.json", json.dumps(content, indent=2) + "\n")
