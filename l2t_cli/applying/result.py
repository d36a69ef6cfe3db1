"""What came out of applying a teacher: scores by arm and seed, their table and what it says."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat
from l2t_core.comparing.statistics import (
    FEWEST_PAIRS,
    PairedComparison,
    compare_paired,
    counted,
    deviation,
    mean,
)
from l2t_core.losses.baselines import BASELINES

TAUGHT, CROSS_ENTROPY = "taught", "cross_entropy"
# Of fairseq-train, beside --max-update.
ENDING_FLAGS = "--max-epoch, --patience, --stop-time-hours, --stop-min-lr"
NOT_TUNED = "Cross-entropy's learning rate was not tuned here; `l2t compare` tunes both."
# Columns that tell how a result came to be, for a screen too narrow for all.
_MAKING = ("seeds", "diverged", "time each")
LABELS = {TAUGHT: "taught", CROSS_ENTROPY: BASELINES.get(CROSS_ENTROPY).label}


@dataclass(frozen=True)
class Score:
    """What one trained student reached on test. ``signature`` makes the number repeatable.

    ``seconds`` are those of an image student's every start, of a fairseq command's last one.
    ``diverged`` says how a student ended that did; its ``value`` is None. ``early`` says at which
    update one ended that another flag than --max-update did.
    """

    value: float | None
    signature: str
    seconds: float
    diverged: str = ""
    early: str = ""


@dataclass(frozen=True)
class ApplicationResult:
    """All scores of one application, by arm (``taught``, ``cross_entropy``) and seed.

    ``worst`` is what a student that diverged counts as.
    """

    name: str
    measure: str
    lower_is_better: bool
    worst: float
    scores: dict[str, dict[int, Score]]
    folder: Path

    def values(self, arm: str, seeds: Collection[int] | None = None) -> list[float]:
        """Return the scores of an arm in the order of its seeds, the diverged as the worst.

        ``seeds`` are those asked for, None for all.
        """
        by_seed = sorted(self.scores.get(arm, {}).items())
        values = counted([s.value for _, s in by_seed], self.worst, self.lower_is_better)
        pairs = zip(by_seed, values, strict=True)
        return [value for (seed, _), value in pairs if seeds is None or seed in seeds]

    def paired(self) -> list[int]:
        """Return the seeds that have both a taught student and one of cross-entropy."""
        arms = (self.scores.get(arm, {}) for arm in (TAUGHT, CROSS_ENTROPY))
        return sorted(set.intersection(*map(set, arms)))

    def diverged(self, arm: str) -> int:
        """Return how many students of an arm diverged."""
        return sum(bool(score.diverged) for score in self.scores[arm].values())

    def signature(self) -> str:
        """Return the signature of the taught students' scores, or of the others' if none lived."""
        by_arm = (self.scores.get(arm, {}) for arm in (TAUGHT, CROSS_ENTROPY))
        lived = (s for scores in by_arm for s in scores.values() if not s.diverged)
        return next((score.signature for score in lived), "")

    def all_paired(self) -> bool:
        """Tell whether there are two arms, and every seed is in both."""
        seeds = self.paired()
        return bool(seeds) and all(len(by_seed) == len(seeds) for by_seed in self.scores.values())

    def against(self) -> PairedComparison | None:
        """Return the taught students set against cross-entropy's of the same seeds, if any."""
        seeds = self.paired()
        if not seeds:
            return None
        return compare_paired(self.values(TAUGHT, seeds), self.values(CROSS_ENTROPY, seeds))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the table's column names and rows; a column that would be empty is left out."""
        against = self.against()
        rows: list[dict[str, str]] = []
        for arm, by_seed in self.scores.items():
            dead = self.diverged(arm)
            found = against if arm == TAUGHT else None
            rows.append(
                {
                    "student": LABELS[arm],
                    "seeds": ranges(by_seed),
                    f"test {self.measure}": mean_and_deviation(self.values(arm)),
                    "difference": f"{found.difference:+.2f}" if found else "",
                    "95 % interval": interval(found, len(self.paired())) if found else "",
                    "p": p_value(found.t_p) if found else "",
                    "diverged": f"{dead} of {len(by_seed)}" if dead else "",
                    "time each": console.duration(mean([s.seconds for s in by_seed.values()])),
                }
            )
        columns = [name for name in rows[0] if any(row[name] for row in rows)]
        return columns, [[row[name] for name in columns] for row in rows]

    def warnings(self) -> list[str]:
        """Return lines on seeds in one arm only, students that diverged or ended too early."""
        return self._unpaired() + self._early() + [
            f"{self.name}, {LABELS[arm]}: {dead} of {len(by_seed)} students diverged and count as "
            f"worst ({worded(self.measure, self._floor(arm))})"
            for arm, by_seed in self.scores.items()
            if (dead := self.diverged(arm))
        ]

    def _unpaired(self) -> list[str]:
        if len(self.scores) < 2 or self.all_paired():
            return []
        both = ranges(self.paired())
        where = f"on the seeds that both have ({both})" if both else "on none: no seed has both"
        return [f"{self.name}: taught and cross-entropy are compared {where}"]

    def ended_early(self) -> bool:
        """Tell whether a student, of whichever loss, ended before its --max-update."""
        return any(s.early for by_seed in self.scores.values() for s in by_seed.values())

    def _early(self) -> list[str]:
        """Return a line where taught students ended before their teacher's course was over."""
        early = {seed: s.early for seed, s in self.scores.get(TAUGHT, {}).items() if s.early}
        if not early:
            return []
        return [
            f"{self.name}, taught: seed {ranges(early)} ended at {early[min(early)]} by another "
            f"flag ({ENDING_FLAGS}), and the teacher's course was cut off there, too; give the "
            "--max-update that is reached"
        ]

    def _floor(self, arm: str) -> float:
        return max(self.values(arm)) if self.lower_is_better else min(self.values(arm))

    def verdict(self) -> str:
        """Return one sentence that says what came out, win or not, and whether by chance."""
        against = self.against()
        if against is None:
            return ""
        count, p = len(self.paired()), against.t_p
        if count >= FEWEST_PAIRS and not against.told_apart:
            why = f"p {p_value(p)}" if p is not None else "every seed differs by the same: no p"
            return (
                f"{self.name}: taught and cross-entropy are not told apart ({count} students each, "
                f"{why})."
            )
        gain, size = against.difference, abs(against.difference)
        word = "better" if (gain < 0) == self.lower_is_better else "worse"
        unit = "points of error" if self.measure == "error %" else self.measure
        by = f"{word} than cross-entropy by {size:.2f} {unit}"
        if size < 0.005:
            by = "as cross-entropy did"
        students = "1 student" if count == 1 else f"{count} students"
        said = f"p {p_value(p)}" if p is not None else "so few tell nothing about chance"
        return f"{self.name}: taught came out {by} ({students} each: {said})."

    def content(self) -> dict[str, Any]:
        """Return everything but the folder as plain values."""
        return {
            "name": self.name,
            "measure": self.measure,
            "lower_is_better": self.lower_is_better,
            "signature": self.signature(),
            "scores": {
                arm: [{"seed": seed, **asdict(score)} for seed, score in sorted(by_seed.items())]
                for arm, by_seed in self.scores.items()
            },
            "against_cross_entropy": asdict(against) if (against := self.against()) else None,
            "warnings": self.warnings(),
        }


