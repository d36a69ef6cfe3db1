"""What a comparison trains: its losses, the points of each, and the search over them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from l2t_cli.applying.result import CROSS_ENTROPY, TAUGHT
from l2t_cli.applying.teacher_copies import TeacherCopies, TeacherCopy
from l2t_cli.comparing.trials import FieldTrials, Result, Trial
from l2t_cli.recipe_reading.loading import Recipe
from l2t_cli.recipe_reading.values import located
from l2t_core.comparing.specs import CompareSpec
from l2t_core.comparing.statistics import Point, best, grid_points, mean
from l2t_core.errors import UserError, out_of_range, suggestion, unknown_choice
from l2t_core.losses.baselines import BASELINES, LOSSES_KEY, complete_settings
from l2t_core.runs.files import from_home
from l2t_core.teachers.ready import find_teacher
from l2t_core.user_code import import_problems, is_import_path

# Far from the seeds of final students and of a teacher's own (seed * 1,000,003 + episode).
FIRST_TUNING_SEED = 900_001
RATE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
SEARCHES = ("grid", "optuna")
TUNED_ON = ("measure", "nll")


@dataclass(frozen=True)
class Arm:
    """One loss of the comparison and the grid of its own settings."""

    name: str
    loss: str
    own: dict[str, list[float]]
    teacher: TeacherCopy | None = None

    @property
    def teacher_sha256(self) -> str:
        """The hash of the teacher, nothing for a fixed loss."""
        return self.teacher.sha256 if self.teacher else ""

    @property
    def origin(self) -> tuple[str, str]:
        """What tells the loss from every other: that of its trials."""
        return self.loss, self.teacher_sha256

    def trial(self, point: Point, seed: int, final: bool) -> Trial:
        """Return the trial of ``point`` with ``seed``."""
        return Trial(
            arm=self.name,
            loss=self.loss,
            settings=point.settings,
            teacher=self.teacher.path if self.teacher else None,
            teacher_sha256=self.teacher_sha256,
            lr=point.lr,
            seed=seed,
            final=final,
        )


def problems(recipe: Recipe) -> list[str]:
    """Return a line for everything that is wrong with the recipe's ``compare`` section."""
    found = [*_wrong_losses(recipe), *_wrong_grids(recipe), *_wrong_numbers(recipe.compare)]
    return [located(recipe, text) for text in found]


def wrong_teachers(recipe: Recipe) -> list[str]:
    """Return a line for each of the ``compare`` section's teacher files that is none."""
    from l2t_core.teachers.file import load_teacher

    found = []
    for given in recipe.compare.teachers:
        try:
            load_teacher(find_teacher(from_home(given)))
        except UserError as error:
            found.append(f"{recipe.source}: compare.teachers: {error}")
    return found


def _wrong_losses(recipe: Recipe) -> Iterator[str]:
    names = recipe.compare.losses
    own = [name for name in names if is_import_path(name)]
    if own and not recipe.field.own_losses:
        yield (
            f"compare.losses: {own[0]}: losses of your own are for image recipes; to fairseq they "
            "come as criterions"
        )
    yield from import_problems((LOSSES_KEY, name) for name in own)
    for name in names:
        if name in own:
            continue
        if name not in BASELINES.names():
            hint = suggestion(name, recipe.field.losses)
            yield f"compare.losses: unknown loss {name!r}{hint}{_known(recipe)}"
        elif name not in recipe.field.losses:
            yield (
                f"compare.losses: {name} does not exist for {recipe.field.name} recipes; remove it"
                f"{_known(recipe)}"
            )
    if len(set(names)) < len(names):
        yield "compare.losses names a loss twice; remove one"


def _wrong_grids(recipe: Recipe) -> Iterator[str]:
    for name in BASELINES.names():
        for key, values in _grid(recipe, name).items():
            if not values:
                yield f"compare.{name}.{key} is empty; give it at least one value"
            if len(set(values)) < len(values):
                yield f"compare.{name}.{key} names a value twice; remove one"
            for value in values:
                try:
                    complete_settings(name, {key: value})
                except UserError as error:
                    yield f"compare.{error}"


