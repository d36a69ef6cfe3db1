"""Algorithm 1 end to end on toy students: learning, resuming, skipping, and the files."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from toy_students import Mlp, OpaqueNet, ToyStudent

from l2t_core.errors import NoEffect, UserError
from l2t_core.losses.forms import FORMS
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.train import train_student
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import TEACHERS, Teacher
from l2t_core.teachers.file import load_header, load_teacher
from l2t_core.training.checks import problems
from l2t_core.training.episodes import TeacherTraining, train_teacher

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


def test_differences_serve_students_that_have_nothing_exact(student, tmp_path):
    """And are not held against derivatives that are silently wrong."""
    told = run(student, tmp_path / "told", hvp="one-sided-difference").history
    assert all(0.0 < row["hvp_error"] < 0.05 for row in told)
    opaque = ToyStudent(OpaqueNet, OptimiserSpec("momentum", 0.3), dtype=torch.float32)
    with pytest.raises(UserError, match=r"'layers\.1' cannot be differentiated twice"):
        run(opaque, tmp_path / "exact")
    for row in run(opaque, tmp_path / "opaque", hvp="one-sided-difference").history:
        assert row["hvp_error"] is None and row["hypergradient_norm"] > 0.0


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
    assert header.record["episode"] == result.best_episode
    assert header.record["dev_measure"] == result.best_measure
    last = load_header(result.last_path).record
    assert (last["episode"], last["dev_measure"]) == (4, rows[4]["dev_measure"])
    assert header.teacher.features == list(student.default_features)
    assert header.total_steps == 6


def same_teachers(one, other):
    for name in ("teacher_best.safetensors", "teacher_last.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


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
    same_teachers(tmp_path / "whole", tmp_path / "killed")


def test_a_run_goes_on_with_the_threads_that_it_began_with(student, tmp_path):
    before = torch.get_num_threads()

    def kill(event):
        if event["event"] == "step" and event["episode"] == 1:
            torch.set_num_threads(before + 1)
            raise Killed

    try:
        with pytest.raises(Killed):
            run(student, tmp_path / "run", on_event=kill)
        events = []
        run(student, tmp_path / "run", on_event=events.append)
        assert torch.get_num_threads() == before
        assert [e["threads"] for e in events if e["event"] == "plan"] == [before]
    finally:
        torch.set_num_threads(before)


def test_a_finished_run_is_not_repeated(student, tmp_path):
    run(student, tmp_path / "run")
    events = []
    run(student, tmp_path / "run", on_event=events.append)
    assert [e["event"] for e in events] == ["resumed"]


@pytest.mark.parametrize("dies", [None, 1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"finalists": 2},
        {"differentiation": "windows", "window": 2},
        {"differentiation": "windows", "window": 3, "update_rule": "lstm"},
        {"differentiation": "persistent-es", "window": 3, "perturbation": 0.1},
        {"differentiation": "antithetic-es", "perturbation": 0.1},
    ],
)
def test_a_finished_run_goes_on_when_asked_for_more(student, tmp_path, changes, dies):
    """With the bits of a run that was asked for as many at once; a student may have died."""
    seed = 1 * 1_000_003 + (dies or 0)
    reset, rate = student.reset, student.learning_rate
    student.reset = lambda seed: (setattr(student, "life", seed), reset(seed))
    # In its fourth step: after the first window, which then has changed theta.
    student.learning_rate = lambda step: (
        1e38 if dies is not None and (student.life, step) == (seed, 3) else rate(step)
    )
    run(student, tmp_path / "whole", episodes=4, **changes)
    run(student, tmp_path / "grown", episodes=2, **changes)
    events = []
    run(student, tmp_path / "grown", episodes=4, on_event=events.append, **changes)
    assert [e["episode"] for e in events if e["event"] == "episode"] == [2, 3, 4]
    same_teachers(tmp_path / "whole", tmp_path / "grown")
    skips = [
        [json.loads(x).get("skipped_total") for x in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "grown")
    ]
    assert skips[0] == skips[1] and (skips[0][4] >= 1) == (dies is not None)
    del events[:]
    run(student, tmp_path / "grown", episodes=4, on_event=events.append, **changes)
    assert [e["event"] for e in events] == ["resumed"]


def test_a_grown_run_keeps_its_patience(student, tmp_path):
    """Where the episode that is made again was the best, and the only leader."""
    scores = iter([0.5, 0.4, 0.3, 0.9, 0.9, 0.6, 0.5, 0.4])
    student.true_measure = lambda: next(scores)
    run(student, tmp_path / "run", episodes=3, patience=3)
    result = run(student, tmp_path / "run", episodes=9, patience=3)
    assert [row["dev_measure"] for row in result.history] == [0.5, 0.4, 0.3, 0.9, 0.6, 0.5, 0.4]
    assert (result.best_episode, result.best_measure) == (3, 0.9)


@pytest.mark.parametrize("finalists", [1, 2])
def test_a_grown_run_knows_the_leader_whose_place_its_last_episode_took(
    student, tmp_path, finalists
):
    """That episode changed no theta within its life; made again it may do worse."""
    settings = {"differentiation": "windows", "window": 2, "finalists": finalists}
    if finalists > 1:
        settings["final_students"] = 1

    def part(name, episodes, scores):
        told = iter(scores)
        student.true_measure = lambda: next(told, 0.1)  # which final students have
        return run(student, tmp_path / name, episodes=episodes, **settings)

    part("grown", 2, [0.5, 0.4, 0.6])
    for result in (part("grown", 3, [0.3, 0.2]), part("whole", 3, [0.5, 0.4, 0.3, 0.2])):
        assert [row["best"] for row in result.history] == [True, False, False, False]
        assert result.best_episode == 0
    same_teachers(tmp_path / "whole", tmp_path / "grown")


@pytest.mark.parametrize("form", FORMS.names())
def test_a_student_in_float64_is_taught_by_every_form(make_student, tmp_path, form):
    """While theta is in float32, as everywhere."""
    double = make_student("mlp", OptimiserSpec("momentum", 0.3), steps=4)
    result = train_teacher(
        double, LossSpec(form, "softplus", **({"rank": 2} if form == "lowrank" else {})), TEACHER,
        spec(episodes=1),
        open_run(tmp_path / "run", {"run": 1}), record={"recipe": "toy"},
    )
    assert all(row["hypergradient_norm"] > 0.0 for row in result.history)


def test_a_run_that_patience_ended_stays_ended(student, tmp_path):
    student.true_measure = lambda: 0.5
    settings = {"patience": 3, "finalists": 2}
    run(student, tmp_path / "run", episodes=50, **settings)
    events = []
    result = run(student, tmp_path / "run", episodes=60, on_event=events.append, **settings)
    assert [e["event"] for e in events] == ["resumed"] and len(result.history) == 4


@pytest.mark.parametrize(("factor", "reason"), [(float("nan"), "not finite"), (0.0, "flat there")])
def test_unusable_hypergradients_are_skipped_and_counted(student, tmp_path, factor, reason):
    smoothed = student.smoothed_measure
    student.smoothed_measure = lambda seed: smoothed(seed) * torch.tensor(factor)
    result = run(student, tmp_path / "run")
    assert result.skipped == 5
    assert reason in result.history[0]["reason"]
    last, _ = load_teacher(result.last_path)
    best, _ = load_teacher(result.best_path)
    assert all(torch.isfinite(p).all() for p in last.parameters())
    # Nothing was learned, so the last teacher is the first.
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), best.parameters(), strict=True))


@pytest.mark.parametrize("rule", ["adam", "lstm"])
def test_a_window_without_a_usable_hypergradient_ends_no_life(student, tmp_path, rule):
    """Its students go on, later windows teach, and the dev measure is known."""
    settings = {"differentiation": "windows", "window": 2, "update_rule": rule, "episodes": 1}
    broken_at(student, {0})
    result = run(student, tmp_path / "run", **settings)
    assert result.skipped == 1 and not result.history[0]["skipped"]
    assert result.history[0]["dev_measure"] is not None and "reason" not in result.history[0]
    first = TeacherTraining(
        student, LOSS, TEACHER, spec(**settings), open_run(tmp_path / "new", {}), {}
    ).teacher
    last, _ = load_teacher(result.last_path)
    assert not torch.equal(*(t.values["W"] for t in (first, last)))


def broken_at(student, lost):
    """Make the gradients of M-tilde NaN at those of its calls, counted from 0."""
    smoothed, calls = student.smoothed_measure, []

    def measured(seed):
        calls.append(seed)
        value = smoothed(seed)
        return value + _broken(smoothed(seed)) if len(calls) - 1 in lost else value

    student.smoothed_measure = measured


def test_an_episode_is_skipped_where_none_of_its_windows_moved_theta(student, tmp_path):
    settings = {"differentiation": "windows", "window": 2, "episodes": 1}
    broken_at(student, {2, 3, 4, 5})
    result = run(student, tmp_path / "run", **settings)
    assert [row["skipped"] for row in result.history] == [False, True]
    assert result.history[0]["reason"] == result.history[1]["reason"]  # of the last window
    assert [row["skipped_total"] for row in result.history] == [1, 4]


def test_an_update_that_is_not_judged_teaches_the_rule_nothing(student, tmp_path):
    """Nor does it later: a run that is resumed in between knows of none."""
    settings = {"differentiation": "windows", "window": 6, "update_rule": "lstm", "episodes": 5}
    # The judged window of the first episode and the rehearsal of the second.
    lost = {1, 2}
    broken_at(student, lost)
    run(student, tmp_path / "whole", **settings)

    def kill(event):
        if event["event"] == "episode" and event["episode"] == 0:
            raise Killed

    other = type(student)(type(student.module), OptimiserSpec("momentum", 0.3), steps=6,
                          dtype=torch.float32)
    broken_at(other, lost)
    with pytest.raises(Killed):
        run(other, tmp_path / "parts", on_event=kill, **settings)
    run(other, tmp_path / "parts", **settings)
    same_teachers(tmp_path / "whole", tmp_path / "parts")


def _broken(value):
    """Return nothing, with a derivative of NaN."""
    value = value * 0.0
    value.register_hook(lambda gradient: gradient * float("nan"))
    return value


def test_every_field_of_the_log_is_on_its_page(student, tmp_path):
    """Of useful episodes, of skipped ones and of final students."""
    page = (Path(__file__).parents[2] / "docs/engine.md").read_text("utf-8")
    table = page.split("| field | meaning |\n|---|---|\n", 1)[1].split("\n\n", 1)[0]
    told = {n for line in table.splitlines() for n in re.findall(r"`(\w+)`", line.split("|")[1])}
    smoothed, calls = student.smoothed_measure, []

    def lost_at_first(seed):
        calls.append(seed)
        return smoothed(seed) * (torch.nan if len(calls) == 1 else 1.0)

    student.smoothed_measure = lost_at_first
    run(student, tmp_path / "run", finalists=2)
    lines = (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["event"] for row in rows} == {"episode", "final"} and rows[0]["skipped"]
    assert told - {"warning"} <= set().union(*rows) <= told
    # What was not measured is null, not left out.
    assert rows[0].keys() - {"reason", "warning"} == rows[1].keys() - {"warning"}


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


def test_the_teachers_so_far_are_there_when_a_run_is_stopped(student, tmp_path):
    def stop(event):
        if event["event"] == "episode" and event["episode"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student, tmp_path / "run", on_event=stop)
    best, header = load_teacher(tmp_path / "run/teacher_best.safetensors")
    assert header.record["episodes"] == 3
    last, _ = load_teacher(tmp_path / "run/teacher_last.safetensors")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(best.parameters(), last.parameters(), strict=True)
    )


def test_an_explosion_is_no_direction(student, tmp_path):
    result = run(student, tmp_path / "strict", max_growth=1e-3)
    assert result.skipped == 5
    assert "fold on its way back" in result.history[0]["reason"]
    # What the student that was left out met on its way back is told all the same.
    assert result.history[0]["largest"] > 1e-3 and result.history[0]["sharpness"] > 0.0
    assert run(student, tmp_path / "off", max_growth=0.0).skipped == 0


def test_theta_goes_half_the_way_back_from_where_students_die(student, tmp_path):
    """The second theta kills its students; theta then nears the first, whose student lived."""
    thetas = []
    predict = student.predict

    def observed(event):
        if event["event"] == "episode":
            thetas.append(theta())

    training = TeacherTraining(
        student, LOSS, TEACHER, spec(episodes=9), open_run(tmp_path / "run", {}), {}
    )

    def theta():
        return torch.cat([p.detach().reshape(-1) for p in training.teacher.parameters()])

    start = theta()

    def dies_after_the_first(batch):
        log_probs, targets = predict(batch)
        return (log_probs * float("nan") if thetas else log_probs), targets

    student.predict = dies_after_the_first
    with pytest.raises(UserError, match="none of the last 8 episodes gave a usable"):
        training.run(observed)
    assert len(thetas) == 9
    for before, after in itertools.pairwise(thetas):
        torch.testing.assert_close(after - start, (before - start) / 2, rtol=0, atol=1e-6)
    assert float((thetas[0] - start).abs().max()) > 0.01


def test_the_last_theta_stays_as_it_was_measured(student, tmp_path):
    """Where its student dies: no episode follows in which a theta half the way back might live."""
    reset, predict, numbers, thetas = student.reset, student.predict, [], []
    student.reset = lambda seed: (numbers.append(seed % 1_000_003), reset(seed))

    def dies(batch):
        log_probs, targets = predict(batch)
        return (log_probs * float("nan") if numbers[-1] == 1 else log_probs), targets

    student.predict = dies
    path = tmp_path / "run/teacher_last.safetensors"

    def look(event):
        if event["event"] == "episode":
            thetas.append([p.clone() for p in load_teacher(path)[0].parameters()])

    result = run(student, tmp_path / "run", episodes=1, on_event=look)
    assert [row["skipped"] for row in result.history] == [False, True]
    assert all(torch.equal(a, b) for a, b in zip(*thetas, strict=True))


@pytest.mark.parametrize("which", ["true_measure", "smoothed_measure"])
def test_a_measure_that_is_no_number_is_no_life(student, tmp_path, which):
    measure, calls = getattr(student, which), []

    def lost_at_first(*seed):
        calls.append(seed)
        return measure(*seed) * (math.nan if len(calls) == 1 else 1.0)

    setattr(student, which, lost_at_first)
    result = run(student, tmp_path / "run", episodes=1)
    assert [row["dev_measure"] is None for row in result.history] == [True, False]
    assert [row["skipped"] for row in result.history] == [True, False]
    assert result.best_episode == 1 and math.isfinite(result.best_measure)


def test_several_students_are_averaged(student, tmp_path):
    """One update from three students is that of the mean of their hypergradients."""
    rows = []
    for number, students in (("one", 1), ("three", 3)):
        result = run(student, tmp_path / number, episodes=2, students=students, student_seeds=3)
        rows.append(result.history)
    one, three = rows
    assert three[0]["students"] == 3
    assert three[0]["students_lost"] == 0
    assert one[0]["signal_to_noise"] is None
    assert three[0]["signal_to_noise"] > 0
    # student_seeds=3: episodes 0, 1 and 2 of the first run have the second's first three students.
    # (The smoothed measure: accuracy moves in steps, and these students' means are the same one.)
    assert three[0]["smoothed"] != one[0]["smoothed"]
    training = TeacherTraining(
        student, LOSS, TEACHER, spec(students=3, student_seeds=3),
        open_run(tmp_path / "again", {}), {},
    )
    outcomes = next(training._outcomes(lambda event: None))
    mean = torch.stack([o.estimates[0] for o in outcomes]).mean(0)
    assert three[0]["hypergradient_norm"] == pytest.approx(float(mean.norm()), rel=1e-6)


def test_a_lost_student_leaves_the_others(student, tmp_path):
    reset, predict, seeds = student.reset, student.predict, []
    student.reset = lambda seed: (seeds.append(seed), reset(seed))

    def dies(batch):
        log_probs, targets = predict(batch)
        return (log_probs * float("nan") if seeds[-1] % 2 else log_probs), targets

    student.predict = dies
    result = run(student, tmp_path / "run", episodes=1, students=2)
    assert result.skipped == 0
    assert [row["students_lost"] for row in result.history] == [1, 1]


def test_a_mix_needs_two_students(student, tmp_path):
    """One estimate of each kind has no variance: of two students none may be lost."""
    reset, predict, numbers = student.reset, student.predict, []
    student.reset = lambda seed: (numbers.append(seed % 1_000_003), reset(seed))

    def dies(batch):
        log_probs, targets = predict(batch)
        return (log_probs * float("nan") if numbers[-1] == 1 else log_probs), targets

    student.predict = dies
    result = run(student, tmp_path / "run", episodes=1, differentiation="mixed", students=2)
    assert [row["skipped"] for row in result.history] == [True, False]
    assert [row["students_lost"] for row in result.history] == [1, 0]


def test_no_two_lives_have_the_same_student_or_noise(student, tmp_path):
    settings = spec(students=3, differentiation="antithetic-es")
    training = TeacherTraining(student, LOSS, TEACHER, settings, open_run(tmp_path / "run", {}), {})
    lives = []
    training.differentiate = lambda life, teacher, on_step: iter([lives.append(life)])
    for episode in range(3):
        training.state.progress.episode = episode
        for number in range(3):
            list(training._life(number, lambda event: None))
    assert len({life.noise_seed for life in lives}) == 9
    assert len({life.student_seed for life in lives}) == 9
    assert len({life.measure_seed for life in lives}) == 9


def test_a_teacher_that_loses_students_is_not_the_best(student, tmp_path):
    """Three of the first four students die, and the fourth does better than all later ones."""
    reset, predict, numbers = student.reset, student.predict, []
    student.reset = lambda seed: (numbers.append(seed % 1_000_003), reset(seed))

    def dies(batch):
        log_probs, targets = predict(batch)
        return (log_probs * float("nan") if numbers[-1] < 3 else log_probs), targets

    student.predict = dies
    student.true_measure = lambda: 0.9 if numbers[-1] == 3 else 0.8
    result = run(student, tmp_path / "run", episodes=1, students=4)
    assert [row["students_lost"] for row in result.history] == [3, 0]
    assert [row["dev_measure"] for row in result.history] == pytest.approx([0.9, 0.8])
    assert (result.best_episode, result.best_measure) == (1, pytest.approx(0.8))


def test_a_student_that_is_lost_on_the_way_back_tells_of_its_teacher(student, tmp_path):
    scores = iter([0.5, 0.9, 0.8, 0.1, 0.1, 0.1])
    student.true_measure = lambda: next(scores)
    result = run(student, tmp_path / "run", max_growth=1e-3)
    assert result.skipped == len(result.history)
    assert (result.best_episode, result.best_measure) == (1, 0.9)
    assert all(math.isfinite(row["smoothed"]) for row in result.history)


@pytest.mark.parametrize(
    "changes",
    [
        {"differentiation": "windows", "window": 2},
        {"differentiation": "windows", "window": 2, "update_rule": "lstm", "phi_penalty": 0.1},
        {"differentiation": "persistent-es", "window": 2},
        {"differentiation": "antithetic-es", "students": 2},
        {"differentiation": "mixed", "students": 2, "phi_penalty": 0.1},
        {"average_last": 2, "measure_points": 2, "cotangent_cap": 5.0},
    ],
    ids=lambda c: c.get("differentiation", "exact"),
)
def test_every_way_trains_and_resumes_to_the_same_bits(student, tmp_path, changes):
    run(student, tmp_path / "whole", **changes)

    def kill(event):
        if event["event"] == "episode" and event["episode"] == 1:
            raise Killed

    with pytest.raises(Killed):
        run(student, tmp_path / "parts", on_event=kill, **changes)
    result = run(student, tmp_path / "parts", **changes)
    assert len(result.history) == 5
    assert result.skipped == 0
    same_teachers(tmp_path / "whole", tmp_path / "parts")


def test_a_penalty_keeps_phi_near_its_start(student, tmp_path):
    def distance(name, **changes):
        teacher, _ = load_teacher(run(student, tmp_path / name, episodes=6, **changes).last_path)
        return sum(float((v - torch.eye(3)).square().mean()) for v in teacher.values["W"])

    assert distance("kept", phi_penalty=100.0) < 0.5 * distance("free")


def test_patience_stops_early(student, tmp_path):
    student.true_measure = lambda: 0.5
    result = run(student, tmp_path / "run", episodes=50, patience=3)
    assert [r["episode"] for r in result.history] == [0, 1, 2, 3]


def test_the_best_is_chosen_on_the_same_fresh_students(student, tmp_path):
    """By their own students the order is another than by the final ones."""
    trained, applied = [], []
    reset, measure = student.reset, student.true_measure
    student.reset = lambda seed: (trained.append(seed), reset(seed))
    own, common = iter([0.1, 0.9, 0.8, 0.2, 0.7]), iter([0.3, 0.4, 0.9, 0.7, 0.1, 0.6])

    def true_measure():
        found = next(own, None)
        if found is None:
            applied.append((trained[-1], measure()))
            return next(common)
        return found

    student.true_measure = true_measure
    events = []
    result = run(student, tmp_path / "run", finalists=3, final_students=2, on_event=events.append)
    finals = [e for e in events if e["event"] == "final"]
    assert [(e["episode"], e["scores"]) for e in finals] == [
        (1, [0.3, 0.4]), (2, [0.9, 0.7]), (4, [0.1, 0.6])
    ]
    # The same two students for each teacher, and none that any of them has learnt from.
    seeds = [seed for seed, _ in applied]
    assert seeds[:2] == seeds[2:4] == seeds[4:] and seeds[0] != seeds[1]
    assert not set(seeds) & set(trained[:-6])
    assert result.best_episode == 2
    assert result.best_measure == pytest.approx(0.8)
    record = load_header(result.best_path).record
    assert (record["episode"], record["final_students"]) == (2, 6)
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["event"] for r in rows] == ["episode"] * 5 + ["final"] * 3
    # The file is the second episode's theta: its students are what it makes of those seeds.
    student.true_measure = measure
    for seed, found in applied[2:4]:
        train_student(student, seed, AppliedTeacher.from_file(result.best_path, 6))
        assert student.true_measure() == found
    del events[:]
    again = run(student, tmp_path / "run", finalists=3, final_students=2, on_event=events.append)
    assert [e["event"] for e in events] == ["resumed"] and again.best_episode == 2


@pytest.mark.parametrize("step", [2, 5])
def test_finals_resume_to_the_same_bits(student, tmp_path, step):
    settings = {"finalists": 2, "final_students": 2}
    whole = run(student, tmp_path / "whole", **settings)
    finals = []

    def kill(event):
        finals.append(event["event"] == "final")
        if sum(finals) == 1 and event["event"] == "step" and event["step"] == step:
            raise Killed

    with pytest.raises(Killed):
        run(student, tmp_path / "parts", on_event=kill, **settings)
    events = []
    parts = run(student, tmp_path / "parts", on_event=events.append, **settings)
    assert [e["event"] for e in events].count("final") == 1
    assert parts.best_measure == whole.best_measure
    same_teachers(tmp_path / "whole", tmp_path / "parts")


def test_a_finalist_whose_student_dies_does_not_win(student, tmp_path):
    scores = iter([0.5, 0.9, 0.8, 0.1, 0.1, float("nan"), 0.99, 0.2, 0.1])
    student.true_measure = lambda: next(scores)
    result = run(student, tmp_path / "run", finalists=2, final_students=2)
    assert result.best_episode == 2
    assert result.best_measure == pytest.approx(0.15)


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


def test_one_number_of_a_run_may_grow(tmp_path):
    path = tmp_path / "run"
    open_run(path, {"training": {"episodes": 4, "lr": 0.1}}, may_grow="training.episodes")
    open_run(path, {"training": {"episodes": 9, "lr": 0.1}}, may_grow="training.episodes").adopt()
    assert json.loads((path / "config.yaml").read_text())["training"]["episodes"] == 9
    refused = [
        ({"episodes": 4, "lr": 0.1}, "training.episodes=9, which may only grow; ask for 9 or more"),
        ({"episodes": 10, "lr": 0.2}, r"another run \(training.lr"),
    ]
    for changed, words in refused:
        with pytest.raises(UserError, match=words):
            open_run(path, {"training": changed}, may_grow="training.episodes")
    with pytest.raises(UserError, match="another run"):
        open_run(path, {"training": {"episodes": 10, "lr": 0.1}})


def test_how_a_run_is_made_may_change(tmp_path):
    first, second = ({"training": {"memory": m, "lr": 0.1}} for m in ("1GiB", "2GiB"))
    open_run(tmp_path / "run", first)
    changed = open_run(tmp_path / "run", second, may_change=("training.memory",))
    assert not changed.grown
    assert json.loads((tmp_path / "run/config.yaml").read_text()) == first
    changed.adopt()
    assert json.loads((tmp_path / "run/config.yaml").read_text()) == second
    del changed  # it is at work in the folder as long as it lives
    with pytest.raises(UserError, match="another run"):
        open_run(tmp_path / "run", first)


def test_a_kill_while_writing_leaves_nothing_in_the_way(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    first, old = path / ".config.yaml.abc", path / ".state.safetensors.abc"
    first.write_text("{")
    open_run(path, {"run": 1})
    old.write_text("half")
    os.utime(old, (0, 0))
    (path / ".notes").write_text("the user's")
    os.utime(path / ".notes", (0, 0))
    open_run(path, {"run": 1})
    # A young one may be another process's.
    assert {p.name for p in path.iterdir()} == {"config.yaml", first.name, ".notes"}


def test_a_setting_that_is_younger_than_the_run_had_its_default(tmp_path):
    path, defaults = tmp_path / "run", {"nmt": {"split": "", "more": [], "on": True, "p": "auto"}}
    open_run(path, {"nmt": {"steps": 4}})
    same = {"steps": 4, "split": "", "more": [], "on": True, "p": "auto"}
    open_run(path, {"nmt": same}, defaults=defaults)
    for key, value, there in (("split", "train", "''"), ("on", False, "True"), ("p", 1, "'auto'")):
        said = rf"nmt\.{key} is {there} there, {value!r} here"
        with pytest.raises(UserError, match=said):
            open_run(path, {"nmt": {**same, key: value}}, defaults=defaults)
    with pytest.raises(UserError, match=r"nmt.steps is 4 there, None here"):
        open_run(path, {"nmt": {}}, defaults=defaults)


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
        (LossSpec(warmup_smoothing=1.0), {}, "loss.warmup_smoothing is 1.0; it must be in"),
        (LossSpec(warmup_steps=6), {}, "warmup_steps"),
        (LOSS, {"episodes": 0}, "episodes"),
        (LOSS, {"discount": 0.0}, "discount"),
        (LOSS, {"lr": -1.0}, "training.lr is -1.0; it must be above 0"),
        (LOSS, {"student_seeds": -1}, "student_seeds"),
        (LOSS, {"seed": 10**15}, "training.seed"),
        (LossSpec(rank=0), {}, "loss.rank is 0"),
        (LossSpec(sigma="sigmoyd"), {}, "did you mean 'sigmoid'"),
        (LOSS, {"differentiation": "exakt"}, "did you mean 'exact'"),
        (LOSS, {"memory": "100B"}, "smallest budget"),
        (LOSS, {"students": 0}, "training.students is 0"),
        (LOSS, {"finalists": 0}, "training.finalists is 0"),
        (LOSS, {"final_students": 0}, "training.final_students is 0"),
        (LOSS, {"parallel": "date"}, "did you mean 'data'"),
        (LOSS, {"window": 3}, "no effect with training.differentiation=exact"),
        (LOSS, {"differentiation": "windows"}, "needs training.window"),
        (LOSS, {"differentiation": "windows", "window": 2, "students": 2}, "need 2 processes"),
        (LOSS, {"differentiation": "mixed"}, "training.students of at least 2"),
        (LOSS, {"differentiation": "antithetic-es", "discount": 0.9}, "discount has no effect"),
        (LOSS, {"differentiation": "persistent-es", "window": 2, "average_last": 2}, "no effect"),
        (LOSS, {"average_last": 7}, "between 1 .off. and the student's 6 steps"),
        (LOSS, {"perturbation": 0.0}, "training.perturbation is 0.0"),
        (LOSS, {"perturbation": 0.1}, r"perturbation has no effect .*=exact; .*is 0\.01"),
        (LOSS, {"differentiation": "antithetic-es", "hvp": "finite-difference"}, "hvp has no eff"),
        (LOSS, {"differentiation": "antithetic-es", "spill": "file"}, "spill has no effect"),
        (LOSS, {"differentiation": "antithetic-es", "max_growth": 0.0}, "max_growth has no effect"),
        (LossSpec("shared", rank=4), {}, "loss.rank has no effect with loss.form=shared"),
        (LossSpec(warmup_smoothing=0.1), {}, "no effect with loss.warmup_steps=0; set that"),
        (LOSS, {"final_students": 5}, "final_students has no effect with training.finalists=1"),
        (LOSS, {"students": 3, "student_seeds": 2}, "same lives more than once"),
        (LOSS, {"update_rule": "lstn"}, r"did you mean '(cold-)?lstm'"),
        (LOSS, {"update_rule": "lstm"}, "learns from windows that are lived again, and tr.* exact"),
        (LOSS, {"rule_lr": 0.1}, r"rule_lr has no effect with training\.update_rule=adam; use ls"),
        (LOSS, {"rule_lr": 0.0}, "training.rule_lr is 0.0; it must be above 0"),
        (LOSS, {"measure_points": 2, "truncate": 3}, "in the first 3 steps, which are not diff"),
    ],
)
def test_impossible_settings_are_refused(student, tmp_path, loss, changes, message):
    folder = open_run(tmp_path / "run", {})
    with pytest.raises(UserError, match=message):
        train_teacher(student, loss, TEACHER, spec(**changes), folder, record={})


@pytest.mark.parametrize("slots", [-1, 10**11])
def test_a_teacher_needs_slots_and_not_too_many(student, tmp_path, slots):
    folder = open_run(tmp_path / "run", {})
    with pytest.raises(UserError, match=rf"teacher\.slots is {slots}; it must be in \[1, 4,096\]"):
        train_teacher(student, LOSS, TeacherSpec(slots=slots), spec(), folder, record={})


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        (LossSpec("shared", rank=4), {}),
        (LossSpec(warmup_smoothing=0.1), {}),
        (LOSS, {"final_students": 5}),
        (LOSS, {"perturbation": 0.1}),
        (LOSS, {"window": 2}),
    ],
)
def test_a_setting_without_effect_is_told_with_the_two_keys(loss, changes):
    """As data, too: the command line goes by it, and not by the words."""
    (line,) = problems(loss, TEACHER, spec(**changes), 6)
    assert isinstance(line, NoEffect)
    assert line.startswith(f"{line.key} has no effect with {line.by}={line.value}; ")


@pytest.mark.parametrize(
    ("name", "idle"),
    [
        ("static", ["slots", "hidden"]), ("affine", ["hidden"]), ("attention", ["hidden"]),
        ("lstm", []),
    ],
)
def test_sizes_that_a_teacher_does_not_read_are_told(name, idle):
    found = problems(LOSS, TeacherSpec(name, slots=3, hidden=4), spec(), 6)
    assert [line.key for line in found] == [f"teacher.{key}" for key in idle]
    assert problems(LOSS, TeacherSpec(name), spec(), 6) == []
    (line,) = problems(LOSS, TeacherSpec("lstm", hidden=10_000), spec(), 6)
    assert line == "teacher.hidden is 10000; it must be in [1, 4,096]"


class Sharing(Mlp):
    """With two buffers in one memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(4))
        self.register_buffer("view", self.table.view(2, 2))


