"""Algorithm 1 end to end on toy students: learning, resuming, skipping, and the files."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from l2t_core.applied import AppliedTeacher
from l2t_core.apply import train_student
from l2t_core.errors import UserError
from l2t_core.run_folder import open_run
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.teacher_file import load_header, load_teacher
from l2t_core.training import train_teacher

LOSS = LossSpec("dense", "softplus")
TEACHER = TeacherSpec(slots=3, init_scale=0.1)


def spec(**changes):
    return TrainingSpec(**{"episodes": 4, "lr": 0.02, "memory": "10MiB", **changes})


@pytest.fixture
def student(make_student):
    return make_student("mlp", OptimiserSpec("momentum", 0.3), steps=6, dtype=torch.float32)


def run(student, path, on_event=lambda e: None, **changes):
    folder = open_run(path, {"run": 1})
    return train_teacher(
        student, LOSS, TEACHER, spec(**changes), folder, record={"recipe": "toy"},
        on_event=on_event,
    )


def test_the_smoothed_measure_climbs(make_student, tmp_path):
    """One student's seed for all episodes: the objective is then one function of theta."""
    student = make_student("mlp", OptimiserSpec("momentum", 0.3), steps=12, dtype=torch.float32)
    result = run(student, tmp_path / "run", episodes=15, lr=0.01, student_seeds=1)
    smoothed = [row["smoothed"] for row in result.history]
    assert len(smoothed) == 16
    assert smoothed[-1] > smoothed[0] + 0.02
    assert sum(b > a for a, b in itertools.pairwise(smoothed)) >= 12


def test_students_take_turns(student, tmp_path):
    seeds = []
    reset = student.reset
    student.reset = lambda seed: (seeds.append(seed), reset(seed))
    run(student, tmp_path / "fresh")
    assert len(set(seeds[1:])) == 5  # the first is the probe's
    del seeds[:]
    run(student, tmp_path / "turns", student_seeds=2)
    assert seeds[1] == seeds[3] == seeds[5] != seeds[2] == seeds[4]


def test_files_and_header(student, tmp_path):
    result = run(student, tmp_path / "run")
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["episode"] for r in rows] == [0, 1, 2, 3, 4]
    assert result.best_measure == max(r["dev_measure"] for r in rows)
    header = load_header(result.best_path)
    assert header.record["recipe"] == "toy"
    assert header.record["best_episode"] == result.best_episode
    assert header.teacher.features == list(student.default_features)
    assert header.total_steps == 6


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [(2, "forward", 3), (2, "reverse", 3), (0, "forward", 0)])
def test_a_killed_run_resumes_to_the_same_bits(student, tmp_path, at):
    run(student, tmp_path / "whole")

    def kill(event):
        if event["event"] == "step" and (event["episode"], event["phase"], event["step"]) == at:
            raise Killed

    with pytest.raises(Killed):
        run(student, tmp_path / "killed", on_event=kill)
    run(student, tmp_path / "killed")
    for name in ("teacher_best.safetensors", "teacher_last.safetensors"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert whole == (tmp_path / "killed" / name).read_bytes()


def test_a_finished_run_is_not_repeated(student, tmp_path):
    run(student, tmp_path / "run")
    events = []
    run(student, tmp_path / "run", on_event=events.append)
    assert events == []


def test_non_finite_hypergradients_are_skipped_and_counted(student, tmp_path):
    smoothed = student.smoothed_measure
    student.smoothed_measure = lambda seed: smoothed(seed) * torch.tensor(float("nan"))
    result = run(student, tmp_path / "run")
    assert result.skipped == 5
    last, _ = load_teacher(result.last_path)
    best, _ = load_teacher(result.best_path)
    assert all(torch.isfinite(p).all() for p in last.parameters())
    # Nothing was learned, so the last teacher is the first.
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), best.parameters(), strict=True))


def test_a_diverging_student_is_skipped(make_student, tmp_path):
    student = make_student("mlp", OptimiserSpec("sgd", 1e38), steps=6, dtype=torch.float32)
    folder = open_run(tmp_path / "run", {"run": 1})
    result = train_teacher(
        student, LossSpec("dense", "identity"), TEACHER, spec(), folder, record={}
    )
    assert result.skipped == 5
    assert "diverged" in result.history[0]["reason"]


