"""Real fairseq-train and fairseq-generate runs with the plugin, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_fairseq import TINY_MODEL, USER_DIR, run_module
from toy_runs import STEPS, Result, Runs, same_parameters

from l2t_core.teachers.applied import AppliedTeacher

pytest.importorskip("fairseq")


@pytest.mark.parametrize("name", ["neutral", "neutral_stock"])
def test_neutral_coefficients_are_cross_entropy(runs: Runs, name: str) -> None:
    plain, taught = runs.logged("plain"), runs.logged(name)
    assert len(plain) == len(taught) >= STEPS
    for expected, entry in zip(plain, taught, strict=True):
        assert {key: entry.get(key) for key in expected} == expected
    assert same_parameters(runs.checkpoint("plain"), runs.checkpoint(name))


def test_a_real_teacher_changes_the_loss_and_not_what_is_reported(runs: Runs) -> None:
    plain, taught = runs.logged("plain"), runs.logged("real")
    losses = [(e["loss"], e["nll_loss"]) for e in taught if "loss" in e]
    assert len(losses) == STEPS
    # Four updates of scaled warm-up (2 of 10 are 4 of 20) are cross-entropy's own.
    assert losses[:4] == [(e["loss"], e["loss"]) for e in plain if "loss" in e][:4]
    assert all(loss != nll for loss, nll in losses[4:])
    valid = [entry for entry in taught if "valid_loss" in entry]
    assert len(valid) >= 5
    for entry in valid:
        assert entry["valid_loss"] == entry["valid_nll_loss"]
        assert {"valid_ppl", "valid_l2t_accuracy"} <= entry.keys()
    assert not same_parameters(runs.checkpoint("plain"), runs.checkpoint("real"))


def test_both_tasks_teach_alike(runs: Runs) -> None:
    assert same_parameters(runs.checkpoint("real"), runs.checkpoint("real_stock"))
    assert runs.logged("real") == runs.logged("real_stock")


def state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["extra_state"]["train_iterator"]["l2t"]


@pytest.mark.parametrize(
    ("name", "file", "in_epoch", "steps"),
    [("resumed", "checkpoint_2_10.pt", 3, 10), ("resumed_at_epoch", "checkpoint1.pt", 0, 7)],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    runs: Runs, name: str, file: str, in_epoch: int, steps: int
) -> None:
    start = runs.checkpoint("real", file)
    assert start["extra_state"]["train_iterator"]["iterations_in_epoch"] == in_epoch
    assert state(start)["applied"]["step"] == steps
    whole, resumed = runs.checkpoint("real"), runs.checkpoint(name)
    assert same_parameters(whole, resumed)
    assert state(whole) == state(resumed)
    assert state(whole)["applied"]["step"] == STEPS
    logged = [[e for e in runs.logged(run) if "loss" in e] for run in ("real", name)]
    assert logged[1] == logged[0][steps:]


def test_the_coefficients_follow_the_state(runs: Runs) -> None:
    def coefficients(name: str, file: str = "checkpoint_last.pt") -> dict[str, torch.Tensor]:
        applied = AppliedTeacher.from_file(runs.teachers["real"], STEPS)
        applied.load_state_dict(state(runs.checkpoint(name, file))["applied"])
        return applied.begin_step(0.001)

    end, resumed = coefficients("real"), coefficients("resumed")
    half = coefficients("real", "checkpoint_2_10.pt")
    assert all(torch.equal(end[key], resumed[key]) for key in end)
    assert (end["W"] - half["W"]).abs().max() > 1e-3


def test_the_stock_task_resumes_with_a_new_state_and_says_so(runs: Runs) -> None:
    # That checkpoint does hold s_t, but the stock task has no way to hand it over.
    assert "starts anew at update 10" in runs.results["resumed_stock"].stdout
    assert not same_parameters(runs.checkpoint("real"), runs.checkpoint("resumed_stock"))


def test_cross_entropy_under_our_task_is_stock_and_resumes_exactly(runs: Runs) -> None:
    stock = runs.checkpoint("plain")
    assert same_parameters(stock, runs.checkpoint("plain_ours"))
    assert same_parameters(stock, runs.checkpoint("plain_resumed"))


def test_a_warm_start_from_cross_entropy(runs: Runs) -> None:
    first = next(e for e in runs.logged("warm_start") if "loss" in e)
    plain = [e for e in runs.logged("plain") if "loss" in e]
    assert first["num_updates"] == "1"  # the optimiser's and the teacher's clock begin anew ...
    assert state(runs.checkpoint("warm_start"))["applied"]["step"] == STEPS
    assert float(first["nll_loss"]) < float(plain[0]["loss"])  # ... with a trained student


def test_a_taught_checkpoint_is_free_of_the_teacher(runs: Runs) -> None:
    taught, plain = runs.checkpoint("real"), runs.checkpoint("plain")
    assert taught["criterion"] is None
    assert taught["model"].keys() == plain["model"].keys()


def test_generate_with_and_without_the_plugin(runs: Runs) -> None:
    arguments = [
        str(runs.data),
        "--path",
        str(runs.root / "real" / "checkpoint_last.pt"),
        "--cpu",
        "--beam",
        "2",
        "--batch-size",
        "12",
        # Some builds of fairseq drop what is left over from multiples of the default, 8.
        "--required-batch-size-multiple",
        "1",
    ]
    with ThreadPoolExecutor(2) as pool:
        with_plugin, without = pool.map(
            lambda extra: run_module("fairseq_cli.generate", [*arguments, *extra]),
            [["--user-dir", str(USER_DIR)], []],
        )
    assert with_plugin.returncode == 0, with_plugin.stderr[-2000:]
    assert with_plugin.stdout.count("\nD-") == 12
    if "Mask Type should be defined" in without.stderr:
        # 0.12.2 by itself takes a fused encoder that torch has changed, unless a flag bars it.
        around = ["--model-overrides", "{'checkpoint_activations': True}"]
        without = run_module("fairseq_cli.generate", [*arguments, *around])
    # torch reads nothing but plain data by default since 2.6, and needs nothing else here.
    assert without.returncode == 0, without.stderr[-2000:]
    assert hypotheses(without) == hypotheses(with_plugin)


def hypotheses(result: Result) -> list[str]:
    return sorted(line for line in result.stdout.splitlines() if line.startswith("D-"))


def one_line_error(result: Result) -> str:
    """Return the one line in which the plugin refused, with exit code 2 and no stack trace."""
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("l2t: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_mistakes_end_in_one_line(
    tmp_path: Path, toy_data: Path, write_teacher: Callable[..., Path]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    entries = (toy_data / "dict.en.txt").read_text().splitlines()
    (other / "dict.en.txt").write_text("\n".join(reversed(entries)) + "\n")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00\x00")
    base = [str(toy_data), *TINY_MODEL, "--cpu", "--optimizer", "adam", "--batch-size", "8",
            "--save-dir", str(tmp_path / "run"), "--criterion", "l2t_dynamic"]  # fmt: skip
    plugin = ["--user-dir", str(USER_DIR)]
    reordered = write_teacher(tmp_path / "reordered.safetensors", other)
    fitting = write_teacher(tmp_path / "fitting.safetensors", toy_data)
    cases = [
        [*base, "--user-dir", str(USER_DIR.parent)],
        [*base, *plugin, "--max-update", "5"],
        [*base, *plugin, "--max-update", "5", "--l2t-teacher", str(reordered)],
        [*base, *plugin, "--l2t-teacher", str(fitting)],
        [*base, *plugin, "--max-update", "5", "--l2t-teacher", str(tmp_path / "short.safetensors")],
    ]
    with ThreadPoolExecutor(2) as pool:
        folder, missing, wrong, endless, cut = pool.map(
            lambda case: run_module("fairseq_cli.train", case), cases
        )
    assert folder.returncode != 0
    assert "--user-dir plugins/l2t_fairseq" in folder.stderr
    assert "--l2t-teacher FILE" in one_line_error(missing)
    assert "does not fit" in one_line_error(wrong)
    assert "--max-update N" in one_line_error(endless)
    assert "cut short" in one_line_error(cut)
