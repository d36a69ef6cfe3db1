"""A run that was killed and started again is the run that was not killed, to the bit."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_fairseq import USER_DIR, run_module, start_module
from toy_runs import STEPS, Runs, same_parameters

from l2t_core.teachers.file import load_header
from l2t_fairseq.commands.taught import resumable, teach_command
from l2t_fairseq.commands.train import FairseqCommand, has_flag, with_value

pytest.importorskip("fairseq")

from l2t_fairseq.checkpoints import save_plainly


def updates(output: str) -> dict[int, dict[str, str]]:
    """Return what was logged of each update, without times and speeds; the last one counts."""
    found = {}
    for line in output.splitlines():
        if re.search(r"\| train_inner \| \{.*\}$", line):
            entry = json.loads(line[line.index("{") :])
            slow = ("wps", "ups", "wall")
            found[int(entry["num_updates"])] = {
                k: v for k, v in entry.items() if not k.endswith(slow)
            }
    return found


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)


def teacher_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["extra_state"]["train_iterator"]["l2t"]


def test_killed_at_random_updates(runs: Runs, tmp_path: Path) -> None:
    """Three kills somewhere in or after random updates, with nothing but checkpoints kept."""
    draw = random.Random(5)
    command = with_value(runs.taught("real"), "--save-dir", str(tmp_path))
    command = with_value(command, "--save-interval-updates", "2")
    logged: dict[int, dict[str, str]] = {}
    for target in sorted(draw.sample(range(3, STEPS - 2), 3)):
        running = start_module("fairseq_cli.train", command.arguments)
        while f'"num_updates": "{target}"' not in running.output() and not running.ended():
            time.sleep(0.005)
        running.kill()
        killed = running.wait()
        assert killed.returncode in (0, -signal.SIGKILL), killed.stderr[-2000:]
        logged |= updates(killed.stdout)
    done = run_module("fairseq_cli.train", command.arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    logged |= updates(done.stdout)
    whole = runs.checkpoint("real")
    assert same_parameters(last(tmp_path), whole)
    assert teacher_state(last(tmp_path)) == teacher_state(whole)
    assert logged == updates(runs.results["real"].stdout)


@pytest.mark.parametrize(
    ("file", "first"),
    [("checkpoint_1_5.pt", 6), ("checkpoint_3_15.pt", 16), ("checkpoint1.pt", 8),
     ("checkpoint2.pt", 15)],
)  # fmt: skip
def test_from_every_kind_of_checkpoint(
    runs: Runs, tmp_path: Path, file: str, first: int
) -> None:
    """In mid-epoch and at an epoch's end, as the file that fairseq looks for itself."""
    shutil.copy(runs.root / "real" / file, tmp_path / "checkpoint_last.pt")
    command = with_value(runs.taught("real"), "--save-dir", str(tmp_path))
    done = run_module("fairseq_cli.train", command.arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = updates(runs.results["real"].stdout)
    assert updates(done.stdout) == {k: v for k, v in whole.items() if k >= first}
    assert same_parameters(last(tmp_path), runs.checkpoint("real"))
    assert teacher_state(last(tmp_path)) == teacher_state(runs.checkpoint("real"))


def test_running_averages_and_grouped_updates_resume_too(runs: Runs, tmp_path: Path) -> None:
    flags = ["--store-ema", "--ema-decay", "0.9", "--update-freq", "2",
             "--encoder-layerdrop", "0.2", "--save-interval-updates", "3",
             "--max-update", "9"]  # fmt: skip
    command = FairseqCommand({}, [], [*runs.taught("real").arguments, *flags])
    (tmp_path / "resumed").mkdir()
    for name in ("whole", "resumed"):
        if name == "resumed":
            half = tmp_path / "whole/checkpoint_1_3.pt"
            shutil.copy(half, tmp_path / "resumed/checkpoint_last.pt")
        done = run_module(
            "fairseq_cli.train", with_value(command, "--save-dir", str(tmp_path / name)).arguments
        )
        assert done.returncode == 0, done.stderr[-2000:]
    whole, resumed = last(tmp_path / "whole"), last(tmp_path / "resumed")
    assert teacher_state(whole) == teacher_state(resumed)
    assert teacher_state(whole)["applied"]["step"] == 9
    assert same_parameters(whole, resumed)
    averages = [checkpoint["extra_state"]["ema"] for checkpoint in (whole, resumed)]
    assert same_parameters({"model": averages[0]}, {"model": averages[1]})
    assert not same_parameters(whole, {"model": averages[0]})


@pytest.mark.parametrize("flags", [["--curriculum", "2"], ["--update-ordered-indices-seed"]])
def test_batches_that_follow_the_epoch_are_found_again(
    runs: Runs, tmp_path: Path, flags: list[str]
) -> None:
    """fairseq keeps the first epoch's batches; a resumed run would keep others."""
    plain = FairseqCommand({}, [], [*runs.plain().arguments, *flags])
    teacher = runs.teachers["real"]
    taught = teach_command(plain, teacher, load_header(teacher), USER_DIR)
    assert "--update-epoch-batch-itr True" in taught.changes
    assert has_flag(resumable(plain, USER_DIR), "--update-epoch-batch-itr")
    (tmp_path / "resumed").mkdir()
    for name in ("whole", "resumed"):
        if name == "resumed":
            at_end = tmp_path / "whole/checkpoint2.pt"
            shutil.copy(at_end, tmp_path / "resumed/checkpoint_last.pt")
        command = with_value(taught.command, "--save-dir", str(tmp_path / name))
        done = run_module("fairseq_cli.train", command.arguments)
        assert done.returncode == 0, done.stderr[-2000:]
    whole, resumed = last(tmp_path / "whole"), last(tmp_path / "resumed")
    assert same_parameters(whole, resumed)
    assert teacher_state(whole) == teacher_state(resumed)


@pytest.mark.parametrize("taught", [True, False])
def test_patience_goes_on_where_it_was(runs: Runs, tmp_path: Path, taught: bool) -> None:
    """Chosen by the greatest loss, which is the first: 6 looks at dev later, update 14, it ends."""
    command = runs.taught("real") if taught else resumable(runs.plain(), USER_DIR)
    command = with_value(command, "--validate-interval-updates", "4")
    more = ["--patience", "6", "--maximize-best-checkpoint-metric"]
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    for folder in folders:
        folder.mkdir()
        if folder.name == "resumed":
            shutil.copy(folders[0] / "checkpoint_2_10.pt", folder / "checkpoint_last.pt")
        words = with_value(command, "--save-dir", str(folder)).arguments
        done = run_module("fairseq_cli.train", [*words, *more])
        assert done.returncode == 0, done.stderr[-2000:]
        assert max(updates(done.stdout)) == 14
    assert same_parameters(*map(last, folders))


def test_a_kill_while_a_checkpoint_is_copied_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fairseq import checkpoint_utils

    save_plainly()
    first, last = tmp_path / "checkpoint_2_4.pt", tmp_path / "checkpoint_last.pt"
    first.write_bytes(b"new" * 1000)
    last.write_bytes(b"old")

    def killed(source: str, target: str) -> None:
        Path(target).write_bytes(b"ne")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", killed)
        patch.setattr("fairseq.file_io.IOPathManager", None)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_utils.PathManager.copy(str(first), str(last), overwrite=True)
    assert last.read_bytes() == b"old"
    assert checkpoint_utils.PathManager.copy(str(first), str(last), overwrite=True)
    assert last.read_bytes() == first.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, last]