def test_a_student_that_dies_in_its_last_step_is_never_the_best(student, tmp_path):
    rate = student.learning_rate
    student.learning_rate = lambda step: 1e38 if step == 5 else rate(step)
    result = run(student, tmp_path / "run")
    assert result.skipped == 5
    assert not any(row["best"] for row in result.history)
    json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0], parse_constant=int)


def test_patience_stops_early(student, tmp_path):
    student.true_measure = lambda: 0.5
    result = run(student, tmp_path / "run", episodes=50, patience=3)
    assert [r["episode"] for r in result.history] == [0, 1, 2, 3]


def test_another_runs_folder_is_refused(tmp_path):
    open_run(tmp_path / "run", {"training": {"lr": 0.1}})
    with pytest.raises(UserError, match=r"another run \(training.lr is 0.1 there, 0.2 here\)"):
        open_run(tmp_path / "run", {"training": {"lr": 0.2}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds no run"):
        open_run(tmp_path / "mine", {})
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "mine/notes.txt", {})


def test_a_damaged_state_is_one_line(student, tmp_path):
    run(student, tmp_path / "run")
    state = tmp_path / "run/state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        run(student, tmp_path / "run")


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        (LossSpec(ce_mix=1.0), {}, "ce_mix"),
        (LossSpec(warmup_steps=6), {}, "warmup_steps"),
        (LOSS, {"episodes": 0}, "episodes"),
        (LOSS, {"discount": 0.0}, "discount"),
        (LOSS, {"lr": -1.0}, "training.lr is -1.0; it must be above 0"),
        (LOSS, {"student_seeds": -1}, "student_seeds"),
        (LOSS, {"seed": 10**15}, "training.seed"),
        (LossSpec(rank=0), {}, "loss.rank is 0"),
        (LossSpec(sigma="sigmoyd"), {}, "did you mean 'sigmoid'"),
        (LOSS, {"differentiation": "exakt"}, "did you mean 'exact'"),
        (LOSS, {"memory": "1KiB"}, "smallest budget"),
    ],
)
def test_impossible_settings_are_refused(student, tmp_path, loss, changes, message):
    folder = open_run(tmp_path / "run", {})
    with pytest.raises(UserError, match=message):
        train_teacher(student, loss, TEACHER, spec(**changes), folder, record={})


def test_a_teacher_needs_slots(student, tmp_path):
    folder = open_run(tmp_path / "run", {})
    with pytest.raises(UserError, match=r"teacher\.slots is -1; it must be at least 1"):
        train_teacher(student, LOSS, TeacherSpec(slots=-1), spec(), folder, record={})


@pytest.mark.parametrize("taught", [True, False])
def test_a_killed_application_resumes_to_the_same_bits(student, tmp_path, taught):
    path = run(student, tmp_path / "teacher").best_path

    def teacher():
        return AppliedTeacher.from_file(path, student.total_steps) if taught else None

    train_student(student, 9, teacher())
    whole = [p.clone() for p in student.module.parameters()]

    def kill(event):
        if event["step"] == 4:
            raise Killed

    snapshot = tmp_path / "snapshot.safetensors"
    with pytest.raises(Killed):
        train_student(student, 9, teacher(), snapshot=snapshot, snapshot_every=2, on_event=kill)
    assert snapshot.exists()
    steps = []
    train_student(
        student, 9, teacher(), snapshot=snapshot, snapshot_every=2,
        on_event=lambda e: steps.append(e["step"]),
    )
    assert steps == [4, 5]
    assert not snapshot.exists()
    assert all(torch.equal(a, b) for a, b in zip(whole, student.module.parameters(), strict=True))


def test_teaching_changes_the_student(student, tmp_path):
    path = run(student, tmp_path / "teacher").best_path
    train_student(student, 9, AppliedTeacher.from_file(path, student.total_steps))
    taught = torch.cat([p.detach().reshape(-1).clone() for p in student.module.parameters()])
    train_student(student, 9, None)
    plain = torch.cat([p.detach().reshape(-1) for p in student.module.parameters()])
    assert float((taught - plain).abs().max()) > 1e-3
