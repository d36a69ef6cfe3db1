"""What came out of applying a teacher: scores by arm and seed, their table and what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2t_cli import console
from l2t_cli.console import LogFormat
from l2t_core.comparison import counted, deviation, mean

TAUGHT, CROSS_ENTROPY = "taught", "cross_entropy"
LABELS = {TAUGHT: "taught", CROSS_ENTROPY: "cross-entropy"}


@dataclass(frozen=True)
class Score:
    """What one trained student reached on test. ``signature`` makes the number repeatable.

    ``seconds`` are those of an image student's every start, of a fairseq command's last one.
    ``diverged`` says how a student ended that did; its ``value`` is None.
    """

    value: float | None
    signature: str
    seconds: float
    diverged: str = ""


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

    def values(self, arm: str) -> list[float]:
        """Return the scores of an arm in the order of its seeds, the diverged as the worst."""
        found = [score.value for _, score in sorted(self.scores.get(arm, {}).items())]
        return counted(found, self.worst, self.lower_is_better)

    def diverged(self, arm: str) -> int:
        """Return how many students of an arm diverged."""
        return sum(bool(score.diverged) for score in self.scores[arm].values())

    def signature(self) -> str:
        """Return the signature of the taught students' scores, or of the others' if none lived."""
        by_arm = (self.scores.get(arm, {}) for arm in (TAUGHT, CROSS_ENTROPY))
        lived = (s for scores in by_arm for s in scores.values() if not s.diverged)
        return next((score.signature for score in lived), "")

    def columns(self) -> list[str]:
        """Return the table's column names."""
        dead = ["diverged"] if any(map(self.diverged, self.scores)) else []
        return ["student", "seeds", f"test {self.measure}", "difference", *dead, "time each"]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the table's rows, one for each arm."""
        reference = self.values(CROSS_ENTROPY)
        for arm, by_seed in self.scores.items():
            values = self.values(arm)
            difference = ""
            if arm == TAUGHT and reference:
                difference = f"{mean(values) - mean(reference):+.2f}"
            first, last = min(by_seed), max(by_seed)
            cells = {
                "student": LABELS[arm],
                "seeds": str(first) if first == last else f"{first}-{last}",
                f"test {self.measure}": mean_and_deviation(values),
                "difference": difference,
                "diverged": f"{self.diverged(arm)} of {len(by_seed)}",
                "time each": console.duration(mean([s.seconds for s in by_seed.values()])),
            }
            yield tuple(cells[name] for name in self.columns())

    def warnings(self) -> list[str]:
        """Return a line for each arm of which students diverged."""
        return [
            f"{self.name}, {LABELS[arm]}: {dead} of {len(by_seed)} students diverged and count as "
            f"worst ({worded(self.measure, self._floor(arm))})"
            for arm, by_seed in self.scores.items()
            if (dead := self.diverged(arm))
        ]

    def _floor(self, arm: str) -> float:
        return max(self.values(arm)) if self.lower_is_better else min(self.values(arm))

    def verdict(self) -> str:
        """Return one sentence that says what came out, win or not."""
        taught, reference = self.values(TAUGHT), self.values(CROSS_ENTROPY)
        if not reference:
            return ""
        gain = mean(taught) - mean(reference)
        better = gain < 0 if self.lower_is_better else gain > 0
        students = f"{len(taught)} student{'s' if len(taught) > 1 else ''} each"
        if len(taught) == 1:
            students += ": how much chance adds is not known"
        if abs(gain) < 0.005:
            return f"{self.name}: taught and cross-entropy came out equal ({students})."
        word = "better" if better else "worse"
        return (
            f"{self.name}: taught came out {word} than cross-entropy by {abs(gain):.2f} "
            f"{'points of error' if self.measure == 'error %' else self.measure} ({students})."
        )

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
    columns = result.columns()
    both = len(result.scores) > 1
    console.table(
        f"{result.name}: same steps, batches and seeds" if both else result.name,
        columns,
        result.rows(),
        numbers=range(2, len(columns)),
    )
    console.line(f"signature: {result.signature()}")
    if verdict := result.verdict():
        console.line(verdict)
    for text in result.warnings():
        console.line(f"warning: {text}")
    console.files([("result", result.folder / "result.json"), ("students", result.folder)])


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """Return ``27.31 ± 0.12``, the deviation being the sample's; the number alone for one."""
    wide = deviation(values)
    return f"{mean(values):.{digits}f}" + (f" ± {wide:.{digits}f}" if wide is not None else "")


def worded(measure: str, value: float) -> str:
    """Return ``test BLEU 27.31`` or ``test error 3.00 %``."""
    name, _, unit = measure.partition(" ")
    return f"test {name} {value:.2f} {unit}".rstrip()
