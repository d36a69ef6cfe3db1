"""A teacher trained, stopped, continued and applied, through the command line."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT, check_interrupted, start_python  # type: ignore[import-not-found]
from in_process import Run, write_teacher  # type: ignore[import-not-found]
from safetensors.torch import load_file
from scipy import stats

from l2t_cli.applying.image import ImageApplication
from l2t_cli.applying.result import NOT_TUNED, ApplicationResult, Score, report
from l2t_cli.inspect_teacher import PROBABILITIES
from l2t_cli.recipe_reading.loading import load_recipe
from l2t_cli.screen import console, plots
from l2t_cli.screen.console import LogFormat
from l2t_cli.screen.progress import TeacherView
from l2t_core.runs.folder import load_tensors_and_record, save_tensors_and_record
from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.students.state import TrainStatistics
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import build_teacher
from l2t_core.teachers.file import TeacherHeader, load_teacher, save_teacher
from l2t_vision.data.sets import load_data
from l2t_vision.student import ImageStudent


@pytest.fixture
def trained(l2t: Run, digits: Path, tmp_path: Path) -> Path:
    """Return the folder of a finished tiny run."""
    outcome = l2t("train-teacher", digits, "--out", "run")
    assert outcome.code == 0, outcome.err
    return tmp_path / "run"


def test_a_run_leaves_teacher_table_plot_and_log(l2t: Run, digits: Path, tmp_path: Path) -> None:
    outcome = l2t("train-teacher", digits, "--tensorboard-logdir", "tb")
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [0, 1, 2]
    best = max(row["dev_measure"] for row in rows)
    assert f"{best:.4f}" in outcome.out and "Teacher trained" in outcome.out
    assert "runs/tiny/teacher_best.safetensors" in outcome.out
    assert (run / "dev_measure.png").read_bytes().startswith(b"\x89PNG")
    assert load_file(run / "teacher_best.safetensors")
    assert any((tmp_path / "tb").iterdir())
    usual = f"  l2t compare {digits} --teacher runs/tiny/teacher_best.safetensors"
    assert outcome.out.splitlines()[-1] == usual
    assert "\x1b" not in outcome.out  # no terminal, no colours


def test_tensorboard_shows_each_episode_once_after_a_kill(l2t: Run, digits: Path) -> None:
    """And in a run that has grown, whose last episode was made again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = ("train-teacher", digits, "--tensorboard-logdir", "tb")
    assert l2t(*command, "training.episodes=1").code == 0
    for path in Path("tb").iterdir():
        path.unlink()  # as if killed before it was written
    assert l2t(*command, "training.episodes=3").code == 0
    shown = EventAccumulator("tb").Reload().Scalars("teacher/dev_measure")
    assert [event.step for event in shown] == [0, 1, 2, 3]
    assert l2t(*command, "training.episodes=4").code == 0
    shown = EventAccumulator("tb").Reload().Scalars("teacher/dev_measure")
    assert [event.step for event in shown] == [0, 1, 2, 3, 4]
    rows = [json.loads(x) for x in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in shown] == pytest.approx([r["dev_measure"] for r in rows])


def test_a_life_whose_loss_changed_leaves_its_losses_to_be_applied(l2t: Run, digits: Path) -> None:
    changes = ("teacher.name=static", "training.differentiation=windows", "training.window=8")
    done = l2t("train-teacher", digits, *changes, "training.update_rule=lstm")
    assert done.code == 0, done.err
    assert "episodes that taught" in done.out
    files = [f"runs/tiny/teacher_{name}.safetensors" for name in ("best", "lived")]
    last = f"  l2t compare {digits} --teacher {files[0]} --teacher {files[1]}"
    assert done.out.splitlines()[-1] == last
    assert "timed, 3 stretches of a life" in l2t("inspect", files[1]).out
    taught = l2t("apply-teacher", files[1], digits)
    assert taught.code == 0 and "test error" in taught.out, taught.err


def test_a_training_ends_with_the_command_to_go_on_with(
    l2t: Run, digits: Path, tmp_path: Path
) -> None:
    """With the students' changes, quoted, without those of the teacher's training."""
    folder = tmp_path / "a run"
    done = l2t(
        "train-teacher", "tiny.yaml", "image.optimiser={name: momentum, lr: 0.05}",
        "training.episodes=1", "loss.form=shared", "--seed", "7", "--out", folder,
    )
    teacher = "a run/teacher_best.safetensors"
    *_, text = done.out.splitlines()
    assert shlex.split(text) == [
        "l2t", "compare", "tiny.yaml", "image.optimiser={name: momentum, lr: 0.05}",
        "--teacher", teacher, "--out", "a run-compare",
    ]
    planned = l2t(*shlex.split(text)[1:], "--dry-run")
    assert planned.code == 0 and "taught" in planned.out, planned.err


