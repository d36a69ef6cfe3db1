"""What came out of a comparison: one summary, shown as a table and written in four formats."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2t_cli.applying.result import ENDING_FLAGS, interval, mean_and_deviation, p_value
from l2t_cli.comparing.plan import Arm, Finals, Tuning
from l2t_cli.comparing.trials import FieldTrials, Result, Trial
from l2t_cli.screen import console
from l2t_cli.train_teacher import run_log
from l2t_core.comparing.statistics import (
    PairedComparison,
    Point,
    at_edge,
    compare_paired,
    counted,
    untried_sides,
)
from l2t_core.losses.baselines import baseline
from l2t_core.runs.files import atomic_write
from l2t_core.specs import LEARNED_RULES, OF_TWO_LIVES
from l2t_core.teachers.file import load_header

COLUMNS = (
    "loss", "chosen on dev", "dev {dev}", "test {test}", "change", "95 % interval", "p", "time",
    "steps",
)
# On a screen that is too narrow for all: what came out, and how.
_RESULT, _MAKING = (0, 3, 4, 5, 6), (0, 1, 2, 7, 8)

# By whether lower is better: an error's change is told relative to it, a score's as it is.
_CHANGE_UNIT = {True: "%", False: "points"}

Summary = dict[str, Any]


def summarise(
    name: str,
    found: Sequence[Arm],
    tuning: Tuning,
    finals: Finals,
    results: Mapping[Trial, Result],
    field_trials: FieldTrials,
    spent: Mapping[Trial, Result],
) -> Summary:
    """Return all that a comparison found, as plain values.

    ``spent`` are all students that it cost, those of earlier grids, too.
    """
    chosen = tuning.chosen()
    rows = [
        _row(arm, chosen[arm.name], tuning, finals, spent, field_trials) for arm in found
    ]
    reference = rows[0]["test"]
    for row in rows[1:]:
        if len(row["test"]) == len(reference) > 0:
            against = compare_paired(row["test"], reference)
            row["against_cross_entropy"] = asdict(against)
            row["change"] = change(against, field_trials.lower_is_better)
    signatures = [r.signature for r in results.values() if r.signature]
    early = _early(found, results, field_trials.steps)
    return {
        "name": name,
        "measure": field_trials.measure,
        "lower_is_better": field_trials.lower_is_better,
        "change_unit": _CHANGE_UNIT[field_trials.lower_is_better],
        "dev_measure": field_trials.dev_measure,
        "tuned_on": "nll" if tuning.on_nll else field_trials.dev_measure,
        "points_each": tuning.count,
        "tuning_seeds": list(tuning.seeds),
        "seeds": sorted({trial.seed for trial in results if trial.final}),
        "steps": field_trials.steps,
        "same_steps": _same_steps(finals),
        "learning_rates": sorted(tuning.rates),
        "signature": signatures[0] if signatures else "",
        "losses": rows,
        "warnings": [*early, *(line for row in rows for line in row.pop("warnings"))],
    }


def _early(found: Sequence[Arm], results: Mapping[Trial, Result], steps: int) -> list[str]:
    """Return a line where students ended before their last step: whose, and at which."""
    said, cut = [], False
    for arm in found:
        made = [r.steps for t, r in results.items() if t.arm == arm.name and not r.diverged]
        short = sorted(n for n in made if n < steps)
        if not short:
            continue
        to = f" to {short[-1]:,}" if short[-1] > short[0] else ""
        said.append(f"{_label(arm)} {len(short)} of {len(made)}, at {short[0]:,}{to}")
        cut = cut or arm.teacher is not None
    if not said:
        return []
    teacher = ", and the teacher's course was cut off there, too" if cut else ""
    return [
        f"students ended before update {steps:,} by another flag ({ENDING_FLAGS}): "
        f"{'; '.join(said)}{teacher}; remove that flag, or give the --max-update that is reached"
    ]


def _same_steps(finals: Finals) -> bool:
    """Tell whether the final students of each seed made as many steps under every loss."""
    made: dict[int, set[int]] = {}
    for by_seed in finals.results.values():
        for seed, result in by_seed.items():
            if not result.diverged:
                made.setdefault(seed, set()).add(result.steps)
    return all(len(numbers) == 1 for numbers in made.values())


def _row(
    arm: Arm,
    point: Point | None,
    tuning: Tuning,
    finals: Finals,
    spent: Mapping[Trial, Result],
    field_trials: FieldTrials,
) -> dict[str, Any]:
    last = [result for _, result in sorted(finals.results[arm.name].items())]
    theirs = [result for trial, result in spent.items() if trial.origin == arm.origin]
    cost: tuple[float | None, int] = (0.0, 0)
    if arm.teacher:
        cost = teacher_cost(arm.teacher.path, arm.teacher.given.parent)
    tuned = [
        {"lr": p.lr, **dict(p.settings), "score": score[0] if score else None}
        for p, score in tuning.scores[arm.name].items()
    ]
    return {
        "name": arm.name,
        "label": _label(arm),
        "teacher": str(arm.teacher.given) if arm.teacher else None,
        "lr": point.lr if point else None,
        "settings": dict(point.settings) if point else {},
        "tuned_settings": [name for name, values in arm.own.items() if point and len(values) > 1],
        "tuning": tuned,
        "tuning_diverged": sum(row["score"] is None for row in tuned),
        "dev": counted([r.dev for r in last], 0.0, lower_is_better=False),
        "test": counted(
            [r.test for r in last], field_trials.worst, field_trials.lower_is_better
        ),
        "diverged": sum(bool(r.diverged) for r in last),
        "students_seconds": sum(r.seconds for r in theirs),
        "students_steps": sum(r.steps + r.steps_before for r in theirs),
        "teacher_seconds": cost[0],
        "teacher_steps": cost[1],
        "against_cross_entropy": None,
        "change": None,
        "warnings": _warnings(arm, point, tuning, last, cost[0]),
    }


def _label(arm: Arm) -> str:
    return arm.name if arm.teacher else baseline(arm.loss).label


def teacher_cost(path: Path, run: Path) -> tuple[float | None, int]:
    """Return the seconds (None: not known) and student steps that training a teacher took.

    The steps are in the file's record; the seconds in the log of the folder ``run``, where its
    training was, and may have gone on since.
    """
    header = load_header(path)
    training = header.record.get("training")
    training = training if isinstance(training, dict) else {}
    students = training.get("students", 1)
    twice = training.get("differentiation") in OF_TWO_LIVES
    twice = twice or training.get("update_rule") in LEARNED_RULES
    lives = 2 if twice else 1
    episodes = header.record.get("episodes", 0)
    finals = header.record.get("final_students", 0)
    if not all(isinstance(number, int) for number in (episodes, students, finals)):
        return None, 0
    log = run_log(run / "metrics.jsonl")
    made = [row for row in log if row["event"] == "episode"][:episodes]
    last = [row for row in log if row["event"] == "final"] if finals else []
    rows = [*made, *last]
    known = len(made) == episodes and sum(row.get("students", 0) for row in last) == finals
    known = known and all(isinstance(row.get("seconds"), float) for row in rows)
    seconds = sum(row["seconds"] for row in rows) if known else None
    return seconds, (episodes * students * lives + finals) * header.total_steps


def _warnings(
    arm: Arm,
    point: Point | None,
    tuning: Tuning,
    last: Sequence[Result],
    teacher_seconds: float | None,
) -> list[str]:
    label = _label(arm)
    if point is None:
        theirs = not arm.teacher and baseline(arm.loss).own
        look = ", or see that the loss is a finite number everywhere" if theirs else ""
        return [f"{label} diverged at every point: no students; give compare.lr lower rates{look}"]
    found = []
    combinations = math.prod(map(len, arm.own.values()))
    if combinations > len(tuning.scores[arm.name]):
        found.append(
            f"{label}: only {len(tuning.scores[arm.name])} of its {combinations} combinations of "
            f"own values were tried; give compare.trials={2 * combinations}, or fewer values"
        )
    if edge := at_edge(point.lr, tuning.rates, ratio=1.05):
        found.append(
            f"{label}: the best rate {point.lr:g} is the {edge} of compare.lr; widen it"
        )
    if sides := untried_sides(point, tuning.grid(arm), tuning.rates):
        own = ", ".join(f"{name} {value:g}" for name, value in point.settings)
        found.append(
            f"{label}: no rate {' or '.join(sides)} the best, {point.lr:g}, was tried with {own}; "
            f"give compare.trials={len(tuning.rates) * combinations}"
        )
    for name, value in point.settings:
        known = baseline(arm.loss).settings[name]
        edge = at_edge(value, arm.own[name])
        if edge and value not in (known.low, known.high):
            found.append(
                f"{label}: the best {name} {value:g} is the {edge} of compare.{arm.name}.{name}; "
                "widen it"
            )
    if dead := sum(bool(result.diverged) for result in last):
        found.append(f"{label}: {dead} of {len(last)} final students diverged and count as worst")
    if arm.teacher and arm.teacher.changed:
        found.append(f"{label}: {arm.teacher.note()}")
    if arm.teacher and teacher_seconds is None:
        found.append(
            f"{label}: how long the teacher's training took is not known (no metrics.jsonl of it "
            f"beside {arm.teacher.given}); its time is left out"
        )
    return found


def columns(summary: Summary) -> list[str]:
    """Return the table's column names."""
    return [
        name.format(dev=summary["dev_measure"], test=summary["measure"]) for name in COLUMNS
    ]


