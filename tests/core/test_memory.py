"""What an episode takes does not grow with its length, whichever way it is held."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from checkout import run_python  # type: ignore[import-not-found]

SCRIPT = Path(__file__).parent / "episode_memory.py"


def peak(steps: int, spill: str) -> int:
    done = run_python(SCRIPT, steps, spill)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="counts in KiB there")
@pytest.mark.parametrize("spill", ["none", "file"])
def test_peak_memory_is_flat(spill: str) -> None:
    """48 more steps: 1,152 MiB of states if kept, 384 MiB of tables."""
    short, long = peak(12, spill), peak(60, spill)
    assert long - short < 32, (short, long)