def test_a_snapshot_takes_buffers_that_share_memory(tmp_path):
    student = ToyStudent(Sharing, OptimiserSpec("momentum", 0.3), steps=6)
    snapshot = tmp_path / "snapshot.safetensors"
    train_student(student, 9, snapshot=snapshot, snapshot_every=2)
    assert snapshot.exists()


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
    half = tmp_path / ".snapshot.safetensors.x1"  # of another kill, while it was written
    half.touch()
    os.utime(half, (0, 0))
    steps = []
    train_student(
        student, 9, teacher(), snapshot=snapshot, snapshot_every=2,
        on_event=lambda e: steps.append(e["step"]),
    )
    assert steps == [4, 5]
    assert not half.exists()
    assert snapshot.exists()  # until the caller has written what it makes of the student
    assert all(torch.equal(a, b) for a, b in zip(whole, student.module.parameters(), strict=True))


def test_a_student_goes_on_with_the_threads_that_it_began_with(student, tmp_path):
    before = torch.get_num_threads()

    def kill(event):
        if event["step"] == 4:
            torch.set_num_threads(before + 1)
            raise Killed

    snapshot = tmp_path / "snapshot.safetensors"
    try:
        with pytest.raises(Killed):
            train_student(student, 9, snapshot=snapshot, snapshot_every=2, on_event=kill)
        train_student(student, 9, snapshot=snapshot)
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_a_resumed_student_lies_in_memory_as_a_new_one(student, tmp_path, monkeypatch):
    """What is read from a file may not: products may then round otherwise."""

    def kill(event):
        if event["step"] == 4:
            raise Killed

    snapshot = tmp_path / "snapshot.safetensors"
    with pytest.raises(Killed):
        train_student(student, 9, snapshot=snapshot, snapshot_every=2, on_event=kill)
    places = []
    predict = student.predict

    def noted(batch):
        places.append(next(student.module.parameters()).data_ptr() % 64)
        return predict(batch)

    monkeypatch.setattr(student, "predict", noted)
    train_student(student, 9, snapshot=snapshot)
    assert places == [0, 0]


