"""Teacher training under torchrun: the same result, one line for one mistake, and going on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkout import end_of, start_python  # type: ignore[import-not-found]
from in_process import Run  # type: ignore[import-not-found]

from l2t_core.teachers.file import load_teacher

SIZE = [
    "training.students=2", "training.episodes=12", "training.finalists=2",
    "training.final_students=3",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PROLOGUE = """\
import os, signal, sys, time
from l2t_cli import errors
from l2t_cli.main import main
from l2t_core.training.episodes import TeacherTraining
rank = int(os.environ["RANK"])
save, on_step = TeacherTraining._save, TeacherTraining._on_step
"""
LOST_AFTER_THREE = """
def met(self):
    save(self)
    if rank == 1 and self.state.progress.episode == 3:
        os.kill(os.getpid(), signal.SIGKILL)
TeacherTraining._save = met
"""
LOST_AT_ONCE = """
def met(self, *arguments):
    step = on_step(self, *arguments)
    def lost(phase, at):
        if rank == 1 and at == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(phase, at)
    return lost
TeacherTraining._on_step = met
"""
# torchrun is ended, as by a batch system, and ends its processes.
ENDED_AFTER_THREE = """
def met(self):
    save(self)
    if rank == 0 and self.state.progress.episode == 3:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(900)
TeacherTraining._save = met
"""
LATE = """
say = errors.say
def late(message):
    time.sleep(10)  # a process takes seconds to end, too
    say(message)
if rank == 0:
    errors.say = late
    time.sleep(3)
else:  # on a machine that is so slow, that all of it takes so much longer
    from l2t_core.runs import processes
    processes._TELLING *= 15
"""


def start(folder: Path, script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start ``l2t train-teacher ARGUMENTS`` in two processes, ``script`` run before in each."""
    program = folder / "program.py"
    program.write_text(PROLOGUE + script + "\nmain(['train-teacher', *sys.argv[1:]])\n")
    return start_python(*TORCHRUN, program, *arguments, cwd=folder, OMP_NUM_THREADS="1")


def our_lines(text: str) -> list[str]:
    """Return what we said; torchrun adds a report of its own."""
    return [line for line in text.splitlines() if line.startswith("l2t: ")]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torchrun gives each of its processes: another number of threads has other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_lost_process_ends_the_run_and_one_process_goes_on(
    l2t: Run, digits: Path, one_thread: None
) -> None:
    folder = digits.parent
    assert l2t("train-teacher", digits, *SIZE, "--out", "whole").code == 0
    process = start(folder, LOST_AFTER_THREE, digits, *SIZE, "--out", "parts")
    out, err = end_of(process)
    assert "2 processes share the students" in out
    assert process.returncode != 0
    (line,) = our_lines(err)
    assert "another" in line and "lost" in line, line
    assert "the finished episodes are kept; the same command continues" in line
    assert len((folder / "parts/metrics.jsonl").read_text().splitlines()) in (2, 3)
    assert l2t("train-teacher", digits, *SIZE, "--out", "parts").code == 0
    for name in ("teacher_best.safetensors", "teacher_last.safetensors"):
        assert (folder / "parts" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_a_process_lost_in_the_first_life_leaves_nothing(digits: Path) -> None:
    """The other is in the middle of a long life: torchrun's SIGTERM finds it first."""
    folder = digits.parent
    settings = ["image.steps=100000", "training.students=2", "--out", "early"]
    _, err = end_of(start(folder, LOST_AT_ONCE, digits, *settings))
    (line,) = our_lines(err)
    assert "another" in line and "lost" in line, line
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
    """By the first, which finds it or tells it long after the other has found it."""
    process = start(digits.parent, LATE, digits, setting)
    _, err = end_of(process)
    (line,) = our_lines(err)
    assert line.startswith("l2t: error: ") and message in line
    assert not (digits.parent / "runs").exists()


def test_what_all_find_in_a_run_is_told_once(digits: Path) -> None:
    settings = ["image.optimiser.lr=1e30", "training.students=2", "training.episodes=20"]
    _, err = end_of(start(digits.parent, "", digits, *settings))
    (line,) = our_lines(err)
    assert "none of the last 8 episodes gave a usable hypergradient" in line


def test_shared_batches_go_on_with_another_number_of_processes(
    l2t: Run, digits: Path, one_thread: None
) -> None:
    folder = digits.parent
    size = ["training.parallel=data", "training.episodes=12"]
    assert l2t("train-teacher", digits, *size, "--out", "whole").code == 0
    process = start(folder, ENDED_AFTER_THREE, digits, *size, "--out", "parts")
    out, _ = end_of(process)
    assert "2 processes share the batches" in out
    assert len((folder / "parts/metrics.jsonl").read_text().splitlines()) == 3
    assert l2t("train-teacher", digits, *size, "--out", "parts").code == 0
    whole, parts = (
        load_teacher(folder / name / "teacher_last.safetensors")[0] for name in ("whole", "parts")
    )
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