def table_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Return the table's rows as text."""
    rows: list[tuple[str, ...]] = []
    digits = 4 if summary["dev_measure"] == "accuracy" else 2
    for row in summary["losses"]:
        own = [f"{name} {row['settings'][name]:.3g}" for name in row["tuned_settings"]]
        chosen = ", ".join([f"lr {row['lr']:.3g}", *own]) if row["lr"] is not None else "diverged"
        against = _against(row)
        seconds = row["students_seconds"] + (row["teacher_seconds"] or 0.0)
        unknown = " + ?" if row["teacher_seconds"] is None else ""
        rows.append(
            (
                row["label"],
                chosen,
                mean_and_deviation(row["dev"], digits) if row["dev"] else "-",
                mean_and_deviation(row["test"]) if row["test"] else "-",
                _with_unit(row["change"], summary["change_unit"]),
                interval(against, len(row["test"])) if against else "",
                p_value(against.t_p) if against else "",
                console.duration(seconds) + unknown,
                f"{row['students_steps'] + row['teacher_steps']:,}",
            )
        )
    return rows


def _against(row: dict[str, Any]) -> PairedComparison | None:
    found = row["against_cross_entropy"]
    return PairedComparison(**found) if found else None


def change(found: PairedComparison, lower_is_better: bool) -> float | None:
    """Return the mean's change against cross-entropy's as the field counts it.

    An error's in per cent of cross-entropy's, None where that is 0; that of a score such as BLEU
    in points.
    """
    if not lower_is_better:
        return found.difference
    return None if found.relative is None else 100.0 * found.relative


