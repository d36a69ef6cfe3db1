"""Which settings of teacher training make the dev measure climb, at cross-entropy's best rates.

For each setting a teacher is trained; then students with seeds that the training never saw live
under the first and the last theta, and by cross-entropy. What counts is their dev error: that of
the training's own episodes, each with fresh students, is more noise than signal. Everything goes
on where it was stopped when the same command is given again. ::

    python tests/benchmarks/stability.py clean --data data/mnist --out runs/stability
    python tests/benchmarks/stability.py noise --data data/mnist --out runs/stability
    python tests/benchmarks/stability.py demo --data data/demo --out runs/stability
    python tests/benchmarks/stability.py demo-end --data data/demo --out runs/stability
    python tests/benchmarks/stability.py report --out runs/stability --plot docs/stability-now.png

The data are what ``l2t data prepare mnist`` and ``l2t data prepare demo`` made. Rates:
cross-entropy's best on dev, of the grid that the first lines of a run print. The students
of "demo-end" begin at a trained one, for which the flags of recipes/nmt/demo-de-en are ``--lr 4e-3
--lr-scheduler polynomial_decay --warmup-updates 40 --total-num-update 600 --max-update 600``::

    fairseq-train data/demo/data-bin ... --no-epoch-checkpoints --save-dir runs/demo-start
    l2t export runs/demo-start/checkpoint_last.pt --to runs/demo-start/student.pt
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from stability_tasks import TASKS

from l2t_core.comparing.statistics import compare_paired
from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_write
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, TeacherSpec, TrainingSpec
from l2t_core.students.state import feature_count
from l2t_core.students.train import train_student
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import build_teacher
from l2t_core.teachers.file import load_teacher
from l2t_core.training.episodes import train_teacher

UNSEEN = (101, 102, 103, 104, 105)
TUNING = (51, 52)
TEACHER = TeacherSpec(slots=10)
LOSS = LossSpec("diagonal", "softplus")

WITH_SHARED_IDENTITY: dict[str, dict[str, Any]] = {
    "": {},
    ", 4 students": {"students": 4},
    ", mixed": {"students": 4, "differentiation": "mixed", "perturbation": 0.05},
    ", penalty 1": {"phi_penalty": 1.0},
    ", antithetic, 4 pairs": {
        "students": 4, "differentiation": "antithetic-es", "perturbation": 0.05
    },
    ", 6 points": {"measure_points": 6},
    ", mean of last 100": {"average_last": 100},
    ", last 100 steps": {"truncate": 100},
    ", penalty 0.1": {"phi_penalty": 0.1},
    ", clipped at 0.1": {"clip_norm": 0.1},
}

# name: (the student's schedule, changes to TrainingSpec, changes to LossSpec), and M-tilde where
# it is not the log-likelihood
SETTINGS: dict[str, tuple[Any, ...]] = {
    "constant rate": ("constant", {}, {}),
    "constant, discount 0.99": ("constant", {"discount": 0.99}, {}),
    "constant, cap 10": ("constant", {"cotangent_cap": 10.0}, {}),
    "constant, mean of last 100": ("constant", {"average_last": 100}, {}),
    "constant, 4 students": ("constant", {"students": 4}, {}),
    "to zero": ("linear", {}, {}),
    "to zero, discount 0.99": ("linear", {"discount": 0.99}, {}),
    "to zero, 6 points": ("linear", {"measure_points": 6}, {}),
    "to zero, 4 students": ("linear", {"students": 4}, {}),
    "to zero, penalty 1": ("linear", {"phi_penalty": 1.0}, {}),
    "to zero, last 100 steps": ("linear", {"truncate": 100}, {}),
    "to zero, windows of 25": ("linear", {"differentiation": "windows", "window": 25}, {}),
    "to zero, windows of 100": ("linear", {"differentiation": "windows", "window": 100}, {}),
    "to zero, antithetic, 4 pairs": (
        "linear", {"differentiation": "antithetic-es", "students": 4, "perturbation": 0.05}, {}
    ),
    "to zero, persistent, 100": (
        "linear", {"differentiation": "persistent-es", "window": 100, "perturbation": 0.05}, {}
    ),
    "to zero, mixed, 4 pairs": (
        "linear", {"differentiation": "mixed", "students": 4, "perturbation": 0.05}, {}
    ),
    "to zero, shared": ("linear", {}, {"form": "shared"}),
    "to zero, dense": ("linear", {}, {"form": "dense"}),
    "to zero, sigmoid": ("linear", {}, {"sigma": "sigmoid", "warmup_steps": 100}),
    "to zero, lr 0.02": ("linear", {"lr": 0.02}, {}),
    # Begins at cross-entropy, with label smoothing of any strength at any time in reach.
    "to zero, shared identity": ("linear", {"lr": 0.02}, {"form": "shared", "sigma": "identity"}),
    "to zero, shared identity, accuracy": (
        "linear", {"lr": 0.02}, {"form": "shared", "sigma": "identity"}, "expected_accuracy"
    ),
    **{
        f"to zero, shared identity, {measure.replace('_', ' ')}{ending}": (
            "linear", {"lr": 0.02, **changes}, {"form": "shared", "sigma": "identity"}, measure
        )
        for measure in ("margin", "smoothed_accuracy")
        for ending, changes in WITH_SHARED_IDENTITY.items()
    },
    "to zero, shared identity, log-likelihood": (
        "linear", {"lr": 0.02}, {"form": "shared", "sigma": "identity"}, "log_likelihood"
    ),
    "warm-up, to zero, shared identity, smoothed accuracy": (
        "warm-up, linear", {"lr": 0.02}, {"form": "shared", "sigma": "identity"},
        "smoothed_accuracy",
    ),
    **{
        f"to zero, {form} identity, smoothed accuracy": (
            "linear", {"lr": 0.02}, {"form": form, "sigma": "identity"}, "smoothed_accuracy"
        )
        for form in ("diagonal", "dense", "network")
    },
}

# What is tried at the end of a translation student's training, M-tilde being the task's own.
END_SETTINGS: dict[str, tuple[Any, ...]] = {
    name: ("linear", {"lr": 0.03, **changes}, {"form": form, "sigma": "identity"}, *measure)
    for name, form, changes, *measure in (
        ("shared", "shared", {}),
        ("diagonal", "diagonal", {}),
        ("banded", "banded", {}),
        ("lowrank", "lowrank", {}),
        ("shared, BLEU of the set", "shared", {}, "expected_corpus_bleu"),
        ("banded, BLEU of the set", "banded", {}, "expected_corpus_bleu"),
        ("banded, as search ranks", "banded", {}, "expected_bleu, lenpen 1"),
        (
            "banded, BLEU of the set, as search ranks", "banded", {},
            "expected_corpus_bleu, lenpen 1",
        ),
        (
            "lowrank, BLEU of the set, as search ranks", "lowrank", {},
            "expected_corpus_bleu, lenpen 1",
        ),
        (
            "shared, BLEU of the set, as search ranks", "shared", {},
            "expected_corpus_bleu, lenpen 1",
        ),
        ("banded, no bound", "banded", {"bounded": False}),
        ("banded, lr 0.01", "banded", {"lr": 0.01}),
        ("banded, discount 0.9", "banded", {"discount": 0.9}),
        ("banded, last 20 steps", "banded", {"truncate": 20}),
        ("banded, windows of 20", "banded", {"differentiation": "windows", "window": 20}),
        ("banded, mean of last 20", "banded", {"average_last": 20}),
        ("banded, one-sided differences", "banded", {"hvp": "one-sided-difference"}),
        ("banded, 4 students", "banded", {"students": 4}),
        (
            "banded, antithetic, 4 pairs", "banded",
            {"differentiation": "antithetic-es", "students": 4, "perturbation": 0.05},
        ),
        (
            "banded, mixed, 4 students", "banded",
            {"differentiation": "mixed", "students": 4, "perturbation": 0.05},
        ),
    )
}


def settings_of(task: str) -> dict[str, tuple[Any, ...]]:
    """Return what is tried on a task, by name."""
    return END_SETTINGS if task == "demo-end" else SETTINGS


def dev_errors(student: Any, teacher: Any, loss: LossSpec, seeds: tuple[int, ...]) -> list[float]:
    """Return 100 * (1 - dev measure) of a student for each seed; 90 where it dies."""
    found = []
    for seed in seeds:
        applied = None
        if teacher is not None:
            applied = AppliedTeacher(
                teacher, loss, student.default_features, student.num_classes,
                student.total_steps,
            )
        try:
            train_student(student, seed, applied)
            found.append(100.0 * (1.0 - student.true_measure()))
        except FloatingPointError:
            found.append(90.0)
    return found


def slug_of(name: str) -> str:
    """Return a setting's name as a file's."""
    return "".join(c if c.isalnum() else "-" for c in name)


def once(path: Path, make: Any) -> Any:
    """Return what the JSON file ``path`` holds, made by ``make()`` if it is not there."""
    if not path.exists():
        atomic_write(path, json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def best_rate(task: str, data: Path, schedule: str, out: Path) -> float:
    """Return cross-entropy's best rate on dev."""

    def tune() -> dict[str, float]:
        found = {}
        for rate in TASKS[task].rates:
            student = TASKS[task].build(data, schedule, rate, "")
            found[str(rate)] = statistics.mean(dev_errors(student, None, LOSS, TUNING))
        return found

    table = once(out / f"tuning-{slug_of(schedule)}.json", tune)
    print(
        f"cross-entropy, {schedule} rate, {TASKS[task].score} by rate: {table}", flush=True
    )
    return float(min(table, key=lambda rate: table[rate]))


def measure(task: str, name: str, data: Path, out: Path) -> None:
    """Train one setting's teacher and judge it by unseen students."""
    schedule, changes, loss_changes, *other = settings_of(task)[name]
    rate = best_rate(task, data, schedule, out)
    student = TASKS[task].build(data, schedule, rate, other[0] if other else "")
    loss = dataclasses.replace(LOSS, **loss_changes)
    common = {"episodes": TASKS[task].episodes, "lr": 0.005, "memory": "3GiB"}
    spec = TrainingSpec(**{**common, **changes})
    slug = slug_of(name)

    def row() -> dict[str, Any]:
        folder = open_run(out / slug, {"spec": dataclasses.asdict(spec)})
        failure, history = "", []
        try:
            result = train_teacher(student, loss, TEACHER, spec, folder, record={})
            history = result.history
            last, _ = load_teacher(result.last_path)
            after = dev_errors(student, last, loss, UNSEEN)
        except UserError as error:
            failure, after = str(error), [90.0] * len(UNSEEN)
        classes = student.num_classes
        features = feature_count(student.default_features, classes)
        first = build_teacher(TEACHER, loss, classes, features, spec.seed)
        return {
            "setting": name, "rate": rate, "schedule": schedule, "failure": failure,
            "first": dev_errors(student, first, loss, UNSEEN), "last": after, "history": history,
        }

    ce = once(
        out / f"cross-entropy-{slug_of(schedule)}.json",
        lambda: dev_errors(student, None, LOSS, UNSEEN),
    )
    found = once(out / f"{slug}.json", row)
    mean = statistics.mean
    print(
        f"{name:32} lr {rate:g}: cross-entropy {mean(ce):.2f}, first teacher "
        f"{mean(found['first']):.2f}, last {mean(found['last']):.2f} {found['failure']}",
        flush=True,
    )


