"""What holds for every test: no settings of the shell it is started from, and fixed seeds."""

from __future__ import annotations

import os
import random
import sys

import pytest

# Set by terminals, CI services and batch systems: the width and the colours of what is printed,
# and a group of processes to wait for. Taken away before any module of ours, or of rich, looks.
OF_THE_SHELL = (
    "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)
for _name in OF_THE_SHELL:
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Let a test draw the same numbers alone as after others; those of numpy differ by the run."""
    random.seed(1)
    # A test that draws from these has imported them with its module.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(1)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1)
