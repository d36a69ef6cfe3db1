"""``l2t compare``: losses tuned alike, then set side by side on fresh seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from l2t_cli.applying.teacher_copies import TeacherCopies
from l2t_cli.comparing import plan as compare_plan
from l2t_cli.comparing.trials import FieldTrials, Result, Trial, TrialStore, run_trials, workers
from l2t_cli.doctor import cores
from l2t_cli.errors import Interrupted
from l2t_cli.options import ChosenFormat, DryRun, Jobs, RecipeName, changes, output_folder
from l2t_cli.recipe_reading import values as recipe_values
from l2t_cli.recipe_reading.loading import CORE_SECTIONS, Recipe, refuse_sections
from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat
from l2t_cli.screen.progress import bar
from l2t_cli.tidying import FreshFolder
from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_write, claimed, is_unfinished
from l2t_core.teachers.ready import find_teacher


def command(
    recipe: RecipeName,
    overrides: Annotated[list[str] | None, changes("compare.seeds=10")] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(
            parser=find_teacher,
            metavar="TEACHER",
            help="A teacher file (or ready-made teacher) whose loss is compared, too; give it once "
            "or more.",
        ),
    ] = None,
    out: Annotated[Path | None, output_folder("runs/RECIPE-compare")] = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    log_format: ChosenFormat = None,
) -> None:
    """Compare losses fairly: each tuned alike on dev, then the same fresh seeds on test.

    The recipe's `compare` section lists losses, grids and seeds. Finished trials are kept: the
    same command goes on, and one with more losses or seeds adds to them.
    """
    loaded = load_for_comparison(recipe, overrides or [])
    folder = out or Path("runs") / f"{loaded.short_name}-compare"
    comparison = Comparison(loaded, list(teacher or []), folder)
    if dry_run:
        comparison.show_plan()
        return
    comparison.run(chosen_jobs(jobs, [comparison]), console.default_format(log_format), report=True)


def load_for_comparison(name: str, changes: Sequence[str]) -> Recipe:
    """Return a recipe whose ``compare`` section makes sense.

    Raises:
        UserError: at the first thing that is wrong.
    """
    refuse_sections(
        changes,
        list(CORE_SECTIONS),
        "belongs to the teacher's training and has no effect here; give it to `l2t train-teacher`",
    )
    recipe = recipe_values.load(name, changes)
    if wrong := compare_plan.problems(recipe):
        raise UserError(wrong[0])
    return recipe


def chosen_jobs(jobs: int | None, comparisons: Iterable[Comparison]) -> int:
    """Return how many students to train side by side: a core each, or one on a GPU.

    Raises:
        UserError: if ``jobs`` is given and not positive.
    """
    if jobs is None:
        if not all(comparison.field.one_a_core for comparison in comparisons):
            return 1
        return cores()
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1")
    return jobs


class Comparison:
    """One recipe's losses, tuned and measured."""

    def __init__(
        self,
        recipe: Recipe,
        teachers: Sequence[Path],
        folder: Path,
        copies: TeacherCopies | None = None,
    ) -> None:
        """Check all that can be checked before anything is trained.

        ``copies`` are of the teachers, in ``folder`` if None.

        Raises:
            UserError: if data, teachers, losses or the folder cannot be used.
        """
        recipe.field.require()
        self.recipe, self.folder = recipe, folder
        self.copies = copies or TeacherCopies(folder)
        self.arms = compare_plan.arms(recipe, teachers, self.copies)
        self.field: FieldTrials = recipe.field.load("trials")(recipe)
        self.field.check(
            [arm.teacher.readable() for arm in self.arms if arm.teacher],
            [arm.loss for arm in self.arms if not arm.teacher],
        )
        self.seeds = range(recipe.compare.seed, recipe.compare.seed + recipe.compare.seeds)
        self.tuning = compare_plan.Tuning(recipe, self.arms, self.field)
        self.store = TrialStore(folder, self.field.identity())
        self.total = self.tuning.total() + len(self.arms) * len(self.seeds)
        _refuse_foreign(folder, recipe)

    def show_plan(self) -> None:
        """Print the trials, by loss, and do nothing."""
        rows, done = [], self._tuned()
        for arm in self.arms:
            points = self.tuning.points(arm)
            by_own: dict[tuple[tuple[str, float], ...], list[float]] = {}
            for point in points:
                by_own.setdefault(point.settings, []).append(point.lr)
            if self.recipe.compare.search == "optuna":
                low, high = min(self.tuning.rates), max(self.tuning.rates)
                tries = self.tuning.count * len(self.tuning.seeds)
                rows.append((arm.name, "by optuna", f"{low:g} to {high:g}", str(tries)))
                by_own.clear()
            for own, rates in by_own.items():
                said = " ".join(f"{name}={value:g}" for name, value in own)
                tries = len(rates) * len(self.tuning.seeds)
                rows.append((arm.name, said, " ".join(f"{rate:g}" for rate in rates), str(tries)))
            rows.append((arm.name, "the best", "the best", f"{len(self.seeds)} final"))
        heads = ["loss", "own settings", "learning rates", "trials"]
        console.table(f"{self.recipe.name}: trials", heads, rows, text=3)
        console.line(
            f"plan: {self.total} trials ({self.tuning.total()} tuning, "
            f"{len(self.arms) * len(self.seeds)} final), into {console.shown(self.folder)}"
            + (f"; {done} of the tuning's are done" if done else "")
        )

    def _tuned(self) -> int:
        """Return how many tuning trials are done, those of a search by going through it again."""
        tuning, done = compare_plan.Tuning(self.recipe, self.arms, self.field), 0
        while asked := tuning.ask():
            for trial in asked:
                if (result := self.store.load(trial)) is not None:
                    tuning.tell(trial, result)
                    done += 1
        return done

    def run(self, jobs: int, log_format: LogFormat, *, report: bool) -> dict[str, Any]:
        """Run what is not done yet, write the results, and return their summary.

        Raises:
            UserError: if a student cannot be trained, the folder not be written, or another command
                is at work in it.
            Interrupted: after Ctrl-C.
        """
        before = FreshFolder.before(self.folder)
        with claimed(self.folder):
            # Once more: another comparison may have been here since this one was put together.
            _refuse_foreign(self.folder, self.recipe)
            return self._run(before, jobs, log_format, report=report)

    def _run(
        self, before: FreshFolder, jobs: int, log_format: LogFormat, *, report: bool
    ) -> dict[str, Any]:
        from l2t_cli.comparing import report as compare_report

        results: dict[Trial, Result] = {}
        view = _View(self.total, jobs, self.field.dev_measure, log_format)
        with (
            _kept(before, self.folder),
            view.running(f"comparing on {self.recipe.name}") as show,
            workers(self.recipe, self.field, jobs) as pool,
        ):

            def receive(trial: Trial, result: Result, fresh: bool) -> None:
                results[trial] = result
                show(trial, result, fresh)

            _mark(self.folder, self.recipe, self.arms)
            self.copies.write()
            run_trials(self.tuning, self.store, pool, jobs, receive)
            chosen = self.tuning.chosen()
            if chosen[self.arms[0].name] is None:
                raise UserError(
                    f"cross-entropy, which the others are measured against, diverged at every rate "
                    f"({', '.join(f'{rate:g}' for rate in sorted(self.tuning.rates))}); give "
                    "compare.lr lower ones"
                )
            finals = compare_plan.Finals(self.arms, chosen, self.seeds)
            run_trials(finals, self.store, pool, jobs, receive)
        summary = compare_report.summarise(
            self.recipe.name, self.arms, self.tuning, finals, results, self.field,
            self.store.finished({arm.origin for arm in self.arms}),
        )
        summary["warnings"] += self.field.notes()
        if len(self.seeds) < 5:
            summary["warnings"].append(f"{len(self.seeds)} seeds say little; give compare.seeds=5")
        ordered = dict(sorted(results.items(), key=lambda item: _order(self.arms, item[0])))
        files = compare_report.write(summary, ordered, self.field.curve, self.folder)
        if report and log_format is LogFormat.json:
            print(json.dumps({"event": "result", **summary}), flush=True)
        elif report and log_format is not LogFormat.none:
            compare_report.show(summary, files)
        return summary