def test_teaching_changes_the_student(student, tmp_path):
    path = run(student, tmp_path / "teacher").best_path
    train_student(student, 9, AppliedTeacher.from_file(path, student.total_steps))
    taught = torch.cat([p.detach().reshape(-1).clone() for p in student.module.parameters()])
    train_student(student, 9, None)
    plain = torch.cat([p.detach().reshape(-1) for p in student.module.parameters()])
    assert float((taught - plain).abs().max()) > 1e-3


def lowest_weights(teacher_file):
    values = dict(load_teacher(teacher_file)[0].named_parameters())
    return float(values["values.W"].detach().min())


def test_a_training_keeps_weights_from_below_zero(student, tmp_path):
    """From the start on, where a large ``init_scale`` would put some, and after every update."""
    found = {}
    for bounded in (True, False):
        folder = open_run(tmp_path / str(bounded), {"run": bounded})
        train_teacher(
            student, LossSpec("dense", "identity"), TeacherSpec(slots=3, init_scale=0.6),
            spec(bounded=bounded, lr=0.1, episodes=2, max_growth=0.0), folder, record={},
        )
        found[bounded] = lowest_weights(folder.teacher_last)
    assert found[True] >= 0.0 > found[False]
    at_start = TeacherTraining(
        student, LossSpec("dense", "identity"), TeacherSpec(slots=3, init_scale=3.0),
        spec(), open_run(tmp_path / "start", {"run": 2}), {},
    ).teacher
    assert float(at_start.values["W"].detach().min()) == 0.0


