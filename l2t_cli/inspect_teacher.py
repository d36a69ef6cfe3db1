"""``l2t inspect``: what a teacher file holds, and what its teacher says over a student's life."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from l2t_cli.options import TeacherFile
from l2t_cli.screen import console

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MATRIX_CLASSES = 10  # as many columns as a terminal of 80 characters has room for
# So many steps before each point are gone through, about a second's work: twenty times what the
# longest of an LSTM teacher's units remembers at the start.
STEPS_BEFORE_A_POINT = 20_000
PROBABILITIES = (0.01, 0.1, 0.5, 0.9, 0.99)


def command(
    teacher: TeacherFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print the header as JSON.")] = False,
) -> None:
    """Show a teacher file's header and a summary of the coefficients it writes."""
    import dataclasses

    from l2t_core.losses.forms import FORMS, square_parts
    from l2t_core.teachers.file import load_teacher

    network, header = load_teacher(teacher)  # all of it, for JSON, too: its numbers may be damaged
    if as_json:
        print(json.dumps(dataclasses.asdict(header), indent=2, sort_keys=True))
        return
    console.table(str(teacher), ["", ""], [*_header_rows(header), ("parameters", _count(network))])
    times = [f"t/T = {point:g}" for point in POINTS]
    written = _coefficients(network, header)
    console.table(
        "Coefficients φ over a student's life, none of it seen yet (mean ± deviation)",
        ["part", *times],
        _coefficient_rows(written), text=1,
    )
    middle, when = written[len(written) // 2], times[len(times) // 2]
    if FORMS.get(header.loss.form).per_band:
        console.table(
            f"Coefficients by band of classes at {when}, most frequent first",
            ["classes", *middle],
            _band_rows(middle, header.num_classes), text=1,
        )
    if header.num_classes <= MATRIX_CLASSES:
        classes = range(header.num_classes)
        for name, part in square_parts(middle, header.num_classes).items():
            # C means its square: its signs are chance.
            title, what, weights = (
                ("W", "-log p", part) if name == "W" else (f"{name}²", "p", part.square())
            )
            console.table(
                f"{title} at {when}: what the target in front gives to {what} of the class above",
                ["target", *map(str, classes)],
                [[str(y), *(f"{weights[k, y]:.2f}" for k in classes)] for y in classes],
                text=1,
            )
    console.table(
        "How the loss pulls at an example with probability p on its target\n"
        "(cross-entropy: 1; below 0: it pushes p down)",
        ["p", *times],
        _pull_rows(written, header), text=1,
    )


def _count(network: Any) -> str:
    return f"{sum(p.numel() for p in network.parameters()):,}"


def _header_rows(header: Any) -> list[tuple[str, str]]:
    from l2t_core.teachers.file import size_of

    teacher, loss, record = header.teacher, header.loss, header.record
    smoothed = f" smoothed by {loss.warmup_smoothing:g}" if loss.warmup_smoothing else ""
    warmup = f", cross-entropy{smoothed} for the first {loss.warmup_steps} steps"
    warmup = warmup if loss.warmup_steps else ""
    mix = f", {loss.ce_mix:g} of cross-entropy mixed in" if loss.ce_mix else ""
    fitting = size_of(header) + (", and any other number" if header.fits_any_size else "")
    rank = f", rank {loss.rank}" if loss.form == "lowrank" else ""
    rows = [
        (
            "teacher",
            ", ".join([teacher.name, *_sizes(teacher)]),
        ),
        ("sees", ", ".join(header.sees) or "nothing: one loss for the whole training"),
        ("loss", f"{loss.form}{rank}, {loss.sigma}{warmup}{mix}"),
        ("fits", fitting),
        ("trained on students of", f"{header.total_steps:,} steps"),
        ("dev set seen every", f"{header.dev_interval:,} steps"),
    ]
    if checksum := header.fingerprint.get("sha256"):
        rows.append(("fingerprint", str(checksum)))
    measure = record.get("measure", "measure")
    for key, label in (
        ("recipe", "recipe"),
        ("episodes", "episodes run by then"),
        ("episode", "taken from episode"),
        ("version", "made by l2t"),
    ):
        if record.get(key) is not None:
            rows.append((label, str(record[key])))
    if record.get("dev_measure") is not None:
        rows.append((f"dev {measure}", f"{record['dev_measure']:.4f}"))
    return rows


def _sizes(teacher: Any) -> list[str]:
    return {
        "attention": [f"{teacher.slots} slots"],
        "affine": [f"{teacher.slots} units"],
        "timed": [f"{teacher.slots} stretches of a life"],
        "lstm": [f"{teacher.slots} slots", f"{teacher.hidden} units that remember"],
    }.get(teacher.name, [])


def _coefficients(network: Any, header: Any) -> list[Any]:
    """Return φ at each of :data:`POINTS` of a life."""
    import torch

    from l2t_core.students.state import StudentState

    state = StudentState(header.total_steps, header.num_classes, header.teacher.features)
    memory, before, found = next(network.parameters()).new_zeros(network.memory), 0, []
    for last in (round(point * (header.total_steps - 1)) for point in POINTS):
        # A teacher without a memory need not see what lies between.
        first = max(before, last - STEPS_BEFORE_A_POINT) if network.memory else last
        for step in range(first, last + 1):
            features = torch.cat([state.features(step, 0.1).to(memory), memory])
            with torch.no_grad():
                if step == last:
                    found.append(network(features))
                elif step >= header.loss.warmup_steps:
                    memory = network.remember(features)
        before = last
    return found


def _shown(value: Any, digits: int) -> str:
    spread = f" ± {value.std():.3f}" if value.numel() > 1 else ""
    return f"{value.mean():.{digits}f}{spread}"


def _coefficient_rows(written: list[Any]) -> list[list[str]]:
    rows = []
    for name, first in written[0].items():
        shape = "×".join(str(size) for size in first.shape) or "scalar"
        rows.append([f"{name} [{shape}]", *(_shown(phi[name], 4) for phi in written)])
    return rows


def _band_rows(phi: Any, num_classes: int) -> list[list[str]]:
    rows = []
    for band in range(num_classes.bit_length()):
        first, last = 2**band - 1, min(num_classes, 2 ** (band + 1) - 1) - 1
        classes = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        rows.append([classes, *(f"{part[band]:.3f}" for part in phi.values())])
    return rows


def _pull_rows(written: list[Any], header: Any) -> list[list[str]]:
    from l2t_core.losses.forms import FORMS
    from l2t_core.losses.taught import pull_beside_cross_entropy

    # Without a part of phi for each class, one target stands for all.
    most = 64 if FORMS.get(header.loss.form).per_class else 1
    return [
        [f"{p:g}", *(
            _shown(pull_beside_cross_entropy(header.loss, phi, header.num_classes, p, most), 2)
            for phi in written
        )]
        for p in PROBABILITIES
    ]
