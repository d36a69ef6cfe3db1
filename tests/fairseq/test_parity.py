"""The student that teachers are trained on is the student that fairseq-train trains."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy_fairseq import TINY_MODEL, USER_DIR, run_module

from l2t_core.students.train import train_student
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.file import load_header
from l2t_fairseq.commands.taught import teach_command
from l2t_fairseq.commands.train import FairseqCommand

pytest.importorskip("fairseq")

STEPS = 18
# Two batches an update, clipping and dropout; the model as in TINY_MODEL, embeddings shared.
RUN = shlex.split(
    "--share-all-embeddings --optimizer adam --lr 0.003 --lr-scheduler inverse_sqrt "
    "--warmup-updates 4 --batch-size 8 --update-freq 2 --clip-norm 1.0 --cpu"
)


def trained_otherwise(data: Path, folder: Path) -> Path:
    """Return a checkpoint of the same model, of another seed and after other batches."""
    words = [str(data), *TINY_MODEL, *RUN, "--seed", "5", "--max-update", "6"]
    done = run_module("fairseq_cli.train", [*words, "--save-dir", str(folder)])
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "checkpoint_last.pt"


@pytest.mark.parametrize("start", ["scratch", "checkpoint"])
def test_both_lives_of_a_student_are_one(
    prepared_toy: Path, tmp_path: Path, write_teacher: Callable[..., Path], start: str
) -> None:
    from l2t_fairseq.recipe import NmtSpec
    from l2t_fairseq.students.nmt import build_student

    data = prepared_toy / "data-bin"
    # Refreshed every 5 of 18 updates; fairseq validates at each epoch's end (4 updates), too.
    teacher = write_teacher(
        tmp_path / "teacher.safetensors", data, form="lowrank", warmup_steps=2,
        total_steps=STEPS, dev_interval=5,
    )  # fmt: skip
    words = [*TINY_MODEL, *RUN]
    if start == "checkpoint":
        words += ["--finetune-from-model", str(trained_otherwise(data, tmp_path / "start"))]
    spec = NmtSpec(data=str(prepared_toy), train=shlex.join(words), steps=STEPS, dev_interval=5)
    student = build_student(spec)
    applied = AppliedTeacher.from_file(teacher, STEPS)
    train_student(student, 1, applied)

    arguments = [str(data), *words, "--max-update", str(STEPS)]
    command = FairseqCommand({}, [], [*arguments, "--save-dir", str(tmp_path / "run")])
    command = teach_command(command, teacher, load_header(teacher), USER_DIR).command
    done = run_module("fairseq_cli.train", command.arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    # A file that we wrote ourselves.
    saved = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=False)

    here = applied.state_dict()
    there = saved["extra_state"]["train_iterator"]["l2t"]["applied"]
    assert here["step"] == there["step"] == STEPS
    for split in ("train", "dev"):
        for name in ("nll", "accuracy"):
            value = here["state"][split][name]
            assert value == pytest.approx(there["state"][split][name], rel=1e-4), (split, name)
    for name, parameter in student.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), saved["model"][name], rtol=0, atol=1e-3)
