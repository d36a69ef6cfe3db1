"""What one process of the benchmark does: check one method, or time it beside plain training."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from typing import Any

import torch
from cost import peak_mib
from hypergradient_methods import (
    METHODS,
    Method,
    Prepared,
    l2t_within,
    make_teacher,
    plain,
    torch_func,
)
from hypergradient_students import TASKS, SyntheticStudent, Task, tiny
from torch import Tensor

_WARM_UP = 3  # steps


def _flat(gradient: list[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradient]).double()


def check(student: str, method: str, steps: int) -> dict[str, Any]:
    """Return how far the method's float32 hypergradient is from the whole graph's in float64."""
    eps_form = "higher" if method == "higher" else "torch"
    exact = SyntheticStudent(TASKS[student], steps, torch.float64, eps_form)
    reference = _flat(torch_func(exact, make_teacher(exact)).run())
    single = SyntheticStudent(TASKS[student], steps)
    found = _flat(METHODS[method](single, make_teacher(single)).run())
    return {"agreement": float((found - reference).norm() / reference.norm())}


def _timed(prepared: Prepared) -> tuple[float, float, list[Tensor]]:
    """Return one run's seconds, its seconds of CPU time, and its hypergradient."""
    prepared.begin()
    wall, cpu = time.perf_counter(), time.process_time()
    gradient = prepared.run()
    return time.perf_counter() - wall, time.process_time() - cpu, gradient


def measure(
    student: str, method: Method, steps: int, repeats: int
) -> dict[str, Any]:
    """Time episodes of ``steps``, each between two runs of plain training.

    The first episode is not among the measurements; the memory is what it adds to the process as
    it stood before the first step of the student.
    """
    task = TASKS[student]

    def prepare(make: Method, count: int, task: Task = task) -> Prepared:
        fresh = SyntheticStudent(task, count)
        return make(fresh, make_teacher(fresh))

    # Libraries load parts of themselves in the first steps, which is no method's memory.
    for make in (plain, method):
        _timed(prepare(make, _WARM_UP, tiny(task)))
    chosen, beside = prepare(method, steps), prepare(plain, steps)
    before = peak_mib()
    first, _, gradient = _timed(chosen)
    after = peak_mib()
    _timed(prepare(plain, _WARM_UP))
    sides = [_timed(beside)]
    middles = []
    for _ in range(repeats):
        middles.append(_timed(chosen)[:2])
        sides.append(_timed(beside))
    pairs = list(zip(middles, sides, sides[1:], strict=False))
    norm = float(_flat(gradient).norm()) if gradient else None
    return {
        "first_seconds": first,
        "all_seconds": [m[0] for m in middles],
        "all_plain_seconds": [s[0] for s in sides],
        "seconds": statistics.median(m[0] for m in middles),
        "ratio": statistics.median(2 * m[0] / (a[0] + b[0]) for m, a, b in pairs),
        "cpu_ratio": statistics.median(2 * m[1] / (a[1] + b[1]) for m, a, b in pairs),
        "mib_before": before,
        "mib_added": after - before,
        "mib_peak": peak_mib(),
        "hypergradient_norm": norm,
        "note": chosen.note,
    }


def main(order: str) -> None:
    """Do what ``order``, a JSON object, says and print the outcome as the last line."""
    job = json.loads(order)
    torch.set_num_threads(1)
    cap = int(job["memory_cap_gib"] * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    student, method, steps = job["student"], job["method"], job["steps"]
    try:
        if job["task"] == "check":
            outcome = check(student, method, steps)
        else:
            # What a method may hold is told only where it is to be something else than usual.
            chosen = l2t_within(job["memory"]) if job.get("memory") else METHODS[method]
            outcome = measure(student, chosen, steps, job["repeats"])
        outcome["status"] = "ok"
    except ModuleNotFoundError as error:
        outcome = {"status": "not installed", "note": str(error)}
    except (MemoryError, RuntimeError) as error:
        line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        outcome = {"status": "failed", "note": line}
        if isinstance(error, MemoryError) or "allocate memory" in line:
            cap_note = f"more than {job['memory_cap_gib']:g} GiB"
            outcome = {"status": "out of memory", "note": cap_note}
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
