"""Running the command line inside the test process, and tiny recipes that train in a second."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
from in_process import DIGITS, Outcome, Run  # type: ignore[import-not-found]

from l2t_cli.main import main


def end_the_tests(number: int, frame: object) -> None:
    """Take a signal for what it is: the command, which turns it into advice, runs in pytest.

    ``timeout`` on a slow machine would make whichever test it meets fail of its own accord.
    """
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@pytest.fixture
def l2t(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return ``l2t("recipes", "ls")``, which runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("l2t_cli.main._interrupt", end_the_tests)

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        gc.collect()  # a process that ends has let go of its folder
        streams = capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        return Outcome(code, streams.out, streams.err)

    return run


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Return a tiny digits recipe's file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(DIGITS)
    return path
