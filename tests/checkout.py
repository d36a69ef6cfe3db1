"""Programs that tests start in processes of their own, on the code of this checkout."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900.0  # seconds that no command takes, however busy the machine


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


def end_of(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Return what a program has printed on both streams when it ends."""
    try:
        return child.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        child.kill()
        raise


def check_interrupted(child: subprocess.Popen[str], kept: str) -> None:
    """Let an l2t command end that a signal meets; it must say what is ``kept``, how to go on."""
    _, errors = end_of(child)
    said = f"l2t: interrupted: {kept}; the same command continues"
    assert (child.returncode, errors.splitlines()) == (130, [said])


@contextmanager
def reserved_port() -> Iterator[int]:
    """Give a free port for processes to meet at, which no other program is given meanwhile."""
    with socket.socket() as held:
        # Bound and not listening, so that those who reuse addresses, and only they, can take it.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
