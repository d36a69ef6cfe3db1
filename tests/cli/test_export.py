"""``l2t export``: what it prints, writes and refuses."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from in_process import Run  # type: ignore[import-not-found]


def checkpoint(
    path: Path, value: float, arch: str = "transformer", task: str = "l2t_translation"
) -> Path:
    """Write a small checkpoint with one parameter."""
    cfg = {"model": Namespace(arch=arch, user_dir="plugins/l2t_fairseq"),
           "task": {"_name": task}, "criterion": {"_name": "l2t_dynamic"}}  # fmt: skip
    history = [{"num_updates": 1200, "optimizer_name": "FairseqAdam"}]
    state = {"model": {"w": torch.full((2, 3), value)}, "cfg": cfg, "optimizer_history": history}
    torch.save(state, path)
    return path


def test_one_checkpoint_or_the_mean_of_several(l2t: Run, tmp_path: Path) -> None:
    one, two = checkpoint(tmp_path / "1.pt", 1.0), checkpoint(tmp_path / "2.pt", 4.0)
    outcome = l2t("export", one, "--to", "out/student.pt")
    assert outcome.code == 0 and outcome.err == ""
    assert outcome.out == (
        "out/student.pt: transformer, 6 parameters, 1,200 updates; task translation, "
        "criterion cross_entropy\n"
    )
    assert "exists" in l2t("export", one, two, "--to", "out/student.pt").error()
    assert l2t("export", one, two, "--to", "out/student.pt", "--force").code == 0
    exported = torch.load("out/student.pt", weights_only=True)
    assert exported["model"]["w"].tolist() == [[2.5] * 3] * 2
    assert exported["cfg"]["model"] == {"arch": "transformer", "user_dir": None}


def test_parts_of_the_users_own_plugin_are_told(l2t: Run, tmp_path: Path) -> None:
    own = checkpoint(tmp_path / "1.pt", 1.0, "no_ones_arch", "no_ones_task")
    outcome = l2t("export", own, "--to", "student.pt")
    assert outcome.code == 0 and outcome.err == ""
    first, note = outcome.out.splitlines()
    assert "no_ones_arch" in first and "task no_ones_task, criterion cross_entropy" in first
    assert "no --arch no_ones_arch and no --task no_ones_task" in note and "--user-dir" in note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.pt", "--to", "x.pt"], "gone.pt"),
        (["1.pt"], "--to"),
        (["1.pt", "--to", "x.pt", "--ema"], "--store-ema"),
        (["1.pt", "--to", "1.pt", "--force"], "is a checkpoint to read"),
        (["1.pt", "text", "--to", "x.pt"], "text is no checkpoint"),
        (["--to", "x.pt"], "CHECKPOINT"),
    ],
)
def test_mistakes_are_one_line(
    l2t: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    checkpoint(tmp_path / "1.pt", 1.0)
    (tmp_path / "text").write_text("not a checkpoint")
    assert message in l2t("export", *arguments).error()
    assert not (tmp_path / "x.pt").exists()
