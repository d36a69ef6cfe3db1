"""Where output goes: rich on a terminal, plain text elsewhere and under NO_COLOR."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A label that is no wider stays in one line; a longer word, such as a path, may be broken.
_WORD = 15


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
    text: int | None = None,
    parts: Sequence[Sequence[int]] = (),
) -> None:
    """Print a table whose first ``text`` columns, all if None, are words and the others numbers.

    Nothing is cut, and no number broken. On a screen too narrow for full width the columns in each
    of ``parts`` are a table of their own; and where one with its words wrapped is too wide still,
    it comes in several, each with the first column.
    """
    if title:
        line(title, style="bold")
    cells = list(zip(columns, *rows, strict=True))
    numbers = range(len(columns) if text is None else text, len(columns))
    wide = sum(map(_width, cells)) > _room(len(cells))
    for part in parts if parts and wide else (range(len(columns)),):
        for piece in _pieces(part, cells, numbers):
            _print_columns([cells[i] for i in piece], [i in numbers for i in piece])


def _print_columns(cells: Sequence[Sequence[str]], numbers: Sequence[bool]) -> None:
    grid = Table(box=box.ROUNDED, show_header=any(column[0] for column in cells))
    for column, width, number in zip(cells, _widths(cells, numbers), numbers, strict=True):
        # Folded, never cut: a path or a signature has to stay whole.
        justify: Literal["left", "right"] = "right" if number else "left"
        grid.add_column(column[0], overflow="fold", justify=justify, width=width)
    for row in list(zip(*cells, strict=True))[1:]:
        grid.add_row(*(Text(cell) for cell in row))
    out().print(grid)


def _pieces(
    part: Sequence[int], cells: Sequence[Sequence[str]], numbers: range
) -> list[list[int]]:
    """Return the columns of ``part`` in as few tables as the screen takes, alike in number."""
    narrow = [
        _width(column) if i in numbers else min(least, _WORD)
        for i, (column, least) in enumerate(zip(cells, _least(cells), strict=True))
    ]
    first, *rest = part
    found = [[first, *rest]]
    for count in range(1, len(rest) + 1) if numbers else ():
        size = math.ceil(len(rest) / count)
        found = [[first, *rest[at : at + size]] for at in range(0, len(rest), size)]
        if all(sum(narrow[i] for i in piece) <= _room(len(piece)) for piece in found):
            break
    return found


def _widths(cells: Sequence[Sequence[str]], numbers: Sequence[bool]) -> list[int]:
    """Return the columns' widths: words wrapped between them, in them if nothing else helps."""
    widths = [_width(column) for column in cells]
    for least in (_least(cells), [1] * len(cells)):
        while sum(widths) > _room(len(cells)):
            wide = [
                i for i, number in enumerate(numbers) if not number and widths[i] > least[i]
            ]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _room(columns: int) -> int:
    """Return how many characters of a line a table of so many columns has for their cells."""
    return out().width - 3 * columns - 1


def _width(column: Iterable[str]) -> int:
    return max(map(cell_len, column))


def _least(cells: Sequence[Sequence[str]]) -> list[int]:
    """Return the widths in which columns of words break none; nor, the first, a short label."""
    words = [
        max((cell_len(word) for cell in column for word in cell.split()), default=0)
        for column in cells
    ]
    return [max(words[0], min(_width(cells[0]), _WORD)), *words[1:]]


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