def run(task: str, data: Path, out: Path, only: str) -> None:
    torch.set_num_threads(1)
    settings = settings_of(task)
    for name in settings:
        if only == name or (only in name and only not in settings):
            measure(task, name, data, out / task)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a task's folder that are finished, in the order of its settings."""
    found = []
    for name in settings_of(folder.name):
        path = folder / f"{slug_of(name)}.json"
        if path.exists():
            row = json.loads(path.read_text(encoding="utf-8"))
            ce = folder / f"cross-entropy-{slug_of(row['schedule'])}.json"
            found.append({**row, "cross_entropy": json.loads(ce.read_text(encoding="utf-8"))})
    return found


def report(out: Path, plot: Path | None) -> None:
    """Print a Markdown table for each task; draw the episodes' dev errors.

    p is that of the paired t-test of the last teacher's students against cross-entropy's.
    """
    drawn: list[tuple[str, list[dict[str, Any]]]] = []
    for task in TASKS:
        rows = rows_of(out / task)
        if not rows:
            continue
        drawn.append((task, rows))
        print(f"\n{task}\n\n| setting | rate | cross-entropy | first teacher | last teacher | "
              "change | p | largest growth | lost |\n|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            ce, first, last = (
                f"{statistics.mean(row[k]):.2f} ± {statistics.stdev(row[k]):.2f}"
                for k in ("cross_entropy", "first", "last")
            )
            change = statistics.mean(
                b - a for a, b in zip(row["first"], row["last"], strict=True)
            )
            growth = [r["largest"] for r in row["history"] if r.get("largest") is not None]
            lost = sum(r.get("students_lost", 0) for r in row["history"])
            p = compare_paired(row["last"], row["cross_entropy"]).t_p
            print(f"| {row['setting']} | {row['rate']:g} | {ce} | {first} | {last} | "
                  f"{change:+.2f} | {'–' if p is None else f'{p:.3f}'} | "
                  f"{max(growth, default=0.0):.3g} | "
                  f"{'all' if row['failure'] else lost} |")
    if plot and drawn:
        draw(drawn, plot)


