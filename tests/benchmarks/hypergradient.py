r"""Measure one teacher-training episode against plain training and against other libraries.

An episode is T training steps under a teacher and d M-tilde / d theta through all of them. Each
(student, method, T) has a process of its own, on one thread. There one episode runs first: its
addition to the process's peak memory (beyond interpreter, libraries, student and data) is "MiB
added". Then come ``--repeats`` episodes, each between two runs of T plain training steps
(cross-entropy, torch.optim, fused kernels) of the same student. A ratio is an episode's time over
the mean of its two neighbours'; the table shows the median. "CPU ratio" is the same in CPU time,
which a busy machine disturbs less.

Before anything is timed a method's hypergradient of a few steps in float32 is held against that
of an unrolled graph in float64; one that is further off than 1e-3 of its norm is not timed. What
is left is float32's rounding: up to 1e-4 where that moves an input of a ReLU across zero.

Students: mlp (784-500-10), lenet, resnet8 (batch norm), transformer (1 + 1 layers, 128 wide,
vocabulary 2,000), lstm (256 wide, same vocabulary), on synthetic data. Teacher: static, so that
other libraries can differentiate the same thing. See hypergradient_students.py and
hypergradient_methods.py.

TorchOpt's and higher's own requirements name torch, which is there already::

    pip install --no-deps higher torchopt==0.7.3 graphviz optree
    taskset -c 1 python tests/benchmarks/hypergradient.py --students mlp --steps 200,500

Memory within a bound, whatever T is::

    python tests/benchmarks/hypergradient.py --students mlp --methods "l2t recomputed" \
        --memory 64MiB --steps 200,1000,5000 --repeats 1

``pip install 'l2t[benchmark]'`` installs the same and leaves an installed torch alone.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

STUDENTS = ("mlp", "lenet", "resnet8", "transformer", "lstm")
METHODS = (
    "plain", "l2t kept", "l2t recomputed", "l2t differences", "l2t one-sided",
    "l2t one-sided recomputed", "higher", "torchopt", "torch.func",
)
TOLERANCE = 1e-3
# What is no exact derivative may be further off.
APPROXIMATE = {"l2t differences": 0.1, "l2t one-sided": 0.1, "l2t one-sided recomputed": 0.1}
_CHILD = Path(__file__).with_name("hypergradient_child.py")

Row = dict[str, Any]


def run_child(order: dict[str, Any], limit: float) -> Row:
    """Return the outcome of ``order``, carried out in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(_CHILD), json.dumps(order)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "over the limit", "note": f"more than {limit:g} s"}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    # The kernel's killer, or memory that ran out inside C++.
    if done.returncode == -9 or "bad_alloc" in done.stderr:
        return {"status": "out of memory", "note": f"ended with {done.returncode}"}
    last = (done.stderr.splitlines() or ["no output"])[-1]
    return {"status": "failed", "note": f"ended with {done.returncode}: {last[:200]}"}


def measure_all(
    students: list[str], methods: list[str], all_steps: list[int], repeats: int,
    check_steps: int, memory_cap: float, limit: float, memory: str = "",
) -> Iterator[Row]:
    """Yield one row for each student, method and T, checked before it is timed."""
    for student in students:
        for method in methods:
            order = {"student": student, "method": method, "memory_cap_gib": memory_cap}
            verdict: Row = {"status": "ok"}
            if method != "plain":
                verdict = run_child({**order, "task": "check", "steps": check_steps}, limit)
            agreement = verdict.get("agreement")
            # Written so that NaN disagrees.
            if agreement is not None and not agreement <= APPROXIMATE.get(method, TOLERANCE):
                verdict |= {"status": "disagrees", "note": "not timed"}
            for steps in all_steps:
                row = {"student": student, "steps": steps, "method": method} | verdict
                if verdict["status"] == "ok":
                    if memory and method == "l2t recomputed":
                        order["memory"] = memory
                    job = {**order, "task": "measure", "steps": steps, "repeats": repeats}
                    row |= run_child(job, limit)
                yield row


def table_of(rows: list[Row]) -> Table:
    """Return the rows as a table."""
    table = Table()
    for name in ("student", "T", "method"):
        table.add_column(name)
    for name in ("seconds", "ratio", "CPU ratio", "MiB added", "off by"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        figures = [
            (row["seconds"], "{:.3f}"), (row["ratio"], "{:.2f}"), (row["cpu_ratio"], "{:.2f}"),
            (row["mib_added"], "{:,.0f}"),
        ] if row["status"] == "ok" else []
        shown = [form.format(value) for value, form in figures] or [row["status"], "", "", ""]
        agreement = "" if row.get("agreement") is None else f"{row['agreement']:.0e}"
        table.add_row(
            row["student"], str(row["steps"]), row["method"], *shown, agreement,
            row.get("note", ""),
        )
    return table


def _machine() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in ("torch", "higher", "torchopt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _names(text: str, known: tuple[str, ...], kind: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"unknown {kind} {name!r}; use some of {', '.join(known)}")
    return names


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{text!r} is no list of step numbers; write it like 200,500")
    return counts


def main(
    students: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(STUDENTS),
    steps: Annotated[str, typer.Option(help="T, comma-separated.")] = "200,500",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    repeats: Annotated[int, typer.Option(min=1, help="Episodes that are timed.")] = 5,
    check_steps: Annotated[int, typer.Option(min=1, help="T of the check.")] = 3,
    memory_cap: Annotated[
        float, typer.Option(min=1.0, help="GiB of address space for a process.")
    ] = 12.0,
    limit: Annotated[float, typer.Option(help="Seconds that a process may take.")] = 900.0,
    memory: Annotated[
        str, typer.Option(help="For l2t recomputed, as 64MiB; else the root of 2 T states.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where to write everything measured.")
    ] = None,
) -> None:
    """Time a teacher-training episode beside plain training and other libraries."""
    chosen = _names(students, STUDENTS, "student"), _names(methods, METHODS, "method")
    counts = _counts(steps)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file has no width of its own
    rows: list[Row] = []
    total = len(chosen[0]) * len(chosen[1]) * len(counts)
    with Console(stderr=True).status(f"0 of {total}") as status:
        for row in measure_all(
            *chosen, counts, repeats, check_steps, memory_cap, limit, memory
        ):
            rows.append(row)
            status.update(f"{len(rows)} of {total}: {row['student']}, {row['method']}")
            if json_file is not None:  # after each row: an interrupted run keeps what it has
                settings = {"repeats": repeats, "check_steps": check_steps, "limit": limit,
                            "memory_cap_gib": memory_cap, "tolerance": TOLERANCE}
                report = {"machine": _machine(), "settings": settings, "rows": rows}
                json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(table_of(rows))


if __name__ == "__main__":
    typer.run(main)
