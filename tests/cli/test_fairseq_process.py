"""Following a child: what it has half written, and the lock that lives as long as it."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path

import pytest
import torch

from l2t_cli.applying import fairseq_process
from l2t_cli.applying.fairseq import _claim
from l2t_cli.applying.fairseq_process import run_logged, train_to_end
from l2t_core.errors import UserError
from l2t_core.runs.files import lock
from l2t_fairseq.checkpoints import refuse_cut_short
from l2t_fairseq.commands.train import FairseqCommand


def say_nothing(updates: int, note: str) -> None:
    """Take progress."""


def test_a_line_that_is_half_written_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, seen = tmp_path / "train.log", []
    log.write_text("valid | nll_loss 4.25 | num_updates 1")
    added = iter(["2", "34\nvalid | nll_loss 3.5 | num_upda", "tes 2000"])

    class Child:
        def poll(self) -> int | None:
            text = next(added, None)
            with log.open("a") as handle:
                handle.write(text or "")
            return 0 if text == "tes 2000" else None

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    fairseq_process._follow(
        Child(), log, 0, lambda updates, note: seen.append((updates, note))  # type: ignore[arg-type]
    )
    assert seen == [(1234, "dev nll 4.250"), (2000, "dev nll 3.500")]


def test_one_log_has_one_writer_where_there_are_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, command = tmp_path / "train.log", [sys.executable, "-c", "print('done')"]
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    lock(handle)
    with pytest.raises(UserError, match=r"another run is still writing .*train\.log; wait"):
        run_logged(command, {}, log, say_nothing)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)  # a file system without
    run_logged(command, {}, log, say_nothing)
    os.close(handle)
    assert log.read_text() == "done\n"


STOPS = "Stopping training due to num_updates: 40 >= max_update: 40\n"
EARLY = "early stop since valid performance hasn't improved for last 2 runs\n"
SAVED = "Saved checkpoint c/checkpoint_last.pt (epoch 2 @ 30 updates, score 4.1)\n"


@pytest.mark.parametrize(
    ("said", "updates", "goes_on"),
    [
        ("", 40, True),
        (STOPS, 39, True),  # killed before its last checkpoint was there
        (STOPS, 40, False),  # and after, before it could say so
        (EARLY, 30, True),
        (SAVED + EARLY, 30, True),
        (EARLY + SAVED, 30, False),
        ("2026 | INFO | fairseq_cli.train | done training in 3.1 seconds\n", 30, False),
    ],
)
def test_a_command_killed_behind_its_last_checkpoint_makes_no_further_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, updates: int, goes_on: bool
) -> None:
    settings = {"model": {"arch": "transformer"}}
    history = [{"num_updates": updates}]
    state = {"model": {"w": torch.ones(1)}, "cfg": settings, "optimizer_history": history}
    torch.save(state, tmp_path / "checkpoint_last.pt")
    log, started = tmp_path / "train.log", []
    log.write_text(f"train | num_updates 30\n{said}")
    monkeypatch.setattr(fairseq_process, "run_logged", lambda *words: started.append(words))
    words = ["data", "--max-update", "40", "--save-dir", str(tmp_path)]
    train_to_end(FairseqCommand({}, ["fairseq-train"], words), log, say_nothing)
    assert bool(started) == goes_on


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_half_a_checkpoint_to_go_on_from_is_named(tmp_path: Path, damage: str) -> None:
    last = tmp_path / "checkpoint_last.pt"
    torch.save({"w": torch.ones(9)}, last)
    whole = last.read_bytes()
    last.write_bytes({"empty": b"", "cut": whole[:-9], "text": b"none"}[damage])
    command = FairseqCommand({}, ["fairseq-train"], ["data", "--save-dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"_last\.pt is no checkpoint or is cut short; copy"):
        train_to_end(command, tmp_path / "train.log", say_nothing)
    for others in (whole, b"\x80\x02pickled by an old torch"):
        last.write_bytes(others)
        refuse_cut_short(last, "")
    refuse_cut_short(tmp_path / "none.pt", "")


def test_a_command_is_kept_with_names_as_they_are(tmp_path: Path) -> None:
    _claim(tmp_path / "checkpoints", tmp_path, os.fsdecode(b"fairseq-train d\xe4r"))
    assert (tmp_path / "command.sh").read_bytes() == b"fairseq-train d\xe4r\n"
