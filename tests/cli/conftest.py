"""Running the command line inside the test process, and tiny recipes that train in a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from l2t_cli.main import main

DIGITS = """\
field: image
description: the smallest run that is one
image:
  data: digits
  model: mlp
  hidden: 16
  dev_size: 300
  batch_size: 32
  steps: 24
  dev_interval: 8
  dev_batch: 64
  optimiser: {name: momentum, lr: 0.1, momentum: 0.9}
  schedule: {name: linear}
  measure: log_likelihood
loss: {form: diagonal, sigma: softplus}
teacher: {slots: 2}
training: {episodes: 2, lr: 0.003, seed: 3}
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the one line of a user's mistake, after checking that it is one."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("l2t: error: "), self.err
        return lines[0]


Run = Callable[..., Outcome]


@pytest.fixture
def l2t(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return ``l2t("recipes", "ls")``, which runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
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
