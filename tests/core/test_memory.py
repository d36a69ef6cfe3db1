"""The memory of an episode: it does not grow with its length, whichever way it is held."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import run_python  # type: ignore[import-not-found]

from l2t_core.errors import UserError
from l2t_core.hypergradients.checkpointing import WORKING_STATES, make_plan
from l2t_core.hypergradients.trajectory import Slots
from l2t_core.students.flat import FlatParameters

SCRIPT = Path(__file__).parent / "episode_memory.py"


def peaks(steps: int, spill: str, points: int = 1) -> tuple[int, int]:
    """Return the peak of a process, and what of it came on top of the student, in MiB."""
    done = run_python(SCRIPT, steps, spill, points)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, added = done.stdout.split()
    return int(whole), int(added)


@pytest.mark.skipif(sys.platform != "linux", reason="counts in KiB there")
@pytest.mark.parametrize("spill", ["none", "file"])
def test_peak_memory_is_flat(spill: str) -> None:
    """48 more steps: 1,152 MiB of states if kept, 384 MiB of tables."""
    short, long = peaks(12, spill)[0], peaks(60, spill)[0]
    assert long - short < 32, (short, long)


@pytest.mark.skipif(sys.platform != "linux", reason="counts in KiB there")
@pytest.mark.parametrize("spill", ["none", "file"])
def test_no_more_is_held_than_the_plan_says(spill: str) -> None:
    """120 MiB of trajectory, so many states of 24 MiB beside it, and some of the libraries."""
    assert peaks(12, spill)[1] < 120 + WORKING_STATES * 24 + 16


@pytest.mark.skipif(sys.platform != "linux", reason="counts in KiB there")
def test_points_of_the_measure_hold_no_vector_each() -> None:
    """Eleven early readings would hold 88 MiB."""
    assert peaks(12, "none", 12)[0] - peaks(12, "none")[0] < 32


class Filling:
    """As much of ``FlatParameters`` as memory for states asks for."""

    size, vector = 100, torch.zeros(100)

    def empty(self, *shape: int) -> torch.Tensor:
        raise OSError(12, "Cannot allocate memory")


def test_memory_that_the_machine_lacks_is_one_line(tmp_path: Path) -> None:
    plan = make_plan(10, 400, 4000)
    with pytest.raises(UserError, match=r"training\.memory: 3.91 KiB .*allocate.*; lower"):
        Slots(Filling(), 1, False, plan, tmp_path)


def test_host_memory_that_is_not_to_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = FlatParameters(torch.nn.Linear(5, 3))
    plan = make_plan(4, 128, 128, spill="host", on_gpu=True, host_free=2**20)
    assert (plan.spilled, plan.where) == (3, "host")
    Slots(flat, 2, False, plan, tmp_path)
    empty = torch.empty

    def without_pinned(*shape: Any, **options: Any) -> Any:
        if "pin_memory" in options:
            raise RuntimeError("CUDA error: out of memory\nand more")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", without_pinned)
    with pytest.raises(UserError, match=r"spill: 432 B of pinned .*out of memory\); use"):
        Slots(flat, 2, False, plan, tmp_path)


def test_bfloat16_states_are_spilled_to_the_same_bits(tmp_path: Path) -> None:
    flat = FlatParameters(torch.nn.Linear(5, 3).bfloat16())
    slots = Slots(flat, 2, False, make_plan(4, 128, 128, spill="file", file_free=2**20), tmp_path)
    states = torch.randn(4, 2, flat.size).bfloat16()
    for step, state in enumerate(states):
        slots.claim(step).copy_(state)
        slots.seal(step)
    for step in reversed(range(4)):
        assert torch.equal(slots.fetch(step), states[step])
