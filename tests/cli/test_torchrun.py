"""Teacher training under torchrun: the same result, one line for one mistake, and going on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkout import start_python, wait_for  # type: ignore[import-not-found]
from in_process import Run  # type: ignore[import-not-found]

from l2t_core.teacher_file import load_teacher

SIZE = [
    "training.students=2", "training.episodes=12", "training.finalists=2",
    "training.final_students=3",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = (*TORCHRUN, "-m", "l2t_cli", "train-teacher", *arguments)
    return start_python(*command, cwd=folder, OMP_NUM_THREADS="1")


def our_lines(text: str) -> list[str]:
    """Return what we said; torchrun adds a report of its own."""
    return [line for line in text.splitlines() if line.startswith("l2t: ")]


def children(of: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{of}/task/{of}/children").read_text().split()]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun gives each of its processes: another number of threads has other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find a rank")
def test_a_lost_process_ends_the_run_and_one_process_goes_on(
    l2t: Run, digits: Path, one_thread: None
) -> None:
    folder = digits.parent
    assert l2t("train-teacher", digits, *SIZE, "--out", "whole").code == 0
    process = start(folder, digits, *SIZE, "--out", "parts")
    log = folder / "parts/metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, process)
    for child in children(process.pid):
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            os.kill(child, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert "2 processes share the students" in out
    assert process.returncode != 0
    (line,) = our_lines(err)
    assert "another" in line and "lost" in line, line
    assert "the same command continues" in line
    assert 2 <= len(log.read_text().splitlines()) < 13 + 2
    assert l2t("train-teacher", digits, *SIZE, "--out", "parts").code == 0
    for name in ("teacher_best.safetensors", "teacher_last.safetensors"):
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find a rank")
def test_a_process_lost_in_the_first_life_leaves_nothing(digits: Path) -> None:
    """The others are in the middle of a long life: torchrun's SIGTERM finds them first."""
    folder = digits.parent
    process = start(folder, digits, "image.steps=100000", "training.students=2", "--out", "early")
    wait_for(lambda: (folder / "early/config.yaml").exists(), process)
    time.sleep(1.0)
    for child in children(process.pid):
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    (line,) = our_lines(err)
    assert "another of the 2 processes was lost" in line
    assert "no episode was finished; the same command begins anew" in line
    assert not (folder / "early").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_an_environment_that_is_none(
    l2t: Run, digits: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "two")
    assert f"{name}=two in the environment" in l2t("train-teacher", digits).error()


@pytest.mark.parametrize(
    ("setting", "message"),
    [("training.studnts=2", "unknown key"), ("training.students=1", "of 2 processes without one")],
)
def test_a_mistake_is_told_once(digits: Path, setting: str, message: str) -> None:
    _, err = start(digits.parent, digits, setting).communicate(timeout=120)
    (line,) = our_lines(err)
    assert message in line


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="as above")
def test_shared_batches_go_on_with_another_number_of_processes(
    l2t: Run, digits: Path, one_thread: None
) -> None:
    folder = digits.parent
    size = ["training.parallel=data", "training.episodes=12"]
    assert l2t("train-teacher", digits, *size, "--out", "whole").code == 0
    process = start(folder, digits, *size, "--out", "parts")
    log = folder / "parts/metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, process)
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert "2 processes share the batches" in out
    assert 2 <= len(log.read_text().splitlines()) < 13
    assert l2t("train-teacher", digits, *size, "--out", "parts").code == 0
    whole, parts = (
        load_teacher(folder / name / "teacher_last.safetensors")[0] for name in ("whole", "parts")
    )
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