def report(result: ApplicationResult, log_format: LogFormat) -> None:
    """Print the table, the signature and what was written."""
    if log_format is LogFormat.json:
        content = json.loads((result.folder / "result.json").read_text(encoding="utf-8"))
        print(json.dumps({"event": "result", **content}), flush=True)
        return
    if log_format is LogFormat.none:
        return
    columns, rows = result.table()
    alike = result.all_paired() and not result.ended_early()
    title = f"{result.name}: same steps, batches and seeds" if alike else result.name
    making = [i for i, name in enumerate(columns) if i == 0 or name in _MAKING]
    came_out = [i for i, name in enumerate(columns) if name not in _MAKING]
    console.table(title, columns, rows, text=2, parts=(came_out, making))
    console.line(f"signature: {result.signature()}")
    if verdict := result.verdict():
        console.line(verdict)
        console.line(NOT_TUNED)
    for text in result.warnings():
        console.line(f"warning: {text}")
    console.files([("result", result.folder / "result.json"), ("students", result.folder)])


def ranges(numbers: Iterable[int]) -> str:
    """Return whole ``numbers`` in order, neighbours put together: ``1-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """Return ``27.31 ± 0.12``, the deviation being the sample's; the number alone for one."""
    wide = deviation(values)
    return f"{mean(values):.{digits}f}" + (f" ± {wide:.{digits}f}" if wide is not None else "")


def worded(measure: str, value: float) -> str:
    """Return ``test BLEU 27.31`` or ``test error 3.00 %``."""
    name, _, unit = measure.partition(" ")
    return f"test {name} {value:.2f} {unit}".rstrip()


def interval(found: PairedComparison, pairs: int) -> str:
    """Return ``-0.52 to +0.10``, the middle 95 % of the bootstrap's means; nothing of too few."""
    if pairs < FEWEST_PAIRS:
        return ""
    return f"{found.low:+.2f} to {found.high:+.2f}"


def p_value(p: float | None) -> str:
    """Return ``0.013``, ``<0.001``, or nothing where there is no p."""
    return "" if p is None else "<0.001" if p < 0.0005 else f"{p:.3f}"