def _order(arms: Sequence[compare_plan.Arm], trial: Trial) -> tuple[Any, ...]:
    names = [arm.name for arm in arms]
    return trial.final, names.index(trial.arm), trial.settings, trial.lr, trial.seed


def _refuse_foreign(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder of something else, or of a comparison of other students."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    config = folder / "config.json"
    if not folder.is_dir() or all(is_unfinished(path, config) for path in folder.iterdir()):
        return
    try:
        stored = json.loads(config.read_text("utf-8"))
        ours = set(stored) >= {"recipe", "compare", "teachers"}
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{folder} is not empty and holds no comparison of ours; choose another --out"
        )
    if changed := _changed(stored, _content(recipe, ()), recipe):
        raise UserError(f"{folder} holds another comparison ({changed}); choose another --out")


def _changed(stored: dict[str, Any], now: dict[str, Any], recipe: Recipe) -> str:
    """Say in what the students of a comparison differ from those asked for now, if they do.

    Its losses, grids, seeds and teachers may be others: their trials are added.
    """
    from l2t_core.runs.folder import flattened

    field = recipe.field.name
    if field not in stored:
        return f"of {stored['recipe']}"
    # A setting that is younger than the comparison had its default there.
    before = flattened(recipe.defaults()[field], field) | flattened(stored[field], field)
    after = flattened(now[field], field)
    # A rate is what is tuned; where data lie, or a student runs, is not what they are.
    free = {f"{field}.{key}" for key in ("optimiser.lr", "device", *recipe.field.places)}
    for key in sorted((before.keys() & after.keys()) - free):
        if before[key] != after[key]:
            return f"{key} is {before[key]!r} there, {after[key]!r} here"
    return ""