def _wrong_numbers(spec: CompareSpec) -> Iterator[str]:
    if any(not 0.0 < rate < math.inf for rate in spec.lr):
        yield f"compare.lr is {spec.lr}; rates must be above 0, but finite"
    rates = len(set(spec.lr)) or len(RATE_FACTORS)
    if 2 <= spec.trials < rates:
        yield f"compare.trials is {spec.trials}, fewer than the {rates} rates; give more"
    if len(set(spec.lr)) == 1:
        yield "compare.lr has one rate; give at least two, better four or more"
    ranges = [
        ("trials", spec.trials, 2, 10_000),
        ("tuning_seeds", spec.tuning_seeds, 1, 10_000),
        ("seeds", spec.seeds, 2, 10_000),
        ("seed", spec.seed, 1, 2**31 - 20_000),
    ]
    yield from out_of_range(
        "compare",
        ((name, value, low <= value <= high, f"in [{low}, {high}]")
         for name, value, low, high in ranges),
    )
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + max(1, spec.tuning_seeds))
    if spec.seed < tuning.stop and tuning.start < spec.seed + spec.seeds:
        yield (
            f"compare.seed is {spec.seed}: the final students would share seeds with the tuning's "
            f"({tuning.start} to {tuning.stop - 1}); take a smaller one"
        )
    yield from unknown_choice("compare.search", spec.search, SEARCHES)
    yield from unknown_choice("compare.tune_on", spec.tune_on, TUNED_ON)


def _known(recipe: Recipe) -> str:
    return f" (known here: {', '.join(recipe.field.losses)}; teachers go under compare.teachers)"


def _grid(recipe: Recipe, loss: str) -> dict[str, list[float]]:
    section = getattr(recipe.compare, loss, None)
    return {name: list(values) for name, values in vars(section).items()} if section else {}


def arms(recipe: Recipe, teachers: Sequence[Path], copies: TeacherCopies) -> list[Arm]:
    """Return the losses to compare, cross-entropy first: the others are measured against it.

    The teachers are taken into ``copies``.

    Raises:
        UserError: if a teacher file is missing or given twice.
    """
    names = [CROSS_ENTROPY, *(name for name in recipe.compare.losses if name != CROSS_ENTROPY)]
    found = [Arm(name, name, _grid(recipe, name)) for name in names]
    files = [*(find_teacher(from_home(f)) for f in recipe.compare.teachers), *teachers]
    seen: dict[str, Path] = {}
    for path in files:
        copy = copies.take(path)
        if copy.sha256 in seen:
            raise UserError(f"{path} and {seen[copy.sha256]} are the same teacher; give it once")
        seen[copy.sha256] = path
        found.append(Arm(_teacher_name(path, files), TAUGHT, {}, copy))
    return found


def _teacher_name(path: Path, files: Sequence[Path]) -> str:
    """Return the shortest of ``taught``, ``taught FOLDER``, ``taught PATH`` that is its own."""
    if len(files) == 1:
        return TAUGHT
    short = path.resolve().parent.name
    alone = [f.resolve().parent.name for f in files].count(short) == 1
    return f"{TAUGHT} {short}" if alone else f"{TAUGHT} {path}"


class Search(Protocol):
    """Which points of a loss to try."""

    def ask(self) -> list[Point]:
        """Return the points to try next; an empty list while answers are missing, or at the end."""

    def tell(self, point: Point, score: tuple[float, float] | None) -> None:
        """Take a point's score, None for one that diverged."""