def test_episodes_without_a_usable_hypergradient_say_why(
    l2t: Run, digits: Path, tmp_path: Path
) -> None:
    done = l2t(
        "train-teacher", digits, "--out", tmp_path / "steep", "training.max_growth=1e-9",
        "--log-format", "simple",
    )
    assert done.error().startswith("l2t: error: none of the episodes gave a usable hypergradient")
    rows = done.out.splitlines()
    told = [i for i, row in enumerate(rows) if row.startswith("  skipped: the hypergradient grew")]
    assert len(told) == 3
    assert all(rows[i - 1].startswith("episode ") and "  dev 0." in rows[i - 1] for i in told)


@pytest.mark.parametrize(
    ("measure", "smoothed", "norm", "seconds"),
    [
        (0.9814, 0.963, 0.0535, 0.5), (1.0, -12.3456, 1.234e-05, 725.0),
        (-0.1234, 0.1234, 123456.0, 36_000 * 27.0),
    ],
)
def test_an_episodes_line_fits_eighty_columns(
    measure: float, smoothed: float, norm: float, seconds: float
) -> None:
    row = {
        "episode": 260, "dev_measure": measure, "best": True, "smoothed": smoothed,
        "hypergradient_norm": norm, "seconds": seconds, "students": 16, "students_lost": 2,
        "reason": "lost",
    }
    view = TeacherView(401, "accuracy", LogFormat.simple)
    lines = view.summary(row)
    assert [text[:15] for text in lines] == ["episode 260/400", "  2 of 16 stude"]
    assert all(len(text) <= 80 for text in lines)
    skipped = view.summary({**row, "hypergradient_norm": None})
    assert skipped[1] == "  skipped: lost" and all(len(text) <= 80 for text in skipped)


@pytest.mark.parametrize("score", [0.9814, -123.4567, None])
def test_the_line_on_final_students_fits_eighty_columns(score: float | None) -> None:
    row = {"episode": 260, "dev_measure": score, "students": 100, "students_lost": 100,
           "seconds": 36_000 * 27.0}
    first, second = TeacherView(401, "a measure of a long name", LogFormat.simple).final(row)
    assert first.startswith("teacher of episode 260  ") and len(first) <= 80
    assert second == "  100 of 100 students lost"


def test_the_best_teacher_is_marked_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[list[float]] = []

    def look(figure: Any, to: Path) -> None:
        (axes,) = figure.axes
        marked.extend(axes.lines[-1].get_xydata().tolist())

    monkeypatch.setattr(plots, "_write_png", look)
    history = [
        {"episode": 0, "dev_measure": 0.9, "best": True}, {"episode": 1, "dev_measure": 0.8}
    ]
    # Final students took the second teacher, whose own student was the worse one.
    plots.plot_dev_measure(history, 1, "accuracy", "tiny", tmp_path / "dev.png")
    assert marked == [[1.0, 0.8]]


def test_json_lines_are_all_that_json_prints(l2t: Run, digits: Path) -> None:
    rows = l2t("train-teacher", digits, "--log-format", "json").out.splitlines()
    events = [json.loads(row)["event"] for row in rows]
    assert [e for e in events if e != "step"] == ["plan"] + ["episode"] * 3 + ["result"]
    assert l2t("train-teacher", digits, "--out", "quiet", "--log-format", "none").out == ""


def test_the_same_command_again_changes_nothing(l2t: Run, digits: Path, trained: Path) -> None:
    before = {p.name: p.read_bytes() for p in trained.iterdir() if p.suffix != ".png"}
    outcome = l2t("train-teacher", digits, "--out", trained)
    assert outcome.code == 0 and "finished already, after 3 episodes" in outcome.out
    assert {p.name: p.read_bytes() for p in trained.iterdir() if p.suffix != ".png"} == before


def test_a_cut_log_is_written_anew(l2t: Run, digits: Path, trained: Path) -> None:
    log = trained / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-20])
    assert l2t("train-teacher", digits, "--out", trained).code == 0
    assert log.read_text() == whole


