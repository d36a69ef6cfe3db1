"""How a long run shows itself: bars on a terminal, a line per episode, JSON lines, or nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat

Event = dict[str, Any]
OnEvent = Callable[[Event], None]
SECONDS_BETWEEN_LINES = 30.0
SCALARS = (
    "dev_measure", "smoothed", "hypergradient_norm", "signal_to_noise", "growth", "largest",
    "sharpness", "hvp_error", "tail_error", "seconds", "skipped_total",
)


class TeacherView:
    """Shows teacher training from its events, of which ``episodes`` are to come in all."""

    def __init__(self, episodes: int, measure: str, log_format: LogFormat) -> None:
        import torch

        self.episodes, self.measure, self.format = episodes, measure, log_format
        self._bars: _EpisodeBars | None = None
        self._last = time.monotonic()
        self._threads = torch.get_num_threads()

    @contextmanager
    def running(self, done: list[Event]) -> Iterator[OnEvent]:
        """Yield the receiver of events; ``done`` are the episodes of an earlier start."""
        if self.format is LogFormat.rich:
            self._bars = _EpisodeBars(self.episodes, len(done))
            with self._bars.live:
                yield self.receive
        else:
            yield self.receive

    def receive(self, event: Event) -> None:
        """Take one event of ``l2t_core.training.episodes``."""
        if event["event"] == "step":
            self._step(event)
            return
        if event["event"] == "resumed":  # these were shown when they were made
            return
        self._last = time.monotonic()
        if self.format is LogFormat.json:
            print(json.dumps(event), flush=True)
        if event["event"] == "plan":
            self._note(f"trajectory: {event['plan']}")
            self._note(f"dev: {self.measure}, * the best so far; smoothed: what the teacher climbs")
            if event["threads"] != self._threads:
                count = event["threads"]
                self._note(f"threads: {count}, as this run began: another number has other bits")
            return
        if event["event"] == "final":
            for text in self.final(event):
                self._note(text)
            return
        if self._bars:
            self._bars.episode(event)
        for text in self.summary(event):
            self._note(text)
        if warning := event.get("warning"):
            self._note(f"  warning: {warning}")

    def _note(self, text: str) -> None:
        """Show a line that stays, above the bars where there are bars."""
        if self.format is LogFormat.simple:
            console.line(text)
        elif self._bars:
            self._bars.live.console.print(Text(text))

    def _step(self, event: Event) -> None:
        if self._bars:
            self._bars.step(event)
        elif (
            self.format is LogFormat.simple
            and time.monotonic() - self._last > SECONDS_BETWEEN_LINES
        ):
            self._last = time.monotonic()
            what, done = _phase(event)
            head = f"episode {event['episode']:>3}/{self.episodes - 1}"
            console.line(f"{head}  {what} {done}/{event['of']}")

    def final(self, row: Event) -> list[str]:
        """Return one line about a teacher's final students, and what else is to be told."""
        score = row["dev_measure"]
        parts = [
            f"teacher of episode {row['episode']}",
            f"dev {score:.4f}" if score is not None else "no student lived",
            f"over {row['students']} final students",
            console.duration(row["seconds"]),
        ]
        return ["  ".join(parts), *_lost(row)]

    def summary(self, row: Event) -> list[str]:
        """Return one line about an episode, of 80 columns at most, and what else is to be told."""
        head = f"episode {row['episode']:>3}/{self.episodes - 1}"
        if row.get("dev_measure") is None:
            return [f"{head}  skipped: {row.get('reason') or 'the hypergradient is not finite'}"]
        norm = row.get("hypergradient_norm")
        parts = [
            head,
            f"dev {row['dev_measure']:.4f}" + (" *" if row.get("best") else "  "),
            f"smoothed {row['smoothed']:.4f}",
            f"gradient {norm:.3g}" if norm is not None else "skipped",
            console.duration(row["seconds"]),
        ]
        lines = ["  ".join(parts)]
        if norm is None:
            lines.append(f"  skipped: {row.get('reason')}")
        return [*lines, *_lost(row)]


def _lost(row: Event) -> list[str]:
    lost = row.get("students_lost")
    return [f"  {lost} of {row['students']} students lost"] if lost else []