class GridSearch:
    """All points at once."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._left = list(points)

    def ask(self) -> list[Point]:
        """Return all points, the first time."""
        asked, self._left = self._left, []
        return asked

    def tell(self, point: Point, score: tuple[float, float] | None) -> None:
        """Do nothing: a grid is fixed."""


class OptunaSearch:
    """Optuna's TPE sampler, one point after the other, so that a resumed search is the same."""

    def __init__(
        self, rates: Sequence[float], own: Mapping[str, Sequence[float]], count: int, seed: int
    ) -> None:
        try:
            import optuna
        except ModuleNotFoundError:
            raise UserError(
                'compare.search=optuna needs optuna, which is not installed; pip install "l2t[tune]'
                '", or use compare.search=grid'
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._rates, self._own, self._left = (min(rates), max(rates)), own, count
        self._open: Any = None

    def ask(self) -> list[Point]:
        """Return one point if the last one's score is known."""
        if self._open is not None or self._left == 0:
            return []
        self._left -= 1
        self._open = trial = self._study.ask()
        rate = trial.suggest_float("lr", *self._rates, log=True)
        own = tuple(
            (name, float(trial.suggest_categorical(name, list(values))))
            for name, values in self._own.items()
        )
        return [Point(float(f"{rate:.6g}"), own)]

    def tell(self, point: Point, score: tuple[float, float] | None) -> None:
        """Tell the study; a student that diverged is worse than any other."""
        self._study.tell(self._open, -1e9 if score is None else max(score[0], -1e9))
        self._open = None


class Tuning:
    """The tuning of all losses: a source of trials, and the choice at the end."""

    def __init__(self, recipe: Recipe, found: Sequence[Arm], field_trials: FieldTrials) -> None:
        spec = recipe.compare
        self.arms = {arm.name: arm for arm in found}
        self.on_nll = spec.tune_on == "nll"
        self.seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + spec.tuning_seeds)
        self.rates = list(spec.lr) or [
            float(f"{factor * field_trials.rate:.6g}") for factor in RATE_FACTORS
        ]
        self.count = spec.trials
        self.searches: dict[str, Search] = {}
        for arm in found:
            if spec.search == "optuna":
                # By the loss, not its place: beside one more loss the others' trials are the same.
                seed = zlib.crc32(f"{arm.loss} {arm.teacher_sha256}".encode())
                search: Search = OptunaSearch(self.rates, arm.own, spec.trials, seed)
            else:
                search = GridSearch(self.points(arm))
            self.searches[arm.name] = search
        self.scores: dict[str, dict[Point, tuple[float, float] | None]] = {n: {} for n in self.arms}
        self._results: dict[tuple[str, Point], list[Result]] = {}

    def points(self, arm: Arm) -> list[Point]:
        """Return the grid's points of a loss."""
        return grid_points(self.rates, arm.own, self.count)

    def grid(self, arm: Arm) -> list[Point]:
        """Return the points of a loss where they were drawn from a grid, none of a search."""
        return self.points(arm) if isinstance(self.searches[arm.name], GridSearch) else []

    def total(self) -> int:
        """Return how many students are tuned in all."""
        return self.count * len(self.arms) * len(self.seeds)

    def ask(self) -> list[Trial]:
        """Return the trials that can be run now."""
        asked = [
            (name, point) for name, search in self.searches.items() for point in search.ask()
        ]
        for name, point in asked:
            # In this order whichever is finished first: of equal points the first one is chosen.
            self.scores[name].setdefault(point, None)
        return [
            self.arms[name].trial(point, seed, final=False)
            for name, point in asked
            for seed in self.seeds
        ]

    def tell(self, trial: Trial, result: Result) -> None:
        """Take a trial's result; a point is scored once all its seeds are in."""
        point = Point(trial.lr, trial.settings)
        results = self._results.setdefault((trial.arm, point), [])
        results.append(result)
        if len(results) == len(self.seeds):
            score = self._score(results)
            self.scores[trial.arm][point] = score
            self.searches[trial.arm].tell(point, score)
            del self._results[trial.arm, point]

    def _score(self, results: Sequence[Result]) -> tuple[float, float] | None:
        if any(result.diverged for result in results):
            return None
        dev = mean([-math.inf if r.dev is None else r.dev for r in results])
        likelihood = mean([-math.inf if r.nll is None else -r.nll for r in results])
        return (likelihood, dev) if self.on_nll else (dev, likelihood)

    def chosen(self) -> dict[str, Point | None]:
        """Return the best point of each loss, None for one that diverged at every point."""
        return {name: best(scores) for name, scores in self.scores.items()}


class Finals:
    """The final students: the chosen points with fresh seeds, the same for every loss."""

    def __init__(
        self, found: Sequence[Arm], chosen: Mapping[str, Point | None], seeds: Sequence[int]
    ) -> None:
        self._left = [
            arm.trial(point, seed, final=True)
            for seed in seeds
            for arm in found
            if (point := chosen[arm.name]) is not None
        ]
        self.results: dict[str, dict[int, Result]] = {arm.name: {} for arm in found}

    def ask(self) -> list[Trial]:
        """Return all trials, the first time."""
        asked, self._left = self._left, []
        return asked

    def tell(self, trial: Trial, result: Result) -> None:
        """Keep a trial's result."""
        self.results[trial.arm][trial.seed] = result
