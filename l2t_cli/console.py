"""Where output goes: rich on a terminal, plain text elsewhere and under NO_COLOR."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


class LogFormat(str, Enum):
    """How a long run reports: bars, one line per episode, JSON lines, or nothing."""

    rich = "rich"
    simple = "simple"
    json = "json"
    none = "none"

    @property
    def wordy(self) -> bool:
        """Whether lines for people are printed."""
        return self in (LogFormat.rich, LogFormat.simple)


@cache
def _console(stream: int) -> Console:
    width = None
    if not sys.stdout.isatty():
        # A log file has no width: without one, rich would break lines at 80 characters.
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdecimal() and int(columns) else 120
    return Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False, emoji=False)


def out() -> Console:
    """Return the console on stdout."""
    return _console(id(sys.stdout))


def line(text: str = "", style: str = "") -> None:
    """Print one line as it is: no markup, no wrapping, so that it can be copied."""
    out().print(Text(text, style=style), soft_wrap=True)


def show_command(arguments: str) -> None:
    """Print a command line that the reader can repeat."""
    line(f"$ {arguments}", style="bold cyan")


def default_format(chosen: LogFormat | None) -> LogFormat:
    """Return the chosen log format; otherwise rich on a terminal and simple elsewhere."""
    if chosen is not None:
        return chosen
    # NO_COLOR and TERM=dumb ask for plain output, in which a moving bar is only noise.
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return LogFormat.simple if plain else LogFormat.rich


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
) -> None:
    """Print a table; the columns whose positions are in ``numbers`` are right-aligned."""
    if title:
        line(title, style="bold")
    grid = Table(box=box.ROUNDED, show_header=any(columns))
    for position, name in enumerate(columns):
        # Folded, never cut: a path or a signature has to stay whole; a number in one piece.
        number = position in numbers
        grid.add_column(
            name, overflow="fold", justify="right" if number else "left", no_wrap=number
        )
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    out().print(grid)


def fits(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Tell whether a table of these is as wide as the screen at most, no cell wrapped."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    return sum(widths) + 3 * len(widths) + 1 <= out().width


def fitting_tables(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    parts: Sequence[Sequence[int]],
    *,
    numbers: Sequence[int] = (),
) -> None:
    """Print a table as :func:`table`; where it is wider than the screen, one for each of ``parts``.

    A part lists the positions of its columns.
    """
    whole = [range(len(columns))]
    for place, part in enumerate(whole if fits(columns, rows) else parts):
        table(
            "" if place else title,
            [columns[i] for i in part],
            [[row[i] for i in part] for row in rows],
            numbers=[here for here, i in enumerate(part) if i in numbers],
        )


def files(paths: Iterable[tuple[str, Path]]) -> None:
    """List what a run wrote: one path a line, each as the reader would type it."""
    line("written:", style="bold")
    entries = list(paths)
    width = max((len(label) for label, _ in entries), default=0)
    for label, path in entries:
        line(f"  {label:<{width}}  {shown(path)}")


def shown(path: Path) -> str:
    """Return ``path`` relative to the working folder where it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def duration(seconds: float) -> str:
    """Return ``75`` as ``1 min 15 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )
