"""Tables on narrow screens: nothing cut, no number and no word broken, no line too long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from l2t_cli.applying.result import ApplicationResult, Score
from l2t_cli.demo import PARTS, show_summary
from l2t_cli.screen import console

Drawn = Callable[[], list[str]]


@pytest.fixture
def drawn(capsys: pytest.CaptureFixture[str]) -> Drawn:
    """Return what reads the lines of all tables since it was last asked."""
    return lambda: [t for t in capsys.readouterr().out.splitlines() if t[:1] in tuple("╭│├╰")]


@pytest.fixture(params=[60, 80, 120])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the width of the screen."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    console._console.cache_clear()  # it may have met another screen
    return int(request.param)


HEADS = ["loss", "chosen on dev", "dev accuracy", "test error %", "95 % interval", "p", "steps"]
ROWS = [
    ["cross-entropy", "lr 0.042", "0.9584 ± 0.0008", "4.19 ± 0.10", "", "", "26,000"],
    ["gold correction", "lr 0.141, eps 0.1", "0.9624 ± 0.0016", "3.59 ± 0.16", "-0.75 to -0.50",
     "<0.001", "52,000"],
]  # fmt: skip


@pytest.mark.parametrize("parts", [(), ((0, 3, 4, 5), (0, 1, 2, 6))])
def test_numbers_stay_whole(width: int, parts: tuple[tuple[int, ...], ...], drawn: Drawn) -> None:
    console.table("", HEADS, ROWS, text=2, parts=parts)
    lines = drawn()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for row in [HEADS, *ROWS]:
        assert f"│ {row[0]} " in text
        assert all(f" {cell} " in text for cell in row[2:]), text
    tables = {60: 2 if parts else 3, 80: 2, 120: 1}
    assert sum(line.startswith("╭") for line in lines) == tables[width]


def test_words_are_wrapped_and_long_ones_broken_as_a_last_resort(width: int, drawn: Drawn) -> None:
    sees = "progress, train_nll, train_accuracy, dev_nll, dev_accuracy, log_learning_rate"
    console.table("", ["", ""], [("dev set seen", sees), ("fingerprint", "0123456789abcdef" * 7)])
    lines = drawn()
    assert max(map(len, lines)) <= width and sum(line.startswith("╭") for line in lines) == 1
    text = "\n".join(lines)
    assert "│ dev set seen │ progress, train_nll," in text
    assert all(f" {word} " in text for word in sees.split())
    held = [line.split("│")[2].strip() for line in lines if line.startswith("│")]
    assert "0123456789abcdef" * 7 in "".join(held)


def test_the_table_of_the_demo(width: int, drawn: Drawn) -> None:
    """On 80 columns it is one table."""
    results = []
    for part, measure, lower in zip(PARTS, ("BLEU", "error %"), (False, True), strict=True):
        scores = {
            arm: {seed: Score(start + seed / 8, "s", 9.0) for seed in range(1, part.seeds + 1)}
            for arm, start in (("taught", 2.0), ("cross_entropy", 3.5))
        }
        results.append(ApplicationResult(part.recipe, measure, lower, 0.0, scores, Path("out")))
    show_summary(list(zip(PARTS, results, strict=True)), Path("out"), 1.0)
    lines = drawn()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("╭") for line in lines) == (1 if width >= 80 else 2)
    text = "\n".join(lines)
    words = "German–English, fairseq Transformer handwritten digits BLEU cross-entropy difference"
    numbers = ("2.12", "2.38 ± 0.20", "3.88 ± 0.20", "-1.50", "error %")
    assert all(f" {found} " in text for found in (*words.split(), *numbers)), text
