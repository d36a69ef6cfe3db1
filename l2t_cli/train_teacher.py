"""``l2t train-teacher``: Algorithm 1 for a recipe, shown, resumable, with a table at the end."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from l2t_cli.errors import PEER_LOST, Interrupted, Terminated, say, tell_before_sigterm
from l2t_cli.options import ChosenFormat, DryRun, RecipeName, changes, output_folder
from l2t_cli.recipe_reading.loading import COMPARE, CORE_SECTIONS, Recipe, refuse_sections
from l2t_cli.recipe_reading.values import load, refuse_impossible
from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat
from l2t_cli.screen.progress import ScalarLog, TeacherView
from l2t_cli.tidying import FreshFolder
from l2t_core.errors import PeerLost, UserError

# How a run is made, what it is called or compared with: the same teacher comes out, to the bit.
_MAY_CHANGE = ("training.memory", "training.spill", "description", COMPARE)

PICTURE = "dev_measure.png"


def command(
    recipe: RecipeName,
    overrides: Annotated[list[str] | None, changes("training.episodes=5")] = None,
    out: Annotated[Path | None, output_folder("runs/RECIPE")] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue the run that the folder holds, or refuse to.")
    ] = True,
    seed: Annotated[
        int | None, typer.Option(help="Seed of teacher and students (training.seed).")
    ] = None,
    dry_run: DryRun = False,
    log_format: ChosenFormat = None,
    tensorboard_logdir: Annotated[
        Path | None, typer.Option(help="Write TensorBoard scalars here.")
    ] = None,
) -> None:
    """Train a teacher that writes the loss of a recipe's student."""
    wanted = list(overrides or [])
    if seed is not None:
        wanted.append(f"training.seed={seed}")
    refuse_sections(wanted, [COMPARE], "has no effect here; give it to `l2t compare`")
    loaded = load(recipe, wanted)
    folder = out or default_folder(loaded)
    chosen = console.default_format(log_format)
    if dry_run:
        show_plan(loaded, folder)
        return
    run(
        loaded, folder, resume=resume, log_format=chosen, tensorboard_logdir=tensorboard_logdir,
        asked=[recipe, *wanted],
    )


def default_folder(recipe: Recipe) -> Path:
    """Return where a run goes unless ``--out`` says otherwise."""
    return Path("runs") / recipe.short_name


def show_plan(recipe: Recipe, folder: Path) -> None:
    """Print the configuration as resolved and what would be done.

    Raises:
        UserError: if the run itself would be refused.
    """
    import yaml

    from l2t_core.hypergradients.engine import Engine, describe_plan
    from l2t_core.hypergradients.ways import spans
    from l2t_core.students.life import Life

    student = _student(recipe)
    life, place = Life(student, recipe.training.precision), folder.absolute()
    while not place.is_dir():  # the disk that the folder will be on
        place = place.parent
    engine = Engine(life, recipe.loss, recipe.training, place)
    console.line(yaml.safe_dump(recipe.config(), sort_keys=False, width=96).rstrip())
    spec = recipe.training
    finals = spec.finalists * spec.final_students if spec.finalists > 1 else 0
    # As many in each life as it has windows.
    each = len(spans(engine.first, student.total_steps, spec.window)) if spec.window else 1
    updates = spec.episodes * each
    console.line()
    console.line(
        f"plan: {updates:,} update{'s' if updates > 1 else ''} of the teacher, "
        f"{(spec.episodes + 1) * spec.students} students of {student.total_steps} steps each, "
        + (f"{finals} final ones, " if finals else "")
        + f"into {console.shown(folder)}"
    )
    console.line(f"trajectory: {describe_plan(engine)}")


def _student(recipe: Recipe) -> Any:
    """Return the student that a teacher is to be trained on, if anything can be learned from it."""
    refuse_impossible(recipe)  # before data and model are loaded
    student = recipe.field.build_student(recipe.student)
    refuse_impossible(recipe, student.num_classes)
    return student


