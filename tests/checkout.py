"""Programs that tests start in processes of their own, on the code of this checkout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with the checkout's packages in reach, and ``more``."""
    paths = os.pathsep.join([str(ROOT / "plugins"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, **more}


def run_python(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment(), capture_output=True,
        text=True, check=False,
    )


def start_python(
    *arguments: object, cwd: Path | None = None, **more: str
) -> subprocess.Popen[str]:
    """Start ``python ARGUMENTS``, with ``more`` in its environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment(**more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # As at a terminal: tests that are run in the background have Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], Any], child: subprocess.Popen[str]) -> None:
    """Wait until ``condition`` holds; fail if ``child`` ends before, or after five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def interrupt(child: subprocess.Popen[str], number: int, kept: str) -> None:
    """Send signal ``number`` to an l2t command; it must say what is ``kept`` and how to go on."""
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    if child.returncode != 0:  # it may have finished before the signal came
        assert child.returncode == 130
        said = f"l2t: interrupted: {kept}; the same command continues"
        assert errors.splitlines() == [said]
