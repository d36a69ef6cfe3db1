"""Running fairseq-train as a child: its full output in a file, a bar on the screen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from l2t_core.errors import UserError
from l2t_core.runs.files import lock
from l2t_fairseq.checkpoints import read_checkpoint, refuse_cut_short
from l2t_fairseq.commands.failure import reason_in
from l2t_fairseq.commands.train import FairseqCommand, save_dir, total_steps

# All log formats of fairseq: `num_updates=100`, `num_updates 100`, `"num_updates": "100"`.
UPDATES = re.compile(r"num_updates[\"']?\s*[=: ]\s*[\"']?(\d+)")
_DEV_NLL = re.compile(r"valid.*?nll_loss[\"']?\s*[=: ]\s*[\"']?(\d+\.?\d*)")
_AT_ITS_END = re.compile(r"\| done training in \d")
_DIVERGED = re.compile(r"FloatingPointError|Minimum loss scale|\bNaN\b|\bNan\b")


def train_to_end(
    command: FairseqCommand, log: Path, on_progress: Callable[[int, str], None]
) -> None:
    """Run a fairseq-train command as :func:`run_logged` does, if it is not at its end already.

    fairseq looks for its end after an update only: given once more, a command that has made its
    ``--max-update`` makes one more, and one that ``--patience`` has ended goes on to its next look
    at dev or further. That goes for one, too, that was killed between its last checkpoint and the
    end.

    Raises:
        UserError: if it cannot be started or fails, or would go on from half a checkpoint.
    """
    folder = save_dir(command)
    if any(folder.glob("checkpoint*.pt")) and _came_to_its_end(command, folder, log):
        return
    refuse_cut_short(
        folder / "checkpoint_last.pt",
        f"copy another one of {folder} over it to go on from there, or delete it to begin anew",
    )
    words = [*this_python(command.program), *command.arguments]
    run_logged(words, command.environment, log, on_progress)


def _came_to_its_end(command: FairseqCommand, folder: Path, log: Path) -> bool:
    if not log.exists():
        return False
    last = early = False
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if _AT_ITS_END.search(line) or (early and "Saved checkpoint " in line):
                return True
            last |= "Stopping training due to num_updates" in line
            early |= "early stop since" in line
    # Both are said before the checkpoints are written, the last of them checkpoint_last.pt.
    return last and _updates_in(folder / "checkpoint_last.pt") >= total_steps(command)


def _updates_in(checkpoint: Path) -> int:
    """Return the updates that a checkpoint was trained for, 0 where it cannot be read."""
    try:
        return int(read_checkpoint(checkpoint)["optimizer_history"][-1]["num_updates"])
    except (UserError, LookupError, TypeError, ValueError):
        return 0


def updates_made(log: Path) -> int:
    """Return the last update that fairseq-train tells of in ``log``, 0 if it tells of none."""
    made = 0
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if found := UPDATES.search(line):
                made = int(found.group(1))
    return made


def run_logged(
    arguments: Sequence[str],
    environment: dict[str, str],
    log: Path,
    on_progress: Callable[[int, str], None],
) -> None:
    """Run a command, appending what it prints to ``log``.

    ``on_progress(updates, note)`` is called as fairseq reports. Ctrl-C ends the child, too.

    Raises:
        UserError: if the command cannot be started or fails; names the reason and the log.
    """
    try:
        handle = log.open("ab")
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}; choose another --out") from None
    with handle:
        try:
            # The child inherits the lock with its output: if we are killed and it lives on, the
            # next start must not write into the same checkpoints beside it.
            lock(handle.fileno())
        except BlockingIOError:
            raise UserError(f"another run is still writing {log}; wait for it or end it") from None
        start = handle.tell()
        try:
            # Into the file, not through a pipe: a child that outlives us must not block or die.
            child = subprocess.Popen(
                list(arguments),
                stdout=handle,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )
        except OSError as error:
            raise UserError(f"cannot run {arguments[0]}: {error.strerror}") from None
        try:
            _follow(child, log, start, on_progress)
        finally:
            _end(child)
    if child.returncode:
        raise UserError(
            f"{_program(arguments)} failed ({reason_in(log, child.returncode, start)}); its full "
            f"output is in {log}"
        )


def _follow(
    child: subprocess.Popen[bytes], log: Path, start: int, on_progress: Callable[[int, str], None]
) -> None:
    note, line = "", ""
    with log.open("r", encoding="utf-8", errors="replace") as reader:
        reader.seek(start)
        while True:
            ended = child.poll() is not None
            for piece in reader:
                line += piece
                if not (line.endswith("\n") or ended):
                    continue  # half a number, so far
                if found := _DEV_NLL.search(line):
                    note = f"dev nll {float(found.group(1)):.3f}"
                if counted := UPDATES.search(line):
                    on_progress(int(counted.group(1)), note)
                line = ""
            if ended:
                return
            time.sleep(0.2)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def lost_its_numbers(error: UserError, log: Path) -> bool:
    """Tell whether :func:`run_logged`, writing into ``log``, failed because a student diverged."""
    # The folders in its path may be called anything.
    return bool(_DIVERGED.search(str(error).replace(str(log), "")))


def this_python(program: Sequence[str]) -> list[str]:
    """Return ``program`` with fairseq's script replaced by this interpreter's fairseq.

    The fairseq-train on the PATH may belong to another environment, without our plugin.
    """
    if list(program) == ["fairseq-train"]:
        return [sys.executable, "-m", "fairseq_cli.train"]
    return list(program)


def _program(arguments: Sequence[str]) -> str:
    for word in arguments:
        if word.startswith("fairseq"):
            return word.replace("fairseq_cli.", "fairseq-")
    return Path(arguments[0]).name
