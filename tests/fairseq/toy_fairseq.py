"""Running fairseq's commands on a toy corpus: what several test files need."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
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


def run_module(
    module: str, arguments: Sequence[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module arguments`` without anything of this checkout on the path."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


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