def _with_unit(changed: float | None, unit: str) -> str:
    return "" if changed is None else f"{changed:+.{1 if unit == '%' else 2}f} {unit}"


def verdict(summary: Summary) -> str:
    """Return one sentence: which losses differ from tuned cross-entropy, and which do not."""
    sign = -1 if summary["lower_is_better"] else 1
    kinds: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for row in summary["losses"][1:]:
        against = _against(row)
        if against is None:
            continue
        word = "better" if sign * against.difference > 0 else "worse"
        kinds[word if against.told_apart else "not told apart"].append(row["label"])
    said = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if not said:
        return ""
    return f"against tuned cross-entropy over {len(summary['seeds'])} seeds: " + "; ".join(said)


def how(summary: Summary) -> str:
    """Return one sentence on how the losses were tuned."""
    seeds = len(summary["tuning_seeds"])
    same = "same steps and batches" if summary["same_steps"] else "same batches, but other steps"
    return (
        f"each loss: {summary['points_each']} points x {seeds} seed{'s' if seeds > 1 else ''} on "
        f"dev {summary['tuned_on']}, then {len(summary['seeds'])} fresh seeds; {same}; "
        "test read once per final student"
    )


def write(
    summary: Summary, results: Mapping[Trial, Result], curve: str, folder: Path
) -> list[tuple[str, Path]]:
    """Write JSON, Markdown, CSV and plots; return what was written.

    Raises:
        UserError: if the folder cannot be written.
    """
    from l2t_cli.screen.plots import plot_learning_curves, plot_scores

    files = [
        ("result", folder / "comparison.json"),
        ("report", folder / "comparison.md"),
        ("students", folder / "students.csv"),
        ("curves", folder / "learning_curves.png"),
        ("scores", folder / "scores.png"),
    ]
    atomic_write(files[0][1], json.dumps(summary, indent=2) + "\n")
    atomic_write(files[1][1], markdown(summary))
    atomic_write(files[2][1], students_csv(results))
    curves: dict[str, list[list[list[float]]]] = {}
    for row in summary["losses"]:
        finals = [r for t, r in results.items() if t.final and t.arm == row["name"] and r.curve]
        curves[row["label"]] = [result.curve for result in finals]
    plot_learning_curves(curves, curve, summary["name"], files[3][1])
    scores = {row["label"]: row["test"] for row in summary["losses"] if row["test"]}
    plot_scores(scores, f"test {summary['measure']}", summary["name"], files[4][1])
    return files


def markdown(summary: Summary) -> str:
    """Return the report as Markdown."""
    heads = columns(summary)
    lines = [f"# {summary['name']}: losses compared", "", how(summary) + ".", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table_rows(summary)]
    if said := verdict(summary):
        lines += ["", said + "."]
    if summary["warnings"]:
        lines += ["", *(f"- warning: {line}" for line in summary["warnings"])]
    lines += ["", f"signature: `{summary['signature']}`", "", "![](scores.png)", ""]
    lines += ["![](learning_curves.png)", ""]
    return "\n".join(lines)


def students_csv(results: Mapping[Trial, Result]) -> str:
    """Return one line for each student of the comparison, tuned and final."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["kind", "loss", "lr", "settings", "seed", "dev", "dev_nll", "test", "diverged",
         "seconds", "steps"]
    )
    for trial, result in results.items():
        own = " ".join(f"{name}={value:g}" for name, value in trial.settings)
        writer.writerow(
            ["final" if trial.final else "tuning", trial.arm, f"{trial.lr:g}", own, trial.seed,
             result.dev, result.nll, result.test, result.diverged, f"{result.seconds:.3f}",
             result.steps + result.steps_before]
        )
    return text.getvalue()


def show(summary: Summary, files: Sequence[tuple[str, Path]]) -> None:
    """Print the table, what it says, the warnings and the files."""
    heads, rows = columns(summary), table_rows(summary)
    title = f"{summary['name']}: losses compared"
    console.table(title, heads, rows, text=2, parts=(_RESULT, _MAKING))
    console.line(how(summary))
    if said := verdict(summary):
        console.line(said)
    for text in summary["warnings"]:
        console.line(f"warning: {text}")
    console.line(f"signature: {summary['signature']}")
    if files:
        console.files(files)
