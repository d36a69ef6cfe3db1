"""Plans for a trajectory: optimal, within their budget, and refused where nothing fits."""

from __future__ import annotations

from functools import cache

import pytest

from l2t_core.errors import UserError
from l2t_core.hypergradients import checkpointing
from l2t_core.hypergradients.checkpointing import (
    Recompute,
    Reverse,
    first_kept,
    make_plan,
    parse_bytes,
    recomputed_steps,
    split,
    way_back,
)

MIB = 2**20


@cache
def least_forward_steps(steps: int, slots: int) -> int:
    """The fewest forward steps that reverse ``steps``, by trying every place of the next state."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(
        m + least_forward_steps(m, slots) + least_forward_steps(steps - m, slots - 1)
        for m in range(1, steps)
    )


def walk(steps: int, slots: int) -> int:
    """Follow the plan, holding it to its rules; return the steps made again."""
    kept = set(first_kept(steps, slots))
    order, again = [], 0
    for action in way_back(steps, slots):
        assert 0 < len(kept) <= slots
        if isinstance(action, Recompute):
            assert action.start in kept
            again += action.stop - action.start
            kept.add(action.stop)
        elif isinstance(action, Reverse):
            assert action.kept in kept
            order.append(action.step)
            again += action.step - action.kept
        else:
            kept.remove(action.start)
    assert order == list(reversed(range(steps))) and not kept
    return again


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 21, 34])
def test_the_fewest_steps_are_recomputed(steps):
    for slots in range(1, steps + 2):
        again = walk(steps, slots)
        assert again + first_kept(steps, slots)[-1] == least_forward_steps(steps, slots)
        assert again == recomputed_steps(steps, slots)


def test_long_lives():
    assert walk(5000, 100) == recomputed_steps(5000, 100) <= 5000
    assert recomputed_steps(2000, 64) < 2000  # two times the square root of T: one more sweep
    assert walk(2000, 8) == recomputed_steps(2000, 8) < 5 * 2000


def test_a_plan_for_millions_of_states_takes_few_thoughts(monkeypatch):
    """Where most states fit, nearly all of them follow each other."""
    thoughts = []

    def counted(steps, slots):
        thoughts.append(slots)
        return split(steps, slots)

    monkeypatch.setattr(checkpointing, "split", counted)
    for slots in (1, 2, 1000, 2000, 500_000, 999_999):
        recomputed = make_plan(10**6, 10, 10 * slots, spill="none").recomputed
        assert slots == 1 or recomputed < 1000 * 10**6
        assert len(thoughts) < 1500
        thoughts.clear()
    assert recomputed == 1


def test_plans():
    assert make_plan(100, 10, 1000).recomputed == 0
    tight = make_plan(100, 10, 250)
    assert tight.slots == 25 and tight.recomputed == recomputed_steps(100, 25)
    assert "25 kept at a time" in tight.describe()
    spilled = make_plan(100, 10, 250, spill="file", file_free=10_000)
    assert (spilled.spilled, spilled.where, spilled.recomputed) == (75, "file", 0)
    gpu = make_plan(100, 10, 250, on_gpu=True, host_free=10_000, file_free=10_000)
    assert (gpu.spilled, gpu.where) == (75, "host")
    # Three states for 2,000 steps would mean tens of recomputed steps for each.
    assert make_plan(2000, 10, 30, file_free=10**6).where == "file"
    assert make_plan(2000, 10, 30, file_free=100).recomputed > 0
    assert make_plan(0, 10, 250).slots == 0
    # Two recomputed steps for each are the most: 185 of 100 with six states, 221 with five.
    assert make_plan(100, 10, 60, file_free=10**6).recomputed == 185
    assert make_plan(100, 10, 50, file_free=10**6).where == "file"
    # No more than half of what is free is taken.
    assert make_plan(100, 10, 50, file_free=1901).where == "file"
    assert make_plan(100, 10, 50, file_free=1900).recomputed == 221
    assert make_plan(100, 10, 250, on_gpu=True, host_free=1501).where == "host"
    assert make_plan(100, 10, 250, on_gpu=True, host_free=1500).recomputed > 0


def test_impossible_plans_are_refused():
    with pytest.raises(UserError, match="smallest budget that can is 2048KiB"):
        make_plan(100, 2 * MIB, MIB)
    with pytest.raises(UserError, match="smallest budget that can is 41MiB"):
        make_plan(100, 40 * MIB + 1, MIB)
    make_plan(100, 2 * MIB, parse_bytes("2048KiB"))
    with pytest.raises(UserError, match="spill=file needs 750 B"):
        make_plan(100, 10, 250, spill="file", file_free=100)
    with pytest.raises(UserError, match="students on a GPU"):
        make_plan(100, 10, 250, spill="host")


def test_sizes():
    assert parse_bytes("512MiB") == 512 * MIB
    assert parse_bytes("1.5 GB") == 1_500_000_000
    for bad in ("lots", "-1MiB", "", "1.2.3GiB"):
        with pytest.raises(UserError, match="memory="):
            parse_bytes(bad)


def test_a_plan_tells_what_is_held_beside_it():
    plan = make_plan(2000, 6 * 2**20, 2**30, spill="none")
    assert "170 kept at a time (1,020 MiB)" in plan.describe()
    assert plan.describe().endswith("; about 7 more (42 MiB) to work with")
