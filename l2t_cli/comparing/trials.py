"""The trials of a comparison: what determines one, its file, and running many side by side."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from l2t_cli.recipe_reading.loading import Recipe
from l2t_core.errors import UserError
from l2t_core.losses.baselines import LOSSES_KEY
from l2t_core.runs.files import SNAPSHOT, atomic_write
from l2t_core.user_code import is_import_path, source_of


@dataclass(frozen=True)
class Trial:
    """One student to be trained. ``arm`` is the loss's name in the tables.

    ``loss`` names a fixed loss and is ``taught`` for a teacher. Only a ``final`` student's test
    score is read.
    """

    arm: str
    loss: str
    settings: tuple[tuple[str, float], ...]
    teacher: Path | None
    teacher_sha256: str
    lr: float
    seed: int
    final: bool

    @property
    def origin(self) -> tuple[str, str]:
        """What tells the loss from every other; ``arm`` may change with what is beside it."""
        return self.loss, self.teacher_sha256

    def title(self) -> str:
        """Return the trial in words."""
        own = "".join(f" {name}={value:g}" for name, value in self.settings)
        kind = "final" if self.final else "tuning"
        return f"{kind} {self.arm}{own} lr={self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What a trial gave. ``dev`` is the measure on dev, higher is better, ``nll`` is in nats.

    ``steps`` are the student's own, ``steps_before`` those of one that had to be trained before it.
    ``diverged`` says how a student ended that did; it has no scores then. ``curve`` holds
    ``[steps, value]`` pairs of what the field shows on dev.
    """

    seconds: float
    steps: int
    dev: float | None = None
    nll: float | None = None
    test: float | None = None
    steps_before: int = 0
    diverged: str = ""
    signature: str = ""
    curve: list[list[float]] = field(default_factory=list)


class FieldTrials(Protocol):
    """What a field does for a comparison; built from a recipe in every process that trains.

    ``measure`` names the test score and ``worst`` is its worst value, ``dev_measure`` names the
    one on dev, ``curve`` what learning curves show. ``rate`` is the recipe's own learning rate,
    ``steps`` how many a student makes that nothing ends before.
    ``one_a_core`` tells whether as many students as there are cores can train side by side.
    """

    measure: str
    lower_is_better: bool
    worst: float
    dev_measure: str
    curve: str
    rate: float
    steps: int
    one_a_core: bool

    def __init__(self, recipe: Recipe) -> None: ...

    def check(self, teachers: Sequence[Path], losses: Sequence[str]) -> None:
        """Raise UserError if the data, a teacher or a loss cannot be used."""

    def notes(self) -> list[str]:
        """Return lines about what is odd in the data."""

    def identity(self) -> dict[str, Any]:
        """Return all that determines a student but learning rate, loss and seed."""

    def run(self, trial: Trial, folder: Path) -> Result:
        """Train the student of ``trial``, or go on in ``folder``, and measure it."""


class TrialStore:
    """The finished trials of a comparison, a JSON file each, by what determines them."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = identity

    def key(self, trial: Trial) -> str:
        """Return the hash of everything that determines ``trial``."""
        content = {
            "student": self.identity,
            "loss": trial.loss,
            "settings": dict(trial.settings),
            "teacher": trial.teacher_sha256,
            "lr": trial.lr,
            "seed": trial.seed,
            "final": trial.final,
        }
        if is_import_path(trial.loss):
            code = source_of(trial.loss, LOSSES_KEY)
            content["code_sha256"] = hashlib.sha256(code).hexdigest()
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def path(self, trial: Trial) -> Path:
        """Return the file of a finished trial."""
        return self.folder / "trials" / f"{self.key(trial)}.json"

    def work(self, trial: Trial) -> Path:
        """Return the folder of a trial in progress."""
        return self.folder / "work" / self.key(trial)

    def load(self, trial: Trial) -> Result | None:
        """Return the result of a finished trial, None if it is not finished.

        Raises:
            UserError: if its file is damaged.
        """
        path = self.path(trial)
        try:
            return Result(**json.loads(path.read_text(encoding="utf-8"))["result"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged; delete it to run that trial again") from error

    def finished(self, losses: Collection[tuple[str, str]]) -> dict[Trial, Result]:
        """Return these students' finished trials of ``losses`` (origins), of whatever grid."""
        found = {}
        for path in sorted(self.folder.glob("trials/*.json")):
            # What is damaged and still needed has been told by ``load``.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                content = json.loads(path.read_text(encoding="utf-8"))
                said = content["trial"]
                settings = tuple(said["settings"].items())
                trial = Trial(**{**said, "settings": settings, "teacher": None})
                if trial.origin in losses and self.key(trial) == path.stem:
                    found[trial] = Result(**content["result"])
        return found

    def save(self, trial: Trial, result: Result) -> None:
        """Write the trial's file; take its working folder away where nothing in it is of use."""
        said = {**asdict(trial), "settings": dict(trial.settings)}
        said["teacher"] = str(trial.teacher) if trial.teacher else None
        content = {"trial": said, "result": asdict(result)}
        atomic_write(self.path(trial), json.dumps(content, indent=1, allow_nan=False) + "\n")
        if not trial.final or result.diverged:
            shutil.rmtree(self.work(trial), ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.work(trial) / SNAPSHOT).unlink(missing_ok=True)
            self.work(trial).rmdir()  # where nothing else was in it


