"""``l2t transfer``: a teacher on students it was not trained on, against tuned cross-entropy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from l2t_cli.applying.result import CROSS_ENTROPY
from l2t_cli.applying.teacher_copies import TeacherCopies
from l2t_cli.comparing.command import Comparison, chosen_jobs, load_for_comparison
from l2t_cli.options import ChosenFormat, DryRun, Jobs, TeacherFile, output_folder
from l2t_cli.recipe_reading.files import is_change
from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat
from l2t_cli.tidying import FreshFolder
from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_write, claimed


def command(
    teacher: TeacherFile,
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            help="Recipes with other students, data or lengths; changes apply to all of them.",
        ),
    ],
    out: Annotated[Path | None, output_folder("runs/TEACHER-transfer")] = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    log_format: ChosenFormat = None,
) -> None:
    """Apply a teacher to other recipes, each against cross-entropy tuned in the same way.

    Every recipe is compared as `l2t compare` does, with its own `compare` section's rates, trials
    and seeds; all are checked before the first student is trained.
    """
    names = [word for word in target if not is_change(word)]
    changes = [word for word in target if is_change(word)]
    if not names:
        raise UserError("no recipe to transfer to; give one (see `l2t recipes ls`)")
    folder = out or Path("runs") / f"{teacher.resolve().parent.name}-transfer"
    _refuse_foreign(folder)
    copies = TeacherCopies(folder)
    _refuse_another_teacher(copies, teacher)
    comparisons: dict[str, Comparison] = {}
    for name in names:
        recipe = load_for_comparison(name, changes)
        only = replace(recipe.compare, losses=[CROSS_ENTROPY], teachers=[])
        if recipe.short_name in comparisons:
            raise UserError(f"{recipe.short_name} is given twice; rename one of the recipe files")
        comparisons[recipe.short_name] = Comparison(
            replace(recipe, compare=only), [teacher], folder / recipe.short_name, copies
        )
    if dry_run:
        for comparison in comparisons.values():
            comparison.show_plan()
        return
    side_by_side = chosen_jobs(jobs, comparisons.values())
    run(comparisons, folder, side_by_side, console.default_format(log_format))


def run(
    comparisons: Mapping[str, Comparison], folder: Path, jobs: int, log_format: LogFormat
) -> None:
    """Run the comparisons and report on all of them.

    Raises:
        UserError: as :meth:`Comparison.run`.
        Interrupted: after Ctrl-C.
    """
    before, path = FreshFolder.before(folder), folder / "transfer.json"
    with claimed(folder):
        try:
            summaries = {
                name: comparison.run(jobs, log_format, report=False)
                for name, comparison in comparisons.items()
            }
        except Exception:
            if not any(p.is_dir() for p in folder.glob("*")):  # only the teacher's copy is left
                before.take_back()
            raise
        atomic_write(path, json.dumps(_with_earlier(path, summaries), indent=2) + "\n")
    if log_format is LogFormat.json:
        print(json.dumps({"event": "result", "targets": summaries}), flush=True)
    elif log_format is not LogFormat.none:
        _show(summaries, path, folder)


def _refuse_foreign(folder: Path) -> None:
    """Refuse the folder of a run or of one comparison: here each recipe has one below it."""
    for name in ("config.yaml", "config.json"):
        if (folder / name).exists():
            raise UserError(f"{folder} holds no transfer of ours ({name}); choose another --out")


def _refuse_another_teacher(copies: TeacherCopies, teacher: Path) -> None:
    """Refuse the folder of another teacher: transfer.json tells of one."""
    if others := copies.others(copies.take(teacher)):
        raise UserError(
            f"{copies.folder} holds the transfer of another teacher ({others[0]}), not of "
            f"{teacher}; choose another --out"
        )


def _with_earlier(path: Path, summaries: dict[str, Any]) -> dict[str, Any]:
    """Return the results of other recipes that ``path`` holds, and these."""
    try:
        return {**json.loads(path.read_text("utf-8")), **summaries}
    except (OSError, ValueError, TypeError):
        return summaries


def _show(summaries: Mapping[str, dict[str, Any]], path: Path, folder: Path) -> None:
    from l2t_cli.comparing import report as compare_report

    for summary in summaries.values():
        compare_report.show(summary, [])
    files = [("result", path)]
    console.files([*files, *((name, folder / name / "comparison.md") for name in summaries)])
