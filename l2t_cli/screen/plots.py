"""The pictures of a teacher's training and of comparisons."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l2t_core.comparing.statistics import deviation, mean
from l2t_core.runs.files import atomic_write

_LINES = ("-", "--", ":", "-.")


def plot_dev_measure(
    history: Sequence[dict[str, Any]], best_episode: int, measure: str, title: str, to: Path
) -> None:
    """Write a PNG of the true dev measure by episode, that of the teacher that was taken marked.

    Where final students decide, ``best_episode`` need not be the highest point.

    Raises:
        UserError: if the file cannot be written.
    """
    rows = [row for row in history if row.get("dev_measure") is not None]
    figure, (axes,) = _axes(1, 6.4, 3.6)
    axes.plot([r["episode"] for r in rows], [r["dev_measure"] for r in rows], marker="o", ms=3)
    best = [r for r in rows if r["episode"] == best_episode]
    if best:
        axes.plot(best_episode, best[-1]["dev_measure"], "o", color="tab:red", label="best teacher")
        axes.legend(frameon=False)
    axes.set_xlabel("episode")
    axes.set_ylabel(f"dev {measure}")
    axes.set_title(_drawn(title), fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _write_png(figure, to)


def plot_comparison(panels: Sequence[dict[str, Any]], to: Path) -> None:
    """Write a PNG that sets taught students beside cross-entropy's, one panel per task.

    A panel is ``{"title", "measure", "taught": [...], "cross_entropy": [...]}``, with one number
    per seed.

    Raises:
        UserError: if the file cannot be written.
    """
    figure, grid = _axes(len(panels), 3.4 * len(panels), 3.2)
    for axes, panel in zip(grid, panels, strict=True):
        pairs = [("cross-entropy", panel["cross_entropy"]), ("taught", panel["taught"])]
        for position, (label, scores) in enumerate(pairs):
            middle = mean(scores)
            color = "tab:gray" if position == 0 else "tab:blue"
            axes.bar(position, middle, width=0.6, color=color, alpha=0.75, label=label)
            axes.plot([position] * len(scores), scores, "o", color="black", ms=3)
            axes.annotate(
                f"{middle:.2f}",
                (position, max(scores)),
                ha="center",
                va="bottom",
                xytext=(0, 4),
                textcoords="offset points",
            )
        axes.set_xticks(range(len(pairs)), [label for label, _ in pairs])
        axes.set_ylabel(panel["measure"])
        axes.set_title(_drawn(panel["title"]), fontsize=10)
        axes.margins(y=0.15)
    _write_png(figure, to)


def plot_learning_curves(
    curves: Mapping[str, Sequence[Sequence[Sequence[float]]]], what: str, title: str, to: Path
) -> None:
    """Write a PNG of learning curves on dev: mean over seeds, one standard deviation as a band.

    ``curves`` holds, for each loss, a curve of ``[steps, value]`` pairs for every seed.

    Raises:
        UserError: if the file cannot be written.
    """
    figure, (axes,) = _axes(1, 8.0, max(4.0, 1.0 + 0.17 * len(curves)))
    for number, (label, seeds) in enumerate(curves.items()):
        at: dict[float, list[float]] = {}
        for curve in seeds:
            for step, value in curve:
                at.setdefault(step, []).append(value)
        steps = sorted(at)
        means = [mean(at[step]) for step in steps]
        spreads = [deviation(at[step]) or 0.0 for step in steps]
        # There are ten colours, and they are taken again with another kind of line.
        style = _LINES[number // 10 % len(_LINES)]
        dot = "o" if len(steps) == 1 else ""  # no line leads through a single look at dev
        (line,) = axes.plot(
            steps, means, style, marker=dot, color=f"C{number % 10}", label=_drawn(label), lw=1.2
        )
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.set_title(_drawn(title), fontsize=10)
    # Beside the curves: between ten of them there is no room.
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _write_png(figure, to)


def plot_scores(scores: Mapping[str, Sequence[float]], measure: str, title: str, to: Path) -> None:
    """Write a PNG of one bar a loss with its standard deviation, and a dot for every seed.

    Raises:
        UserError: if the file cannot be written.
    """
    figure, (axes,) = _axes(1, 1.5 + 1.1 * len(scores), 3.6)
    for position, values in enumerate(scores.values()):
        color = "tab:gray" if position == 0 else "tab:blue"
        axes.bar(position, mean(values), width=0.6, color=color, alpha=0.75,
                 yerr=deviation(values), capsize=4)
        axes.plot([position] * len(values), values, "o", color="black", ms=3)
    labels = [_drawn(label) for label in scores]
    axes.set_xticks(range(len(scores)), labels, rotation=20, ha="right", fontsize=8)
    axes.set_ylabel(measure)
    axes.set_title(_drawn(title), fontsize=10)
    axes.margins(y=0.15)
    _write_png(figure, to)


def _drawn(text: str) -> str:
    """Return ``text`` with what is left of a name that is not UTF-8 in escapes, as in files."""
    return text.encode(errors="backslashreplace").decode()


def _axes(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure of so many inches, and ``panels`` axes side by side in it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, panels, figsize=(width, height), dpi=120, squeeze=False)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[0])


def _write_png(figure: Any, to: Path) -> None:
    """Write ``figure`` whole and let go of it."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    plt.close(figure)
    atomic_write(to, content.getvalue())