def draw(drawn: list[tuple[str, list[dict[str, Any]]]], to: Path) -> None:
    """Draw the score of the training's own students by episode, cross-entropy's dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy
    from matplotlib import pyplot

    groups = {"constant rate": ("constant",), "to zero": ("linear", "warm-up, linear")}
    panels = [
        (task, group, [r for r in rows if r["schedule"] in schedules and r["history"]])
        for task, rows in drawn for group, schedules in groups.items()
    ]
    panels = [p for p in panels if p[2]]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 4 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (task, group, rows) in zip(axes[:, 0], panels, strict=True):
        colours = pyplot.get_cmap("turbo")(numpy.linspace(0.05, 0.95, len(rows)))
        for row, colour in zip(rows, colours, strict=True):
            errors = [100.0 * (1.0 - r["dev_measure"]) for r in row["history"]]
            axis.plot(errors, label=row["setting"], linewidth=1, color=colour)
        ce = statistics.mean(rows[0]["cross_entropy"])
        axis.axhline(ce, color="black", linestyle="--", linewidth=1, label="cross-entropy")
        axis.set(title=f"{task}, {group}", xlabel="episode", ylabel=TASKS[task].score)
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(to, dpi=120)


def main(
    task: Annotated[str, typer.Argument(help="clean, noise, demo, demo-end or report")],
    out: Annotated[Path, typer.Option(help="Folder of the results")],
    data: Annotated[Path, typer.Option(help="Folder of the task's data")] = Path("data/mnist"),
    only: Annotated[str, typer.Option(help="This setting, or all whose names hold it")] = "",
    plot: Annotated[Path | None, typer.Option(help="Picture to draw")] = None,
) -> None:
    """Measure settings of teacher training."""
    if task == "report":
        report(out, plot)
    elif task not in TASKS:
        raise typer.BadParameter(f"{task}: use {', '.join(TASKS)} or report")
    else:
        run(task, data, out, only)


if __name__ == "__main__":
    typer.run(main)
