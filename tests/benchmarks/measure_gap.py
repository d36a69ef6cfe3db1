"""Does M-tilde say of a translation student what it is judged by?

Students that no training saw live by cross-entropy and under a teacher, at the end of a training on
the demo corpus ("demo-end" of stability.py, whose first lines say how to make the checkpoint); each
has M-tilde and BLEU of greedy output on dev shown::

    python tests/benchmarks/measure_gap.py --data data/demo --rate 0.002 \\
      --teacher runs/stability/demo-end/banded/teacher_last.safetensors

``--measure`` is what M-tilde is, as in stability.py: expected_bleu, or with weights by length
"expected_corpus_bleu, lenpen 1".
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from stability import UNSEEN
from stability_tasks import TASKS

from l2t_core.students.train import train_student
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.file import load_teacher


def main(
    data: Annotated[Path, typer.Option(help="Folder of the demo corpus")],
    teacher: Annotated[Path, typer.Option(help="Teacher file")],
    rate: Annotated[float, typer.Option(help="The students' peak rate")] = 0.002,
    measure: Annotated[str, typer.Option(help="M-tilde")] = "expected_bleu",
) -> None:
    """Print M-tilde and BLEU of the same seeds by cross-entropy and under the teacher."""
    torch.set_num_threads(1)
    student = TASKS["demo-end"].build(data, "linear", rate, measure)
    network, header = load_teacher(teacher)
    changes = []
    for seed in UNSEEN:
        found = []
        for taught in (False, True):
            applied = AppliedTeacher(
                network, header.loss, student.default_features, student.num_classes,
                student.total_steps,
            )
            train_student(student, seed, applied if taught else None)
            with torch.no_grad():
                smoothed = float(student.smoothed_measure(1))
            found.append((smoothed, 100.0 * student.true_measure()))
        (before, bleu), (after, taught_bleu) = found
        changes.append((after - before, taught_bleu - bleu))
        print(
            f"seed {seed}: M-tilde {before:.4f} -> {after:.4f}, BLEU {bleu:.2f} -> "
            f"{taught_bleu:.2f}", flush=True,
        )
    smoothed, bleu = (statistics.mean(c) for c in zip(*changes, strict=True))
    print(f"mean change: M-tilde {smoothed:+.4f}, BLEU {bleu:+.2f}")


if __name__ == "__main__":
    typer.run(main)