def run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = True,
    log_format: LogFormat = LogFormat.simple,
    tensorboard_logdir: Path | None = None,
    asked: Sequence[str] = (),
) -> Path:
    """Train or go on training the teacher of ``recipe``; return the best teacher's file.

    ``asked``, recipe and changes as the user wrote them, makes the report end with what is next.

    Raises:
        UserError: if the recipe, its data or the folder cannot be used.
        Interrupted: after Ctrl-C; what was finished is kept.
    """
    from l2t_core.runs.processes import join_processes
    from l2t_core.training.episodes import train_teacher
    from l2t_core.training.update import nothing_usable

    processes = join_processes(_end)
    # The first process alone reports; a mistake that all make is told once.
    if processes.rank:
        log_format, tensorboard_logdir = LogFormat.none, None
    # The student first: a missing data set should not leave an empty run folder behind.
    student = processes.agree(lambda: _student(recipe))
    before = FreshFolder.before(folder)
    opened = _open(recipe, student.content(), folder, resume, processes)
    # Without its state a run begins anew, whatever its log says.
    done = finished_episodes(opened.metrics) if opened.state.exists() else []
    view = TeacherView(recipe.training.episodes + 1, student.measure_name, log_format)
    if log_format.wordy:
        _say_where_it_stands(student, opened, len(done))
    with (
        _tidy(opened, before, processes),
        closing(_scalars(tensorboard_logdir)) as scalars,
        view.running(done) as show,
    ):

        def receive(event: dict[str, Any]) -> None:
            if event["event"] == "plan" and not processes.rank:  # the state is read, and goes on
                (folder / PICTURE).unlink(missing_ok=True)  # the sign of a run that is over
            show(event)
            scalars.receive(event)

        result = train_teacher(
            student,
            recipe.loss,
            recipe.teacher,
            recipe.training,
            opened,
            record={"recipe": recipe.name, "field": recipe.field.name, "version": _version()},
            on_event=receive,
            processes=processes,
        )
    if all(row["skipped"] for row in result.history):
        # The teachers written are the first one, which has learnt nothing.
        useless = nothing_usable("none of the episodes", result.history[-1])
        raise processes.told_once(useless)
    processes.close()
    if not processes.rank:
        _finish(result, student.measure_name, recipe, folder, log_format)
        teachers = [path for path in (result.best_path, result.lived_path) if path]
        _say_next(asked, teachers, folder == default_folder(recipe), log_format)
    return result.best_path


def _end(message: str) -> None:
    """End the process at once, as the main thread cannot: it waits for a process that is gone.

    All files are written beside and put in place when whole, so that nothing is half-written.
    """
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a progress display hides the cursor
        sys.stdout.flush()
    say(f"l2t: error: {message}")
    os._exit(PEER_LOST)


def _open(
    recipe: Recipe, content: dict[str, str], folder: Path, resume: bool, processes: Any
) -> Any:
    """Return the run's folder; the first process opens it for all."""
    from l2t_core.runs.folder import RunFolder, open_run

    config = {
        "recipe": recipe.name, **recipe.config(), COMPARE: asdict(recipe.compare),
        "content": content,
    }
    places = tuple(f"{recipe.field.name}.{key}" for key in recipe.field.places)
    return processes.agree(
        lambda: RunFolder(folder) if processes.rank
        else open_run(
            folder, config, resume=resume, may_grow="training.episodes",
            may_change=(*_MAY_CHANGE, *places), defaults=recipe.defaults(),
        )
    )


@contextmanager
def _tidy(opened: Any, before: FreshFolder, processes: Any) -> Iterator[None]:
    """Say how to go on where another process or a signal ends this one.

    Where nothing is finished the first process, which alone writes, takes the folder back: another
    one, a little ahead, would take what the first is about to finish.
    """
    try:
        yield
    except BaseException as error:
        if processes.world > 1 and isinstance(error, (PeerLost, Terminated)):
            tell_before_sigterm()
        kept = opened.state.exists()
        if not kept and not processes.rank:
            before.take_back()
        how = (
            "the finished episodes are kept; the same command continues" if kept
            else "no episode was finished; the same command begins anew"
        )
        if isinstance(error, Terminated) and processes.world > 1:
            # torchrun ends the others so when one process has died.
            raise PeerLost(
                f"ended from outside, most likely because another of the {processes.world} "
                f"processes was lost; see that one's message; {how}"
            ) from None
        if isinstance(error, PeerLost):
            raise PeerLost(f"{error}; {how}") from error
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(how) from None
        raise


