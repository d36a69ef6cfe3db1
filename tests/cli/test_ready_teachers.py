"""The teachers that come with l2t: what they are, and every command takes them by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Run, write_teacher  # type: ignore[import-not-found]

from l2t_cli.ready_teachers import USES
from l2t_core import TaughtLoss
from l2t_core.errors import UserError
from l2t_core.teachers.file import load_teacher
from l2t_core.teachers.ready import find_teacher, ready_teachers

THREE = """\
import numpy as np

def three(folder, train):
    labels = np.arange(300 if train else 60) % 3
    images = np.random.default_rng(int(train)).integers(0, 100, (len(labels), 6, 6), np.uint8)
    for label in range(3):
        images[labels == label, label] += 100
    return images, labels
"""


def test_they_are_whole_fit_any_number_of_classes_and_say_what_for() -> None:
    assert set(ready_teachers()) == set(USES)
    for path in ready_teachers().values():
        header = load_teacher(path)[1]
        assert header.fits_any_size and header.record["recipe"]


def test_every_command_takes_one_by_name(l2t: Run, tmp_path: Path, monkeypatch: Any) -> None:
    """On three classes, where it was trained on ten."""
    (tmp_path / "classes.py").write_text(THREE)
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = [
        "image.data=classes:three", "image.dev_size=60", "image.steps=30", "image.dev_interval=10",
    ]
    done = l2t("apply-teacher", "wrong-labels", "digits", *changes, "--out", "taught")
    assert done.code == 0, done.err
    assert (tmp_path / "taught/taught/seed-1/student.pt").exists()
    grid = ["compare.losses=[cross_entropy]", "compare.lr=[0.05,0.1]", "compare.trials=2"]
    grid += ["compare.seeds=2", "compare.tuning_seeds=1"]
    for asked in (["--teacher", "wrong-labels"], ["compare.teachers=[wrong-labels]"]):
        shown = l2t("compare", "digits", *changes, *grid, *asked, "--dry-run")
        assert shown.code == 0 and "taught" in shown.out, shown.err
    swapped = l2t("apply-teacher", "digits", "wrong-labels").error()
    assert "wrong-labels is a teacher and no recipe; write `l2t apply-teacher TEACHER" in swapped
    assert l2t("transfer", "wrong-labels", "digits", *changes, *grid, "--dry-run").code == 0
    assert "any other number" in l2t("inspect", "wrong-labels").out


def test_one_is_copied_for_ones_own_loop(l2t: Run, tmp_path: Path) -> None:
    listed = l2t("teachers", "ls")
    assert listed.code == 0 and all(name in listed.out for name in ready_teachers())
    assert l2t("teachers", "cp", "wrong-labels", tmp_path).code == 0
    copy = tmp_path / "wrong-labels.safetensors"
    assert copy.read_bytes() == ready_teachers()["wrong-labels"].read_bytes()
    assert "exists" in l2t("teachers", "cp", "wrong-labels", copy).error()
    assert l2t("teachers", "cp", "wrong-labels", copy, "--force").code == 0
    assert "ends in .safetensors" in l2t("teachers", "cp", "wrong-labels", "t.pt").error()
    line = l2t("teachers", "cp", "wrong-label", tmp_path).error()
    assert "did you mean 'wrong-labels'" in line
    # A label that the student finds unlikely pulls less than cross-entropy's, in any number.
    logits = torch.zeros(2, 40, requires_grad=True)
    with torch.no_grad():
        logits[:, 0] = 9.0
    loss = TaughtLoss(copy, 10, num_classes=40)(logits, torch.tensor([1, 1]))
    (pull,) = torch.autograd.grad(loss, logits)
    assert 0.0 < -float(pull[:, 1].sum()) < 0.7


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_teacher("wrong-labels") == ready_teachers()["wrong-labels"]
    write_teacher(Path("wrong-labels"), 5)
    assert find_teacher("wrong-labels") == Path("wrong-labels")
    for path in ("gone.safetensors", "runs/wrong-labels", "gone"):
        assert find_teacher(path) == Path(path)  # told of by who reads it
    with pytest.raises(UserError, match="none that comes with l2t; did you mean 'wrong-labels'"):
        find_teacher("wrong-lables")