def test_a_state_that_a_flag_leaves_out_is_told(runs: Runs, tmp_path: Path) -> None:
    shutil.copy(runs.root / "real/checkpoint_2_10.pt", tmp_path / "checkpoint_last.pt")
    command = with_value(runs.taught("real"), "--save-dir", str(tmp_path))
    done = run_module("fairseq_cli.train", [*command.arguments, "--reset-dataloader"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "starts anew at update 10; it is kept with the train iterator" in done.stdout


@pytest.mark.parametrize("flag", ["--no-save-optimizer-state", "--reset-optimizer"])
def test_a_run_that_fairseq_counts_from_0_again_says_why(
    runs: Runs, tmp_path: Path, flag: str
) -> None:
    shutil.copy(runs.root / "real/checkpoint_2_10.pt", tmp_path / "checkpoint_last.pt")
    command = with_value(runs.taught("real"), "--save-dir", str(tmp_path))
    if flag.startswith("--no-save"):  # as a first run with the flag leaves it
        whole = last(tmp_path)
        del whole["last_optimizer_state"]
        torch.save(whole, tmp_path / "checkpoint_last.pt")
    done = run_module("fairseq_cli.train", [*command.arguments, flag])
    assert done.returncode == 0, done.stderr[-2000:]
    assert min(updates(done.stdout)) == 1 and max(updates(done.stdout)) == STEPS
    line = next(li for li in done.stdout.splitlines() if "starts anew" in li)
    assert "at update 0;" in line and flag in line
    assert teacher_state(last(tmp_path))["applied"]["step"] == STEPS
