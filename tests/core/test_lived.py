"""A life whose loss was changed by windows, as a teacher for others; and losses by time alone."""

from __future__ import annotations

import json

import pytest
import torch

from l2t_core.hypergradients.ways import Outcome
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.state import StudentState
from l2t_core.students.train import train_student
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import build_teacher
from l2t_core.teachers.file import load_teacher
from l2t_core.training.checks import SLOTS_LIMIT, problems
from l2t_core.training.episodes import TeacherTraining, train_teacher
from l2t_core.training.lived import can_be_told, joined

LOSS = LossSpec("dense", "softplus")
STATIC = TeacherSpec("static", init_scale=0.1)
WINDOWS = {"differentiation": "windows", "window": 2}
RULES = [{}, {"update_rule": "lstm", "lr": 0.1}]


@pytest.mark.parametrize(
    ("steps", "stretches"), [(6, 3), (7, 3), (700, 100), (3000, 300), (3, 7), (64_000, 10)]
)
def test_each_stretch_of_a_life_has_its_own_phi(steps, stretches):
    teacher = build_teacher(TeacherSpec("timed", slots=stretches), LossSpec("shared"), 3, 1, 0)
    teacher.values["d"].data.copy_(torch.arange(stretches))
    state = StudentState(steps, 3, ["progress"])
    found = [float(teacher(state.features(step, 0.1))["d"].detach()) for step in range(steps)]
    assert found == [step * stretches // steps for step in range(steps)]


def test_it_looks_at_time_alone():
    told = problems(LOSS, TeacherSpec("timed", features=["progress", "dev_nll"]), TrainingSpec(), 6)
    assert told == ["teacher.name=timed looks at progress alone; leave teacher.features out"]
    assert problems(LOSS, TeacherSpec("timed", features=["progress"]), TrainingSpec(), 6) == []


def thetas(count):
    return [{"values.b": torch.full((1, 2), float(i))} for i in range(count)]


def test_windows_are_joined_by_what_lived_at_each_stretchs_middle():
    def numbers(*arguments):
        return joined(*arguments)["values.b"][:, 0].tolist()

    assert joined([], 0, 6, 2) == {}
    assert numbers(thetas(3), 0, 6, 2) == [0, 1, 2]
    # Windows of steps 0, 1-3 and 4-6; stretches of 7/3 steps.
    assert numbers(thetas(3), 0, 7, 3) == [1, 1, 2]
    # A warm-up of 4 steps, which no loss of theirs has a say in.
    assert numbers(thetas(2), 4, 8, 2) == [0, 0, 0, 1]
    many = numbers(thetas(5000), 0, 5000, 1)
    assert len(many) == SLOTS_LIMIT and many == sorted(many)


@pytest.fixture
def student(make_student):
    return make_student("mlp", OptimiserSpec("momentum", 0.3), steps=6, dtype=torch.float32)


def run(student, path, on_event=lambda event: None, teacher=STATIC, **changes):
    spec = TrainingSpec(**{"episodes": 3, "lr": 0.02, "memory": "10MiB", **WINDOWS, **changes})
    return train_teacher(
        student, LOSS, teacher, spec, open_run(path, {"run": 1}), record={}, on_event=on_event
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_student_under_the_losses_of_a_life_lives_that_life(student, tmp_path, rule):
    """With the same seed to the bit, without any derivative of its own."""
    measures = iter([0.1, 0.4, 0.3, 0.9])
    true, student.true_measure = student.true_measure, lambda: next(measures)
    result = run(student, tmp_path / "run", **rule)
    assert result.lived_path == tmp_path / "run/teacher_lived.safetensors"
    teacher, header = load_teacher(result.lived_path)
    assert result.best_episode == 3  # whose loss stays as it is
    assert (header.record["episode"], header.record["dev_measure"]) == (1, 0.4)
    assert (header.teacher.name, header.teacher.slots, header.sees) == ("timed", 3, ["progress"])
    assert not header.reads_dev and not torch.equal(*teacher.values["W"][:2])
    smoothed = result.history[1]["smoothed"]
    student.true_measure = true
    train_student(student, 1_000_003 + 1, AppliedTeacher.from_file(result.lived_path, 6))
    assert float(student.smoothed_measure(0).detach()) == smoothed


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_its_file_is_the_same_after_a_kill_and_in_a_run_that_has_grown(student, tmp_path, rule):
    class Killed(Exception):
        pass

    def kill(event):
        if event["event"] == "episode" and event["episode"] == 1:
            raise Killed

    run(student, tmp_path / "whole", **rule)
    with pytest.raises(Killed):
        run(student, tmp_path / "killed", kill, **rule)
    run(student, tmp_path / "killed", **rule)
    run(student, tmp_path / "grown", episodes=1, **rule)
    run(student, tmp_path / "grown", **rule)
    files = [tmp_path / name / "teacher_lived.safetensors" for name in ("whole", "killed", "grown")]
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize(
    ("teacher", "changes"),
    [
        (TeacherSpec(slots=2), {}),
        (STATIC, {"differentiation": "exact", "window": 0}),
        (STATIC, {"differentiation": "persistent-es"}),
    ],
    ids=str,
)
def test_there_is_none_where_no_such_losses_were_lived(student, tmp_path, teacher, changes):
    result = run(student, tmp_path / "run", teacher=teacher, **changes)
    assert result.lived_path is None
    assert not (tmp_path / "run/teacher_lived.safetensors").exists()
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4


def test_a_life_is_told_where_another_processs_student_died_at_its_end(student, tmp_path):
    settings = {"window": 3, "update_rule": "lstm", "episodes": 1, "memory": "10MiB"}
    spec = TrainingSpec(**{**WINDOWS, **settings})
    training = TeacherTraining(student, LOSS, STATIC, spec, open_run(tmp_path / "run", {}), {})
    training.lived = [training.state.theta()]  # of the first of two windows
    numbers = sum(p.numel() for p in training.teacher.parameters())
    lived = Outcome([torch.ones(numbers)], smoothed=0.5, true=0.5, judges=True)
    row = training._learn([Outcome(failure="the student diverged"), lived])
    assert row["students_lost"] == 1 and not row["skipped"]
    assert training.state.life is not None and len(training.state.life.theta["values.W"]) == 2


def test_losses_with_too_many_numbers_are_not_kept():
    loss = LossSpec("dense")
    spec = TrainingSpec(differentiation="windows", window=10)
    teacher = build_teacher(STATIC, loss, 100, 0, 1)
    assert can_be_told(STATIC, teacher, spec, 49_500)  # 4,950 of 10,100 numbers
    assert not can_be_told(STATIC, teacher, spec, 49_510)