class Source(Protocol):
    """Where trials come from; what was told may decide what is asked next."""

    def ask(self) -> list[Trial]: ...

    def tell(self, trial: Trial, result: Result) -> None: ...


def run_trials(
    source: Source,
    store: TrialStore,
    pool: Executor,
    jobs: int,
    on_result: Callable[[Trial, Result, bool], None],
) -> None:
    """Run what ``source`` asks for, ``jobs`` at a time; finished trials are read, not repeated.

    ``pool`` is that of :func:`workers`. ``on_result`` receives each trial, its result, and whether
    it was run now.

    Raises:
        UserError: if a student cannot be trained for another reason than divergence.
    """
    queue: deque[Trial] = deque()
    flight: dict[Future[Result], Trial] = {}

    def finish(trial: Trial, result: Result, fresh: bool) -> None:
        source.tell(trial, result)
        on_result(trial, result, fresh)
        queue.extend(source.ask())

    queue.extend(source.ask())
    while queue or flight:
        while queue and len(flight) < jobs:
            trial = queue.popleft()
            stored = store.load(trial)
            if stored is not None:
                finish(trial, stored, False)
                continue
            flight[pool.submit(_run_trial, trial, store.work(trial))] = trial
        for future in wait(flight, return_when=FIRST_COMPLETED).done if flight else ():
            trial = flight.pop(future)
            result = future.result()
            store.save(trial, result)
            finish(trial, result, True)


class _Here(Executor):
    """Runs each task at once in this process, on one thread, as a worker would."""

    def submit(self, task: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        import torch

        future: Future[Any] = Future()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            future.set_result(task(*arguments, **named))
        finally:
            torch.set_num_threads(before)
        return future


class _Processes(ProcessPoolExecutor):
    """Starts a process with Ctrl-C and SIGTERM held back until it knows what to do then.

    Before, Python would show in which import it was.
    """

    def submit(self, task: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # a new process inherits it
        try:
            return super().submit(task, *arguments, **named)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def workers(recipe: Recipe, here: FieldTrials, jobs: int) -> Iterator[Executor]:
    """Yield what runs the trials; however it ends, no process of ours is left.

    One job runs in this process, with ``here``; more run in processes that start as needed.

    Raises:
        UserError: if one of the processes dies.
    """
    _TRAINER["it"] = here
    with _one_thread():
        if jobs == 1:
            yield _Here()
            return
        # Fresh processes: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        pool = _Processes(
            jobs, context, initializer=_begin_worker, initargs=(recipe, here.identity())
        )
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(
                "a process that trained a student died, perhaps out of memory; give fewer --jobs: "
                "the finished trials are kept"
            ) from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have programs started meanwhile compute on one thread: results may depend on the number."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


_ENDING = (signal.SIGINT, signal.SIGTERM)
# What a process trains with, and whether it is at it.
_TRAINER: dict[str, FieldTrials] = {}
_BUSY = threading.Event()


def _begin_worker(recipe: Recipe, identity: dict[str, Any]) -> None:
    def end(number: int, frame: object) -> None:
        if not _BUSY.is_set():
            os._exit(1)
        # Not SIG_IGN: of one that has come already Python would complain, in a stack trace.
        for other in _ENDING:
            signal.signal(other, lambda number, frame: None)
        raise KeyboardInterrupt  # so that a program started by the trial is ended, too

    for number in _ENDING:
        signal.signal(number, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # held since the process was started
    import torch

    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()  # a parent that was killed cannot end us
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    trainer: FieldTrials = recipe.field.load("trials")(recipe)
    if trainer.identity() == identity:  # its trials are stored under that name
        _TRAINER["it"] = trainer


def _run_trial(trial: Trial, folder: Path) -> Result:
    if "it" not in _TRAINER:
        raise UserError(
            "the students' data or code is not the same in each process: a function of your own "
            "draws them anew, or they have changed since this command began; keep them as they are"
        )
    try:
        _BUSY.set()
        result = _TRAINER["it"].run(trial, folder)
    except KeyboardInterrupt:
        if multiprocessing.parent_process() is not None:
            # Not back to the pool's queue: one that has ended may hold its lock for good.
            os._exit(1)
        raise
    finally:
        _BUSY.clear()
    numbers = (result.dev, result.nll, result.test)
    if not result.diverged and any(n is not None and math.isnan(n) for n in numbers):
        return Result(
            result.seconds, result.steps, steps_before=result.steps_before,
            diverged="its scores are not numbers",
        )
    return result
