"""``l2t inspect``: what a teacher file holds, and what its teacher says over a student's life."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from l2t_cli import console
from l2t_cli.options import TeacherFile

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def command(
    teacher: TeacherFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print the header as JSON.")] = False,
) -> None:
    """Show a teacher file's header and a summary of the coefficients it writes."""
    import dataclasses

    from l2t_core.teacher_file import load_header, load_teacher

    if as_json:
        print(json.dumps(dataclasses.asdict(load_header(teacher)), indent=2, sort_keys=True))
        return
    network, header = load_teacher(teacher)
    console.table(str(teacher), ["", ""], [*_header_rows(header), ("parameters", _count(network))])
    console.table(
        "Coefficients φ over the life of a student without statistics (mean ± deviation)",
        ["coefficient", *(f"t/T = {point:g}" for point in POINTS)],
        _coefficient_rows(network, header),
    )


def _count(network: Any) -> str:
    return f"{sum(p.numel() for p in network.parameters()):,}"


def _header_rows(header: Any) -> list[tuple[str, str]]:
    from l2t_core.teacher_file import size_of

    teacher, loss, record = header.teacher, header.loss, header.record
    smoothed = f" smoothed by {loss.warmup_smoothing:g}" if loss.warmup_smoothing else ""
    warmup = f", cross-entropy{smoothed} for the first {loss.warmup_steps} steps"
    warmup = warmup if loss.warmup_steps else ""
    mix = f", {loss.ce_mix:g} of cross-entropy mixed in" if loss.ce_mix else ""
    rank = f", rank {loss.rank}" if loss.form == "lowrank" else ""
    rows = [
        (
            "teacher",
            f"{teacher.name}, {teacher.slots} slots"
            if teacher.name == "attention"
            else teacher.name,
        ),
        ("sees", ", ".join(teacher.features)),
        ("loss", f"{loss.form}{rank}, {loss.sigma}{warmup}{mix}"),
        ("fits", size_of(header)),
        ("trained on students of", f"{header.total_steps:,} steps"),
        ("dev set seen every", f"{header.dev_interval:,} steps"),
    ]
    if checksum := header.fingerprint.get("sha256"):
        rows.append(("fingerprint", str(checksum)))
    measure = record.get("measure", "measure")
    for key, label in (
        ("recipe", "recipe"),
        ("episodes", "episodes until then"),
        ("episode", "taught episode"),
        ("version", "made by l2t"),
    ):
        if record.get(key) is not None:
            rows.append((label, str(record[key])))
    if record.get("dev_measure") is not None:
        rows.append((f"dev {measure}", f"{record['dev_measure']:.4f}"))
    return rows


def _coefficient_rows(network: Any, header: Any) -> list[list[str]]:
    import torch

    from l2t_core.student_state import StudentState

    steps = header.total_steps
    state = StudentState(steps, header.num_classes, header.teacher.features)
    columns: dict[str, list[str]] = {}
    for point in POINTS:
        features = state.features(round(point * (steps - 1)), 0.1)
        with torch.no_grad():
            coefficients = network(features.to(next(network.parameters()).dtype))
        for name, value in coefficients.items():
            spread = f" ± {value.std():.3f}" if value.numel() > 1 else ""
            shape = "×".join(str(size) for size in value.shape) or "scalar"
            columns.setdefault(f"{name} [{shape}]", []).append(f"{value.mean():.4f}{spread}")
    return [[name, *cells] for name, cells in columns.items()]