def _mark(folder: Path, recipe: Recipe, arms: Sequence[compare_plan.Arm]) -> None:
    """Write down what is compared, the last time that it was asked for."""
    atomic_write(folder / "config.json", json.dumps(_content(recipe, arms), indent=2) + "\n")


def _content(recipe: Recipe, arms: Sequence[compare_plan.Arm]) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        recipe.field.name: recipe.config()[recipe.field.name],
        "compare": asdict(recipe.compare),
        "teachers": {arm.name: str(arm.teacher.given) for arm in arms if arm.teacher},
    }


@contextmanager
def _kept(before: FreshFolder, folder: Path) -> Iterator[None]:
    """Turn Ctrl-C into advice; after a failure with nothing finished take the folder back."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("finished trials are kept; the same command continues") from None
    except Exception:
        logs = folder.glob("work/*/*.log")
        if not any(folder.glob("trials/*.json")) and next(logs, None) is None:
            before.take_back()
        raise


class _View:
    """Shows the trials as they finish: a bar with an estimate, lines, or JSON lines."""

    def __init__(self, total: int, jobs: int, measure: str, log_format: LogFormat) -> None:
        self.total, self.jobs, self.measure, self.format = total, jobs, measure, log_format
        self.done = self.fresh = 0
        self.began = time.monotonic()

    @contextmanager
    def running(self, title: str) -> Iterator[Callable[[Trial, Result, bool], None]]:
        """Yield the receiver of results."""
        if self.format is LogFormat.simple:
            console.line(f"{title}: {self.total} trials, {self.jobs} at a time")
        with bar(title, self.format, quiet=True) as update:
            update(0, self.total)

            def receive(trial: Trial, result: Result, fresh: bool) -> None:
                self.done += 1
                self.fresh += fresh
                if fresh:
                    self._tell(trial, result)
                update(self.done, self.total, self._left())

            yield receive
        if self.format is LogFormat.simple and self.done > self.fresh:
            console.line(f"{self.done - self.fresh} of {self.done} trials were finished before")

    def _left(self) -> str:
        if not self.fresh or self.done == self.total:
            return ""
        each = (time.monotonic() - self.began) / self.fresh
        return f"about {console.duration(each * (self.total - self.done))} left"

    def _tell(self, trial: Trial, result: Result) -> None:
        if self.format is LogFormat.json:
            event = {
                "event": "trial", "loss": trial.arm, "lr": trial.lr,
                "settings": dict(trial.settings), "seed": trial.seed, "final": trial.final,
                **{k: v for k, v in asdict(result).items() if k != "curve"},
                "done": self.done, "of": self.total,
            }
            print(json.dumps(event), flush=True)
        elif self.format is LogFormat.simple:
            said = "diverged" if result.diverged else f"dev {self.measure} {result.dev:.4f}"
            console.line(f"{self.done:>4}/{self.total}  {trial.title()}: {said}  {self._left()}")