def test_without_its_state_a_run_does_not_claim_to_continue(
    l2t: Run, digits: Path, trained: Path
) -> None:
    (trained / "state.safetensors").unlink()
    outcome = l2t("train-teacher", digits, "--out", trained)
    assert outcome.code == 0 and "episode   0/2" in outcome.out
    assert "continuing" not in outcome.out and "finished already" not in outcome.out


def test_every_field_of_the_log_is_on_the_engines_page(trained: Path) -> None:
    page = (ROOT / "docs/engine.md").read_text(encoding="utf-8")
    table = page.split("| field | meaning |\n|---|---|\n", 1)[1].split("\n\n", 1)[0]
    first = [row.split("|")[1] for row in table.splitlines()]
    told = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    rows = map(json.loads, (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    # Where nothing was skipped, warned of or final.
    assert {key for row in rows for key in row} == told - {"reason", "warning", "scores"}


def test_scalars_that_cannot_be_written(l2t: Run, digits: Path) -> None:
    line = l2t("train-teacher", digits, "--tensorboard-logdir", digits).error()
    assert "--tensorboard-logdir" in line and not Path("runs").exists()


def test_another_runs_folder_is_refused(l2t: Run, digits: Path, trained: Path) -> None:
    line = l2t("train-teacher", digits, "training.lr=0.5", "--out", trained).error()
    assert "training.lr is 0.003 there, 0.5 here" in line
    assert "--out" in l2t("train-teacher", digits, "--no-resume", "--out", trained).error()


def test_a_finished_run_goes_on_for_longer(l2t: Run, digits: Path, trained: Path) -> None:
    copied = shutil.copytree(trained, "longer")
    outcome = l2t("train-teacher", digits, "training.episodes=3", "--out", copied)
    assert outcome.code == 0 and "continuing longer after 3 episodes" in outcome.out
    assert l2t("train-teacher", digits, "training.episodes=3", "--out", "whole").code == 0
    for name in ("teacher_best.safetensors", "teacher_last.safetensors"):
        assert Path("longer", name).read_bytes() == Path("whole", name).read_bytes()
    refused = l2t("train-teacher", digits, "--out", copied).error()
    assert "training.episodes=3, which may only grow" in refused


def test_a_run_that_cannot_go_on_stays_as_it_is(l2t: Run, digits: Path, trained: Path) -> None:
    (trained / "state.safetensors").write_bytes(b"damaged")
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    line = l2t("train-teacher", digits, "training.episodes=5", "--out", trained).error()
    assert "state.safetensors is damaged" in line
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


def test_anothers_state_is_one_plain_line(l2t: Run, digits: Path, trained: Path) -> None:
    state = trained / "state.safetensors"
    save_tensors_and_record(state, {"theta.b": torch.ones(2)}, {"progress": {"episode": 1}})
    line = l2t("train-teacher", digits, "--out", trained).error()
    assert f"{state} does not belong to this run; put its own there again" in line
    teacher = trained / "teacher_best.safetensors"
    snapshot = Path("used/taught/seed-1/snapshot.safetensors")
    assert l2t("apply-teacher", teacher, digits, "--out", "used").code == 0
    for kept in snapshot.parent.iterdir():
        kept.unlink()
    shutil.copy(state, snapshot)
    line = l2t("apply-teacher", teacher, digits, "--out", "used").error()
    assert "snapshot.safetensors does not belong to this student; delete it" in line


# A run that Ctrl-C meets in the middle of its fourth student's life.
INTERRUPTED = """\
import signal, sys
from l2t_cli.main import main
from l2t_core.training.episodes import TeacherTraining
inner = TeacherTraining._on_step
def met(self, episode, number, students, on_event):
    on_step = inner(self, episode, number, students, on_event)
    def step(phase, at):
        on_step(phase, at)
        if (episode, phase, at) == (3, "forward", 9):
            signal.raise_signal(signal.SIGINT)
    return step
TeacherTraining._on_step = met
main(sys.argv[1:])
"""


def test_killed_and_continued_is_the_same_run(l2t: Run, digits: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer.yaml"
    longer.write_text(digits.read_text().replace("episodes: 2", "episodes: 12"))
    assert l2t("train-teacher", longer, "--out", "whole").code == 0
    child = start_python("-c", INTERRUPTED, "train-teacher", longer, "--out", "parts")
    check_interrupted(child, "the finished episodes are kept")
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 3
    assert l2t("train-teacher", longer, "--out", "parts").code == 0
    for name in ("teacher_best.safetensors", "teacher_last.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_applied_beside_cross_entropy(l2t: Run, digits: Path, trained: Path) -> None:
    teacher = trained / "teacher_best.safetensors"
    arguments = ("apply-teacher", teacher, digits, "--out", "applied", "--baseline")
    outcome = l2t(*arguments, "--seeds", "2")
    assert outcome.code == 0, outcome.err
    result = json.loads(Path("applied/result.json").read_text())
    assert {arm: [s["seed"] for s in scores] for arm, scores in result["scores"].items()} == {
        "taught": [1, 2],
        "cross_entropy": [1, 2],
    }
    values = [score["value"] for score in result["scores"]["taught"]]
    mean = sum(values) / 2
    assert f"{mean:.2f} ± " in outcome.out and "signature: " in outcome.out
    assert "(2 students each: so few tell nothing about chance)" in outcome.out
    assert "Cross-entropy's learning rate was not tuned here; `l2t compare`" in outcome.out
    # A third seed trains one student more for each arm and leaves the finished ones alone.
    again = l2t(*arguments, "--seeds", "3")
    assert again.out.count("(finished before)") == 4
    result = json.loads(Path("applied/result.json").read_text())
    assert len(result["scores"]["taught"]) == 3
    against = result["against_cross_entropy"]
    assert f"{against['low']:+.2f} to {against['high']:+.2f}" in again.out


def test_students_of_earlier_commands_stay_in_the_result(
    l2t: Run, digits: Path, trained: Path
) -> None:
    teacher = trained / "teacher_best.safetensors"
    command = ("apply-teacher", teacher, digits, "--out", "used", "--seed")
    for seed in ("4", "1", "2"):
        assert l2t(*command, seed).code == 0
    before = {p: p.stat().st_mtime_ns for p in Path("used").rglob("student.pt")}
    assert len(before) == 3
    outcome = l2t(*command, "2", "--baseline", "--seeds", "2")
    assert outcome.code == 0, outcome.err
    scores = json.loads(Path("used/result.json").read_text())["scores"]
    seeds = {arm: [score["seed"] for score in found] for arm, found in scores.items()}
    assert seeds == {"taught": [1, 2, 3, 4], "cross_entropy": [2, 3]}
    assert " 1-4 " in outcome.out and " 2-3 " in outcome.out
    assert {p: p.stat().st_mtime_ns for p in before} == before  # none was trained again
    # Those of both arms are compared, and it says so.
    against = json.loads(Path("used/result.json").read_text())["against_cross_entropy"]
    pairs = zip(scores["taught"][1:3], scores["cross_entropy"], strict=True)
    difference = sum(ours["value"] - theirs["value"] for ours, theirs in pairs) / 2
    assert against["difference"] == pytest.approx(difference)
    assert "compared on the seeds that both have (2-3)" in outcome.out
    assert "(2 students each" in outcome.out and "same steps, batches" not in outcome.out
    # A score that cannot be read is told before anything is trained.
    Path("used/taught/seed-4/score.json").write_text("{")
    line = l2t(*command, "7").error()
    assert "seed-4/score.json is damaged" in line and not Path("used/taught/seed-7").exists()


def test_an_applications_json_is_one_line(l2t: Run, digits: Path, trained: Path) -> None:
    teacher = trained / "teacher_best.safetensors"
    outcome = l2t("apply-teacher", teacher, digits, "--out", "used", "--log-format", "json")
    assert outcome.code == 0, outcome.err
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert events[-1].pop("event") == "result"
    assert events[-1] == json.loads(Path("used/result.json").read_text())
    assert all(event["event"] == "step" for event in events[:-1])


def test_the_time_of_a_stopped_student_counts_every_start(
    l2t: Run, digits: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, batch = trained / "teacher_best.safetensors", ImageStudent.batch

    def stopped(self: ImageStudent, step: int) -> Any:
        if step == 501:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(ImageStudent, "batch", stopped)
    command = ("apply-teacher", teacher, digits, "image.steps=502", "--out", "used")
    assert l2t(*command).code == 130
    monkeypatch.setattr(ImageStudent, "batch", batch)
    snapshot = Path("used/taught/seed-1/snapshot.safetensors")
    stored = load_tensors_and_record(snapshot)
    assert stored is not None
    tensors, record = stored
    record["applied"]["seconds"] += 1000.0
    save_tensors_and_record(snapshot, tensors, record)
    assert l2t(*command).code == 0
    assert json.loads(Path("used/taught/seed-1/score.json").read_text())["seconds"] > 1000.0


@pytest.mark.parametrize("file", ["student.pt", "score.json"])
def test_a_student_is_not_lost_where_its_result_cannot_be_written(
    l2t: Run, digits: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    command = ["apply-teacher", trained / "teacher_best.safetensors", digits, "image.steps=502"]
    assert l2t(*command, "--out", "whole").code == 0
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    assert f"{file}: No space left on device; free some" in l2t(*command, "--out", "used").error()
    monkeypatch.setattr(Path, "replace", replace)
    steps, batch = [], ImageStudent.batch

    def counted(self: ImageStudent, step: int) -> Any:
        steps.append(step)
        return batch(self, step)

    monkeypatch.setattr(ImageStudent, "batch", counted)
    assert l2t(*command, "--out", "used").code == 0
    assert set(steps) == {500, 501}
    place = Path("used/taught/seed-1")
    assert sorted(p.name for p in place.iterdir()) == ["score.json", "student.pt"]
    for name in ("student.pt", "result.json"):
        paths = [next(Path(out).rglob(name)) for out in ("whole", "used")]
        one, other = (re.sub(r'"seconds": .*', "", p.read_bytes().decode("latin-1")) for p in paths)
        assert one == other


def test_application_is_repeatable(l2t: Run, digits: Path, trained: Path) -> None:
    teacher = trained / "teacher_best.safetensors"
    for out in ("first", "second"):
        assert l2t("apply-teacher", teacher, digits, "--out", out).code == 0
    name = "taught/seed-1/student.pt"
    first, second = (
        torch.load(Path(o) / name, weights_only=True)["state"] for o in ("first", "second")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_all_students_have_the_teacher_that_there_was_at_the_start(
    l2t: Run, digits: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its training goes on, a teacher's file is replaced after every episode."""
    teacher = trained / "teacher_best.safetensors"
    before, run = teacher.read_bytes(), ImageApplication.run

    def replaced(self: ImageApplication, *given: Any) -> Score:
        write_teacher(teacher, 10, kind="classes")
        return run(self, *given)

    assert l2t("apply-teacher", teacher, digits, "--out", "whole", "--seeds", "3").code == 0
    monkeypatch.setattr(ImageApplication, "run", replaced)
    command = ("apply-teacher", teacher, digits, "--out", "used", "--seeds")
    assert l2t(*command, "2").code == 0
    assert teacher.read_bytes() != before
    again = l2t(*command, "3")
    assert again.code == 0 and "has changed since this began" in again.out
    assert again.out.count("(finished before)") == 2
    whole, used = (json.loads(Path(o, "result.json").read_text()) for o in ("whole", "used"))
    assert used["teacher"] == str(teacher)
    assert used["teacher_sha256"] == hashlib.sha256(before).hexdigest()
    values = [[s["value"] for s in r["scores"]["taught"]] for r in (whole, used)]
    assert values[0] == values[1]
    for seed in (1, 2, 3):
        name = f"taught/seed-{seed}/student.pt"
        states = [torch.load(Path(o, name), weights_only=True)["state"] for o in ("whole", "used")]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    # Another file is another teacher; a copy that is lost has no other.
    other = write_teacher(trained / "other.safetensors", 10, kind="classes")
    refused = l2t("apply-teacher", other, digits, "--out", "used").error()
    assert "the teacher is another now" in refused
    next(Path("used").glob("teacher-*.safetensors")).write_bytes(b"")
    assert "missing or damaged" in l2t(*command, "3").error()


def test_no_word_is_broken_on_a_narrow_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    console._console.cache_clear()
    taught = {seed: Score(9.0 + seed, "s", 3_900.0) for seed in (1, 2, 3, 9)}
    taught[4] = Score(None, "s", 2.0, "at step 3")
    others = {seed: Score(11.0 - seed / 2, "s", 1.0) for seed in (1, 2, 3, 9)}
    scores = {"taught": taught, "cross_entropy": others}
    result = ApplicationResult("tiny", "error %", True, 100.0, scores, Path("out"))
    report(result, LogFormat.simple)
    table = [line for line in capsys.readouterr().out.splitlines() if line[:1] in tuple("╭│╰├")]
    assert max(map(len, table)) <= 80 and sum(line.startswith("╭") for line in table) == 2
    columns, rows = result.table()
    assert all(f" {cell} " in "\n".join(table) for row in [columns, *rows] for cell in row)


@pytest.mark.parametrize(
    ("taught", "others", "said"),
    [
        ([3.0, 3.1, 3.3], [4.0, 4.2, 4.1], "taught came out better than cross-entropy by 0.97"),
        ([4.0, 4.2, 4.1], [3.0, 3.1, 3.3], "taught came out worse than cross-entropy by 0.97"),
        ([3.0, 3.1, 3.3], [3.1, 3.0, 3.9], "are not told apart (3 students each, p 0.438)"),
        ([3.0, 3.1, 3.3], [4.0, 4.1, 4.3], "are not told apart (3 students each, every seed"),
        ([3.0, 3.1], [4.0, 4.3], "better than cross-entropy by 1.10 points of error (2 students"),
        ([3.0], [3.0], "taught came out as cross-entropy did (1 student each: so few tell"),
    ],
)
def test_what_chance_may_have_done_is_no_difference(
    taught: list[float], others: list[float], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {
        arm: {seed: Score(value, "s", 1.0) for seed, value in enumerate(values, 1)}
        for arm, values in (("taught", taught), ("cross_entropy", others))
    }
    result = ApplicationResult("tiny", "error %", True, 100.0, scores, Path("out"))
    assert said in result.verdict()
    report(result, LogFormat.simple)
    printed = capsys.readouterr().out
    assert ("95 % interval" in printed) == (len(taught) > 2)
    p = stats.ttest_rel(taught, others).pvalue
    tested = "told apart (3 students each, every" not in said and len(taught) > 2
    assert (f" {p:.3f} │" in printed) == tested
    assert printed.count(NOT_TUNED) == 1


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (120, 1)])
def test_the_table_of_students_fits_the_screen(
    width: int, tables: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    console._console.cache_clear()
    taught = {seed: Score(2.0 + seed / 8, "s", 71.0) for seed in range(1, 6)}
    others = {**taught, 5: Score(None, "", 71.0, diverged="lost")}
    scores = {"taught": taught, "cross_entropy": others}
    result = ApplicationResult("tiny", "error %", True, 100.0, scores, Path("out"))
    report(result, LogFormat.simple)
    printed = capsys.readouterr().out.splitlines()
    drawn = [row for row in printed if row[0] in "╭│├╰"]
    assert all(len(row) <= width for row in drawn) and len(drawn) == 6 * tables  # no cell folded
    assert all(any(text in row for row in drawn) for text in (*result.table()[0], "1 min 11 s"))


def test_the_demos_json_is_one_line(l2t: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its parts train is tested elsewhere."""
    scores = {"taught": {1: Score(3.0, "s", 1.0)}, "cross_entropy": {1: Score(4.0, "s", 1.0)}}
    result = ApplicationResult("tiny", "error %", True, 100.0, scores, Path("out"))
    monkeypatch.setattr("l2t_cli.demo.run_part", lambda *_: result)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets, for good
    (line,) = l2t("demo", "--out", "demo", "--log-format", "json").out.splitlines()
    event = json.loads(line)
    assert event["event"] == "result"
    assert event["parts"] == json.loads(Path("demo/demo.json").read_text())
    assert event["parts"][0]["taught"] == [3] and Path("demo/demo.png").exists()


def test_a_diverged_student_counts_as_worst_and_the_others_go_on(
    l2t: Run, digits: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, batch = trained / "teacher_best.safetensors", ImageStudent.batch

    def lost(self: ImageStudent, step: int) -> Any:
        images, labels = batch(self, step)
        return images * float("nan") if self.seed == 2 and step == 5 else images, labels

    monkeypatch.setattr(ImageStudent, "batch", lost)
    command = ("apply-teacher", teacher, digits, "--out", "used", "--seeds", "3", "--baseline")
    outcome = l2t(*command)
    assert outcome.code == 0, outcome.err
    assert "taught, seed 2: diverged (the student diverged at step 5)" in outcome.out
    warning = "1 of 3 students diverged and count as worst (test error 100.00 %)"
    assert outcome.out.count(warning) == 2
    result = json.loads(Path("used/result.json").read_text())
    for scores in result["scores"].values():
        assert [bool(score["diverged"]) for score in scores] == [False, True, False]
        assert scores[1]["value"] is None
        mean = (scores[0]["value"] + 100.0 + scores[2]["value"]) / 3
        assert f" {mean:.2f} ± " in outcome.out
    assert outcome.out.count(" 1 of 3 ") == 4  # in the table and in words
    monkeypatch.setattr(ImageStudent, "batch", batch)
    again = l2t(*command)
    assert again.out.count("(finished before)") == 6 and "seed 2: diverged" in again.out


def test_students_that_all_diverge_are_one_line(l2t: Run, digits: Path, trained: Path) -> None:
    teacher = trained / "teacher_best.safetensors"
    command = ("apply-teacher", teacher, digits, "image.optimiser.lr=1e30", "--out", "used")
    line = l2t(*command, "--baseline", "--seeds", "2").error()
    assert "all 4 students diverged (the student diverged at step 1); lower" in line
    assert "image.optimiser.lr" in line and not Path("used").exists()
    line = l2t(*command, "image.steps=1", "image.dev_interval=1").error()
    assert "(the student diverged at its last step)" in line and not Path("used").exists()


@pytest.mark.parametrize("model", ["mlp", "convnet", "own_used:net"])
def test_a_student_is_used_as_the_page_says(
    l2t: Run, digits: Path, trained: Path, model: str
) -> None:
    Path("own_used.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    teacher, change = trained / "teacher_best.safetensors", f"image.model={model}"
    outcome = l2t("apply-teacher", teacher, digits, change, "--out", "runs/digits-taught")
    assert outcome.code == 0, outcome.err
    folder = Path("runs/digits-taught/taught/seed-1")
    page = (ROOT / "docs" / "images.md").read_text()
    lines = page.partition("## Use the student")[2].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(lines, names)
    data = load_data(load_recipe(str(digits)).student)
    wrong = (names["predict"](data.test_x) != data.test_y).double().mean()
    score = json.loads((folder / "score.json").read_text())
    assert 100 * float(wrong) == pytest.approx(score["value"], abs=1e-9)
    # Nothing of the vector that the parameters were views of.
    size = sum(v.numel() * v.element_size() for v in names["model"].state_dict().values())
    assert (folder / "student.pt").stat().st_size < size + 8_000


def test_dry_run_of_an_application_writes_nothing(l2t: Run, digits: Path, trained: Path) -> None:
    teacher = trained / "teacher_best.safetensors"
    before = set(Path().iterdir())
    outcome = l2t("apply-teacher", teacher, digits, "--baseline", "--dry-run")
    assert outcome.code == 0 and "24 steps" in outcome.out and "cross-entropy" in outcome.out
    assert set(Path().iterdir()) == before


def test_damaged_and_foreign_teachers_are_refused(
    l2t: Run, digits: Path, trained: Path, tmp_path: Path
) -> None:
    whole = (trained / "teacher_best.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content in (
        b"",
        whole[:5],
        whole[:100],
        whole[:-8],
        whole[:-8] + bytes(byte ^ 1 for byte in whole[-8:]),
        b"x" * 5000,
        torch.ones(3).numpy().tobytes(),
    ):
        bad.write_bytes(content)
        assert "bad.safetensors" in l2t("apply-teacher", bad, digits).error()
        assert "bad.safetensors" in l2t("inspect", bad).error()
        assert "bad.safetensors" in l2t("inspect", bad, "--json").error()
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, bad)
    assert "holds no l2t teacher" in l2t("apply-teacher", bad, digits).error()
    assert not Path("runs").exists()


def test_another_application_in_the_folder_is_refused(
    l2t: Run, digits: Path, trained: Path
) -> None:
    teacher = trained / "teacher_best.safetensors"
    assert l2t("apply-teacher", teacher, digits, "--out", "applied").code == 0
    line = l2t("apply-teacher", teacher, digits, "image.hidden=8", "--out", "applied").error()
    assert "hidden is 16 there, 8 here" in line


def test_inspect_shows_header_and_coefficients(l2t: Run, trained: Path) -> None:
    teacher = trained / "teacher_best.safetensors"
    outcome = l2t("inspect", teacher)
    pull = "How the loss pulls at an example"
    for text in ("diagonal, softplus", "10 classes", "24 steps", "t/T = 0.5", "tiny", pull):
        assert text in outcome.out
    header = json.loads(l2t("inspect", teacher, "--json").out)
    assert header["num_classes"] == 10 and header["loss"]["form"] == "diagonal"


def test_inspect_shows_every_band(l2t: Run, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "banded.safetensors", 100, "banded", kind="classes")
    outcome = l2t("inspect", teacher)
    assert outcome.code == 0
    for text in ("1 to 2", "3 to 6", "7 to 14", "15 to 30", "31 to 62", "63 to 99"):
        assert text in outcome.out
    # A static teacher looks at no class.
    assert "100 classes, and any other number" in outcome.out


def test_inspect_shows_what_a_memory_makes_of_a_life(l2t: Run, tmp_path: Path) -> None:
    """Every step is gone through, so that the loss at its end is that of a whole life."""
    features = ["progress"]
    spec = TeacherSpec("lstm", slots=2, init_scale=1.0, features=features, hidden=3)
    loss = LossSpec("shared", warmup_steps=5)
    fingerprint = {"kind": "classes", "num_classes": 4}
    teacher = build_teacher(spec, loss, 4, 1, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    path = tmp_path / "t.safetensors"
    save_teacher(path, teacher, TeacherHeader(spec, loss, 4, 40, 5, fingerprint))
    applied = AppliedTeacher.from_file(path, 40)
    for _ in range(39):
        applied.begin_step(0.1)
        applied.commit(TrainStatistics(1.0, 0.5))
    last = f"{float(applied.begin_step(0.1)['d']):.4f}"
    outcome = l2t("inspect", path)
    assert outcome.code == 0 and "lstm, 2 slots, 3 units that remember" in outcome.out
    (row,) = [line for line in outcome.out.splitlines() if "d [scalar]" in line]
    assert row.rstrip(" │").endswith(last)


def test_inspect_does_not_go_through_all_of_a_life_beyond_measure(
    l2t: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor need it: this teacher's units remember for two steps."""
    spec = TeacherSpec("lstm", slots=2, init_scale=1.0, features=["progress"], hidden=1)
    loss, fingerprint = LossSpec("shared"), {"kind": "classes", "num_classes": 4}
    path, shown = tmp_path / "t.safetensors", []
    for steps, far in ((2_000, 2_000), (2_000, 40), (10**11, 40)):
        monkeypatch.setattr("l2t_cli.inspect_teacher.STEPS_BEFORE_A_POINT", far)
        header = TeacherHeader(spec, loss, 4, steps, 5, fingerprint)
        save_teacher(path, build_teacher(spec, loss, 4, 1, seed=2), header)
        outcome = l2t("inspect", path)
        assert outcome.code == 0
        shown.append([line for line in outcome.out.splitlines() if "d [scalar]" in line])
    assert shown[0] == shown[1] and len(shown[2]) == 1


def test_inspect_shows_a_confusion_without_its_signs(l2t: Run, tmp_path: Path) -> None:
    """On a screen of 80 columns, a line for each target."""
    teacher = write_teacher(tmp_path / "confusion.safetensors", 10, "confusion", kind="classes")
    outcome = l2t("inspect", teacher)
    assert outcome.code == 0
    table = outcome.out[outcome.out.index("C² at t/T = 0.5") :].split("How the loss")[0]
    assert len(table.splitlines()) == 15 and "-0." not in table
    assert max(map(len, table.splitlines())) <= 80


def test_inspect_breaks_no_number_in_two(
    l2t: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 80 columns what is told over time comes in two tables."""
    monkeypatch.setenv("COLUMNS", "80")
    console._console.cache_clear()  # it may have met another screen
    teacher = write_teacher(tmp_path / "dense.safetensors", 10, "dense", kind="classes")
    out = l2t("inspect", teacher).out
    lines = [line.strip("│ ") for line in out.splitlines() if line.startswith("│")]
    told = [re.split(r"\s*│\s*", line) for line in lines if "±" in line]
    assert len(told) == 2 * (2 + len(PROBABILITIES))  # W and b
    assert all(re.fullmatch(r"-?[\d.]+ ± [\d.]+", cell) for row in told for cell in row[1:])
    assert sum("t/T = 0.25" in line for line in lines) == 2
    assert max(map(len, lines)) <= 76


def test_inspect_shows_a_small_w_whole(l2t: Run, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "dense.safetensors", 7, "dense", kind="classes")
    network, header = load_teacher(teacher)
    w = torch.rand(7, 7, generator=torch.Generator().manual_seed(1))
    network.values["W"].data[0] = w  # type: ignore[operator,union-attr]
    save_teacher(teacher, network, header)
    outcome = l2t("inspect", teacher)
    assert outcome.code == 0 and "W at t/T = 0.5" in outcome.out
    rows = outcome.out[outcome.out.index("W at") :].splitlines()
    row = next(line for line in rows if line.startswith("│ 2 "))
    assert [float(cell) for cell in row.strip("│ ").split("│")] == pytest.approx(
        [2, *w[:, 2].tolist()], abs=0.0051
    )
    for classes, shown in ((10, True), (11, False)):
        other = write_teacher(tmp_path / "other.safetensors", classes, "dense", kind="classes")
        assert ("W at" in l2t("inspect", other).out) == shown
