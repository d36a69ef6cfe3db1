"""The benchmark itself, at its smallest: its check, its table and its JSON; no timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkout import ROOT, run_python  # type: ignore[import-not-found]

SCRIPT = ROOT / "tests/benchmarks/hypergradient.py"


def test_the_smallest_run(tmp_path: Path) -> None:
    """The engine against torch.func's unrolled graph, which is what a check compares with."""
    report = tmp_path / "report.json"
    done = run_python(
        SCRIPT, "--students", "mlp", "--steps", "3", "--methods", "l2t recomputed",
        "--repeats", "1", "--check-steps", "3", "--json", report,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert set(found) == {"machine", "settings", "rows"}
    (row,) = found["rows"]
    assert (row["student"], row["steps"], row["method"]) == ("mlp", 3, "l2t recomputed")
    assert row["status"] == "ok"
    assert row["agreement"] < 1e-5
    assert row["hypergradient_norm"] > 0.0
    assert len(row["all_seconds"]) == 1 and len(row["all_plain_seconds"]) == 2
    pair = sum(row["all_plain_seconds"]) / 2
    assert row["ratio"] == pytest.approx(row["all_seconds"][0] / pair)
    assert row["mib_peak"] >= row["mib_before"] + row["mib_added"] - 1e-6
    assert row["note"] == "0.33 recomputed a step"  # two states fit: of three steps one is redone
    assert "recomputed" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [("--students", "mpl", "mlp"), ("--methods", "forward", "torch.func"), ("--steps", "0", "200")],
)
def test_bad_input_is_refused(option: str, value: str, hint: str) -> None:
    done = run_python(SCRIPT, option, value)
    assert done.returncode == 2
    assert value in done.stderr and hint in done.stderr


def test_what_disagrees_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, what a naive Adam gives at a zero gradient, counts as disagreement."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import hypergradient

    for wrong in (0.5, float("nan")):
        orders = []

        def child(order, limit, wrong=wrong, orders=orders):
            orders.append(order["task"])
            return {"status": "ok", "agreement": wrong}

        monkeypatch.setattr(hypergradient, "run_child", child)
        rows = list(hypergradient.measure_all(["mlp"], ["higher"], [3, 5], 1, 3, 12.0, 9.0))
        assert [row["status"] for row in rows] == ["disagrees", "disagrees"]
        assert orders == ["check"]


def test_processes_that_fail_are_named_and_never_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import hypergradient

    program = tmp_path / "child.py"
    monkeypatch.setattr(hypergradient, "_CHILD", program)
    cases = {
        "import time; time.sleep(99)": "over the limit",
        "import os; os.kill(os.getpid(), 9)": "out of memory",
        "raise SystemExit('terminate: std::bad_alloc')": "out of memory",
        "1 / 0": "failed",
    }
    for text, status in cases.items():
        program.write_text(text, encoding="utf-8")
        found = hypergradient.run_child({}, limit=1.0 if "sleep" in text else 99.0)
        assert found["status"] == status and "seconds" not in found