def _say_where_it_stands(student: Any, opened: Any, done: int) -> None:
    for text in getattr(student, "notes", list)():
        console.line(f"note: {text}")
    # The teachers are written after each episode, the picture once the last one is over.
    if done and not opened.grown and (opened.path / PICTURE).exists():
        console.line(f"{console.shown(opened.path)} is finished already, after {done} episodes")
    elif done:
        console.line(f"continuing {console.shown(opened.path)} after {done} episodes")


def _scalars(folder: Path | None) -> ScalarLog:
    try:
        return ScalarLog(folder)
    except OSError as error:
        raise UserError(
            f"cannot write to --tensorboard-logdir {folder}: {error.strerror}"
        ) from None


def _finish(result: Any, measure: str, recipe: Recipe, folder: Path, log_format: LogFormat) -> None:
    """Write the plot and say what came out."""
    from l2t_cli.screen.plots import plot_dev_measure

    picture = folder / PICTURE
    plot_dev_measure(result.history, result.best_episode, measure, recipe.name, picture)
    if log_format is LogFormat.json:
        summary = {
            "event": "result",
            "teacher": str(result.best_path),
            "lived": str(result.lived_path) if result.lived_path else None,
            "plot": str(picture),
            "best_dev_measure": result.best_measure,
            "best_episode": result.best_episode,
        }
        print(json.dumps(summary), flush=True)
    elif log_format is not LogFormat.none:
        _report(result, measure, recipe, folder, picture)


def finished_episodes(metrics: Path) -> list[dict[str, Any]]:
    """Return the episodes that a run's log holds so far."""
    return [row for row in run_log(metrics) if row["event"] == "episode"]


def run_log(metrics: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log: its episodes, then its final students by teacher."""
    if not metrics.exists():
        return []
    rows = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short; the state knows, and writes the log anew
        if isinstance(row, dict) and row.get("event") in ("episode", "final"):
            rows.append(row)
    return rows


def _report(result: Any, measure: str, recipe: Recipe, folder: Path, picture: Path) -> None:
    measured = [r for r in result.history if r.get("dev_measure") is not None]
    seconds = sum(row["seconds"] for row in run_log(folder / "metrics.jsonl"))
    # Windows update it within an episode.
    what = "episodes that taught" if recipe.training.window else "teacher updates"
    rows = [
        ("recipe", recipe.name),
        (what, str(sum(not row["skipped"] for row in result.history[:-1]))),
        (f"dev {measure}, first teacher", f"{measured[0]['dev_measure']:.4f}" if measured else "-"),
        (
            f"dev {measure}, best teacher",
            f"{result.best_measure:.4f} (episode {result.best_episode})" if measured else "-",
        ),
        ("hypergradients skipped", str(result.skipped)),
        ("time", console.duration(seconds)),
    ]
    console.table("Teacher trained", ["", ""], rows)
    lived = [("lived", result.lived_path)] if result.lived_path else []
    console.files(
        [
            ("teacher", result.best_path),
            ("last", result.last_path),
            *lived,
            ("plot", picture),
            ("log", folder / "metrics.jsonl"),
        ]
    )


def _say_next(
    asked: Sequence[str], teachers: Sequence[Path], usual: bool, log_format: LogFormat
) -> None:
    if asked and log_format.wordy:
        console.line("next, beside cross-entropy and others, each loss tuned alike on dev:")
        console.line(f"  {next_command(asked, teachers, usual)}")


def next_command(asked: Sequence[str], teachers: Sequence[Path], usual: bool) -> str:
    """Return the ``l2t compare`` of a run's ``teachers`` on the students of their training.

    ``asked`` are recipe and changes; those of the teacher's own training are left out. A run in
    the ``usual`` folder is compared in the usual one, any other beside its own folder.
    """
    recipe, *changes = asked
    kept = [c for c in changes if c.split("=")[0].split(".")[0] not in CORE_SECTIONS]
    words = ["l2t", "compare", recipe, *kept]
    words += [word for path in teachers for word in ("--teacher", console.shown(path))]
    if not usual:
        words += ["--out", f"{console.shown(teachers[0].parent)}-compare"]
    return shlex.join(words)


def _version() -> str:
    from l2t_core import __version__

    return __version__
