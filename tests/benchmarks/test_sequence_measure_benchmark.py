"""The benchmark of the expected measure, at its smallest: its parts and its JSON; no timings."""

from __future__ import annotations

import json

import pytest
from checkout import ROOT, run_python  # type: ignore[import-not-found]

pytest.importorskip("fairseq")
SCRIPT = ROOT / "tests/benchmarks/sequence_measure.py"


def test_the_smallest_run() -> None:
    done = run_python(
        SCRIPT, "--rounds", "1", "--json", "--set", "nmt.steps=2", "nmt.dev_sentences=3",
        "nmt.true_measure_sentences=3", "loss.warmup_steps=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["recipe"], found["steps"], found["sources"]) == ("demo-de-en", 2, 3)
    assert found["share"] == pytest.approx(found["measure_seconds"] / found["episode_seconds"])
    assert {row["candidates"] for row in found["rows"]} == {
        "ancestral", "temperature", "top-k", "nucleus", "beam",
    }  # fmt: skip
    for row in found["rows"]:
        parts = [row[k] for k in ("search", "texts", "scores", "log-probabilities", "derivative")]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= row["seconds"]
        assert 0 < row["share"] < 1


def test_bad_input_is_refused() -> None:
    done = run_python(SCRIPT, "--rounds", "0")
    assert done.returncode == 2
    assert done.stderr.endswith("--rounds is 0; it must be at least 1\n")
    done = run_python(SCRIPT, "--recipe", "demo-de-em")
    assert done.returncode == 2
    assert "did you mean 'demo-de-en'" in done.stderr
