"""``l2t demo``: the whole story on data made on the spot, by the commands a user would type."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from l2t_cli import data, train_teacher
from l2t_cli.applying import command as apply_teacher
from l2t_cli.applying.result import (
    CROSS_ENTROPY,
    NOT_TUNED,
    TAUGHT,
    ApplicationResult,
    mean_and_deviation,
)
from l2t_cli.applying.students import seeds_from
from l2t_cli.options import ChosenFormat, output_folder
from l2t_cli.recipe_reading.loading import load_recipe
from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat
from l2t_core.comparing.statistics import mean
from l2t_core.runs.files import atomic_write


@dataclass(frozen=True)
class Part:
    """One task of the demo: its recipe, its students' seeds and what the table calls it."""

    recipe: str
    title: str
    seeds: int
    dataset: str = ""


PARTS = (
    Part("demo-de-en", "German–English, fairseq Transformer", seeds=1, dataset="demo"),
    Part("digits", "handwritten digits", seeds=5),
)


def command(
    out: Annotated[Path, output_folder()] = Path("runs/demo"),
    log_format: ChosenFormat = None,
) -> None:
    """Train and apply a teacher for translation and for images, in a few minutes.

    Prints every command that it runs, so that each can be repeated or changed. A demo that was
    stopped goes on where it was.
    """
    # Students this small lose more to threads that wait for each other than they gain, and on a
    # machine with other work ten times so. Takes effect because torch is not imported yet.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = console.default_format(log_format)
    began = time.monotonic()
    finished = [(part, run_part(part, out, chosen)) for part in PARTS]
    content = write_summary(finished, out)
    if chosen is LogFormat.json:
        print(json.dumps({"event": "result", "parts": content}), flush=True)
    elif chosen is not LogFormat.none:
        show_summary(finished, out, time.monotonic() - began)


def run_part(part: Part, out: Path, log_format: LogFormat) -> ApplicationResult:
    """Prepare the data of a part, train its teacher and apply it beside cross-entropy."""
    teacher_folder, taught_folder = out / f"{part.recipe}-teacher", out / f"{part.recipe}-taught"
    if log_format.wordy:
        console.line()
        console.line(f"== {part.title} ==", style="bold")
    if part.dataset:
        if log_format.wordy:
            console.show_command(f"l2t data prepare {part.dataset}")
        data.prepare_data_set(part.dataset, None, None, log_format)
    recipe = load_recipe(part.recipe)
    if log_format.wordy:
        console.show_command(f"l2t train-teacher {part.recipe} --out {teacher_folder}")
    teacher = train_teacher.run(recipe, teacher_folder, log_format=log_format)
    if log_format.wordy:
        console.show_command(
            f"l2t apply-teacher {teacher} {part.recipe} --baseline --seeds {part.seeds} "
            f"--out {taught_folder}"
        )
    return apply_teacher.run(
        apply_teacher.application_for_recipe(recipe),
        teacher,
        taught_folder,
        seeds_from(1, part.seeds),
        baseline=True,
        log_format=log_format,
    )


def show_summary(finished: list[tuple[Part, ApplicationResult]], out: Path, seconds: float) -> None:
    """Print the one table of the demo."""
    console.line()
    rows = []
    for part, result in finished:
        taught, reference = (result.values(a, result.paired()) for a in (TAUGHT, CROSS_ENTROPY))
        difference = mean(taught) - mean(reference)
        rows.append(
            (
                part.title,
                result.measure,
                mean_and_deviation(taught),
                mean_and_deviation(reference),
                f"{difference:+.2f}",
                str(len(taught)),
            )
        )
    console.table(
        "Taught against cross-entropy: same steps, batches and seeds, test set",
        ["task", "measure", "taught", "cross-entropy", "difference", "seeds"],
        rows,
        text=2,
    )
    for _, result in finished:
        console.line(f"signature {result.name}: {result.signature()}")
    for _, result in finished:
        console.line(result.verdict())
        for text in result.warnings():
            console.line(f"warning: {text}")
    console.line(NOT_TUNED)
    entries = [("summary", out / "demo.json"), ("picture", out / "demo.png")]
    for part, result in finished:
        teacher = out / f"{part.recipe}-teacher"
        entries.append((f"teacher {part.recipe}", teacher / "teacher_best.safetensors"))
        entries.append((f"its training {part.recipe}", teacher / "dev_measure.png"))
        entries.append((f"students {part.recipe}", result.folder))
    console.files(entries)
    console.line(f"time: {console.duration(seconds)}")


def write_summary(
    finished: list[tuple[Part, ApplicationResult]], out: Path
) -> list[dict[str, Any]]:
    """Write ``demo.json`` and ``demo.png``; return what the first holds."""
    from l2t_cli.screen.plots import plot_comparison

    panels: list[dict[str, Any]] = [
        {
            "title": part.title,
            "measure": f"test {result.measure}",
            **{arm: result.values(arm, result.paired()) for arm in (TAUGHT, CROSS_ENTROPY)},
        }
        for part, result in finished
    ]
    content = [
        {**panel, "signature": result.signature(), "verdict": result.verdict()}
        for panel, (_, result) in zip(panels, finished, strict=True)
    ]
    atomic_write(out / "demo.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    plot_comparison(panels, out / "demo.png")
    return content
