"""What the command does about its streams, and about signals while it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import end_of, environment, start_python  # type: ignore[import-not-found]

FULL = Path("/dev/full")

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_interpreter_ends_shows_no_stack_trace(
    tmp_path: Path, number: signal.Signals
) -> None:
    # As a library has it done that the command imports: torch's clean-up takes a while.
    code = (
        "import atexit, signal\n"
        "from l2t_cli.__main__ import main\n"
        f"atexit.register(lambda: signal.raise_signal({number.value}))\n"
        "main()\n"
    )
    child = start_python("-c", code, "user-dir", "--no", cwd=tmp_path)
    out, err = end_of(child)
    assert (child.returncode, out) == (-number, "")
    assert err.splitlines() == ["l2t: error: no option '--no' (see `l2t user-dir --help`)"]


def test_ctrl_c_once_more_while_a_command_is_left_shows_no_stack_trace(tmp_path: Path) -> None:
    # What the command has open is closed as its frames go, after the first one has been told.
    code = (
        "import signal, weakref\n"
        "import l2t_cli.doctor\n"
        "from l2t_cli.__main__ import main\n"
        "from l2t_cli.errors import Interrupted\n"
        "class Open: pass\n"
        "def cores():\n"
        "    held = Open()\n"
        "    weakref.finalize(held, signal.raise_signal, signal.SIGINT)\n"
        "    raise Interrupted('all is kept')\n"
        "l2t_cli.doctor.cores = cores\n"
        "main()\n"
    )
    child = start_python("-c", code, "doctor", cwd=tmp_path)
    _, err = end_of(child)
    assert (child.returncode, err) == (-signal.SIGINT, "l2t: interrupted: all is kept\n")


PRINTING = [("recipes", "show", "digits"), ("recipes", "ls"), ("--version",)]


@pytest.mark.parametrize("words", PRINTING)
def test_output_that_goes_to_a_full_disk_is_one_line(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "l2t_cli", *words], cwd=tmp_path, env=environment(),
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )
    said = "l2t: error: No space left on device; free some space where the output goes\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_an_error_that_cannot_be_told_has_its_exit_code(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "l2t_cli", "recipes", "show", "none"], cwd=tmp_path,
            env=environment(), stdout=full, stderr=full, check=False,
        )
    assert done.returncode == 2


def test_a_command_without_streams_writes_into_no_file_of_its_own(tmp_path: Path) -> None:
    # As under a batch system that closes all three: the first file opened would be stdout.
    code = (
        "import os, sys\n"
        "for fd in (0, 1, 2): os.close(fd)\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        "from l2t_cli.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "with open('left', 'w') as file: file.write(f'{code} {file.fileno() > 2}')\n"
    )
    end_of(start_python("-c", code, "recipes", "ls", cwd=tmp_path))
    assert (tmp_path / "left").read_text() == "0 True"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "d\\xfc\\udcff"), ("utf-8", "dü\\udcff")]
)
def test_a_name_that_the_output_cannot_hold_is_shown_in_escapes(
    tmp_path: Path, encoding: str, shown: str
) -> None:
    child = start_python(
        "-m", "l2t_cli", "recipes", "cp", "digits", "dü\udcff.yaml", cwd=tmp_path,
        PYTHONIOENCODING=encoding, PYTHONUTF8="1",
    )
    out, err = end_of(child)
    assert (child.returncode, err) == (0, "") and f"{shown}.yaml" in out