def _phase(event: Event) -> tuple[str, int]:
    """Return what a step belongs to, in words, and how many such steps are done."""
    if event["phase"] == "forward":
        return "student learns", event["step"] + 1
    return "hypergradient", event["of"] - event["step"]


class _EpisodeBars:
    """The episode bar over the bar of the steps within the episode."""

    def __init__(self, episodes: int, done: int) -> None:
        layout = (
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._episodes = Progress(*layout, TimeElapsedColumn(), console=console.out())
        self._steps = Progress(*layout, console=console.out())
        self._all = self._episodes.add_task("episodes", total=episodes, completed=done, note="")
        self._inner = self._steps.add_task("", total=None, note="")
        self._started, self._first, self._last = time.monotonic(), done, 0.0
        self.live = Live(
            Group(self._episodes, self._steps),
            console=console.out(),
            refresh_per_second=8,
            transient=True,
        )

    def step(self, event: Event) -> None:
        now = time.monotonic()
        finished = event["step"] + 1
        # Thousands of events a second cost more than they show.
        if now - self._last < 0.1 and finished < event["of"]:
            return
        self._last = now
        what, done = _phase(event)
        if event["students"] > 1:
            what = f"{what} {event['student'] + 1}/{event['students']}"
        self._steps.update(self._inner, description=what, total=event["of"], completed=done)

    def episode(self, event: Event) -> None:
        finished = event["episode"] + 1
        task = self._episodes.tasks[0]
        each = (time.monotonic() - self._started) / max(1, finished - self._first)
        left = each * ((task.total or 0) - finished)
        note = f"about {console.duration(left)} left" if left > 0 else ""
        self._episodes.update(self._all, completed=finished, note=note)


class ScalarLog:
    """TensorBoard scalars by episode; does nothing without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._writer = folder, self._open(folder)

    def _open(self, folder: Path | None, purge_step: int | None = None) -> Any:
        if folder is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=purge_step)

    def receive(self, event: Event) -> None:
        """Write the numbers of a finished episode; of a run that goes on, all that it has."""
        if self._writer is None or event["event"] not in ("episode", "resumed"):
            return
        rows = [event]
        if event["event"] == "resumed":
            # A kill may have come before an episode was written, and a grown run's last is made
            # again: TensorBoard lets go of all that there was.
            self._writer.close()
            self._writer, rows = self._open(self._folder, purge_step=0), event["history"]
        for row in rows:
            for key in SCALARS:
                value = row.get(key)
                if value is not None and math.isfinite(value):
                    self._writer.add_scalar(f"teacher/{key}", value, row["episode"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def bar(
    title: str, log_format: LogFormat, unit: str = "", quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Yield ``update(completed, total, note="")`` of one bar.

    Off a terminal it prints a line every half minute, and at the end unless ``quiet``; JSON and
    none print nothing.
    """
    if log_format is LogFormat.rich:
        with _one_bar(title, unit) as update:
            yield update
        return
    began = last = time.monotonic()

    def report(completed: float, total: float | None = None, note: str = "") -> None:
        nonlocal last
        if log_format is LogFormat.simple and time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            of = f"/{_amount(total, unit)}" if total else ""
            console.line(f"{title}: {_amount(completed, unit)}{of}  {note}".rstrip())

    yield report
    if log_format is LogFormat.simple and not quiet:
        console.line(f"{title}: done in {console.duration(time.monotonic() - began)}")


@contextmanager
def _one_bar(title: str, unit: str) -> Iterator[Callable[..., None]]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=console.out(), transient=True) as progress:
        task: TaskID = progress.add_task(title, total=None, amount="", note="")

        def update(completed: float, total: float | None = None, note: str = "") -> None:
            of = f"/{_amount(total, unit)}" if total else ""
            progress.update(
                task,
                completed=completed,
                total=total,
                note=note,
                amount=f"{_amount(completed, unit)}{of}",
            )

        yield update


def _amount(value: float, unit: str) -> str:
    return f"{value / 1e6:.1f} MB" if unit == "bytes" else f"{value:.0f}"