def test_a_teacher_that_cannot_be_kept_there_is_refused_before_the_run(student, tmp_path):
    @TEACHERS.register("of one's own")
    class Own(Teacher):
        def __init__(self, spec, loss, num_classes, num_features):
            super().__init__(spec, loss, num_classes, num_features)
            self.W = torch.nn.Parameter(torch.eye(num_classes))
            self.b = torch.nn.Parameter(torch.zeros(num_classes))

        def forward(self, features):
            return {"W": self.W, "b": self.b}

    def trained(sigma, **changes):
        folder = open_run(tmp_path / f"{sigma}-{len(changes)}", {})
        return train_teacher(
            student, LossSpec("dense", sigma), TeacherSpec("of one's own", slots=2, hidden=3),
            spec(episodes=1, **changes), folder, record={},
        )

    try:
        with pytest.raises(UserError, match="has no keep_from_below_zero"):
            trained("identity")
        assert trained("identity", bounded=False).skipped == 0
        assert trained("softplus").skipped == 0  # is bounded by itself
    finally:
        del TEACHERS._entries["of one's own"]


def test_two_commands_do_not_write_into_one_folder(tmp_path):
    first = open_run(tmp_path / "run", {"a": 1})
    with pytest.raises(UserError, match=r"another command is at work in .*run; wait for it"):
        open_run(tmp_path / "run", {"a": 1})
    path = first.path
    del first
    assert open_run(path, {"a": 1}).config.exists()
