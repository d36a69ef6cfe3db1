"""Running fairseq's commands on a toy corpus: what several test files need."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkout import LIMIT, ROOT  # type: ignore[import-not-found]

PLUGINS = ROOT / "plugins"
USER_DIR = PLUGINS / "l2t_fairseq"

# A model small enough for 20 updates in a second.
TINY_MODEL = shlex.split(
    "--arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 "
    "--decoder-embed-dim 16 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2 --dropout 0.1"
)
TINY_RUN = shlex.split(
    "--cpu --optimizer adam --lr 0.003 --lr-scheduler inverse_sqrt --warmup-updates 4 "
    "--batch-size 8 --num-workers 0 --log-format json --log-interval 1 --seed 3 "
    "--save-interval-updates 5 --max-update 20"
)


class WarmPython:
    """Processes forked from a Python that has fairseq imported; see ``warm_server``."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="l2t-warm-"))
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        # Without anything of this checkout on the path.
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            env=clean | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(self.close)

    def start(self, module: str, arguments: Sequence[str], environment: dict[str, str]) -> Running:
        """Start ``python -m module arguments``."""
        base = self.folder / str(next(self._numbers))
        files = {name: f"{base}.{name}" for name in ("out", "err", "pid", "code")}
        request = {"module": module, "arguments": [str(a) for a in arguments],
                   "cwd": str(Path.cwd()), "environment": environment, **files}  # fmt: skip
        assert self.server.stdin is not None
        with self._lock:
            self.server.stdin.write(json.dumps(request).encode() + b"\n")
            self.server.stdin.flush()
        return Running(self.server, [module, *map(str, arguments)], base)

    def close(self) -> None:
        """End the server and remove what the commands printed."""
        with contextlib.suppress(OSError):
            self.server.stdin.close()  # type: ignore[union-attr]
        self.server.wait()
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


@dataclass(frozen=True)
class Running:
    """A command that was started."""

    server: subprocess.Popen[bytes]
    arguments: list[str]
    base: Path

    def output(self) -> str:
        """Return what it has printed so far."""
        path = self.base.with_suffix(".out")
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def ended(self) -> bool:
        """Tell whether it has ended, or can never have."""
        return self.base.with_suffix(".code").exists() or self.server.poll() is not None

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        # It may have ended, or never have been started.
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(self.base.with_suffix(".pid").read_text()), signal.SIGKILL)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return exit code and output."""
        ends = time.monotonic() + LIMIT
        code = self.base.with_suffix(".code")
        while not code.exists():
            if time.monotonic() > ends or self.server.poll() is not None:
                self.kill()
                raise TimeoutError(f"{self.arguments}: {self.output()[-2000:]}")
            time.sleep(0.02)
        err = self.base.with_suffix(".err").read_text(encoding="utf-8", errors="replace")
        return subprocess.CompletedProcess(
            self.arguments, int(code.read_text()), self.output(), err
        )


_warm: list[WarmPython] = []
_starting = threading.Lock()


def start_module(module: str, arguments: Sequence[str], **environment: str) -> Running:
    """Start ``python -m module arguments`` without anything of this checkout on the path."""
    with _starting:
        if not _warm:
            _warm.append(WarmPython())
    return _warm[0].start(module, arguments, environment)


def run_module(
    module: str, arguments: Sequence[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module arguments`` without anything of this checkout on the path."""
    return start_module(module, arguments, **environment).wait()


def toy_corpus() -> dict[str, tuple[list[str], list[str]]]:
    """Return 56 training pairs and 12 each of valid and test: numbered words in two languages."""
    generator = random.Random(7)
    corpus = {}
    for split, size in (("train", 56), ("valid", 12), ("test", 12)):
        pairs = [
            [generator.randrange(12) for _ in range(generator.randint(3, 7))] for _ in range(size)
        ]
        sides = [[" ".join(f"{w}{n}" for n in pair) for pair in pairs] for w in ("wort", "word")]
        corpus[split] = (sides[0], sides[1])
    return corpus
