"""``l2t compare`` and ``l2t transfer``: fair by construction, resumable, reported as measured."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkout import (  # type: ignore[import-not-found]
    LIMIT,
    ROOT,
    check_interrupted,
    end_of,
    start_python,
)
from in_process import DIGITS, Run, write_teacher  # type: ignore[import-not-found]
from scipy import stats

from l2t_cli.applying.teacher_copies import TeacherCopies
from l2t_cli.comparing.command import Comparison, load_for_comparison
from l2t_cli.comparing.image import ImageTrials
from l2t_cli.comparing.plan import Arm, Tuning, arms
from l2t_cli.comparing.report import (
    markdown,
    show,
    summarise,
    table_rows,
    teacher_cost,
    verdict,
)
from l2t_cli.comparing.trials import Result, Trial, TrialStore
from l2t_cli.recipe_reading.fields import FIELDS
from l2t_cli.screen import console, plots
from l2t_cli.screen.console import LogFormat
from l2t_cli.train_teacher import run as train
from l2t_core.comparing.statistics import PairedComparison, Point
from l2t_core.errors import UserError
from l2t_core.losses.baselines import BASELINES
from l2t_core.losses.steps import FixedLoss
from l2t_core.runs.files import SNAPSHOT, claimed
from l2t_core.specs import LEARNED_RULES, OF_TWO_LIVES
from l2t_core.students.train import train_student
from l2t_core.teachers.file import load_teacher, save_teacher
from l2t_vision.student import ImageStudent

COMPARE = """\
compare:
  losses: [cross_entropy, label_smoothing, large_margin]
  lr: [0.1, 0.4]
  trials: 3
  seeds: 3
  label_smoothing: {eps: [0.1]}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Return a tiny recipe with a comparison of 9 + 9 trials."""
    path = tmp_path / "tiny.yaml"
    path.write_text(DIGITS + COMPARE)
    return path


@dataclass(frozen=True)
class Watched:
    """A finished comparison and what its students did."""

    folder: Path
    summary: dict[str, Any]
    trials: list[dict[str, Any]]
    batches: dict[Trial, list[Any]]
    test_read: list[Trial]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Run a comparison with a teacher, noting every batch and every look at the test set."""
    root = tmp_path_factory.mktemp("compare")
    recipe = root / "tiny.yaml"
    recipe.write_text(DIGITS + COMPARE)
    loaded = load_for_comparison(str(recipe), [])
    teacher = train(loaded, root / "teacher", log_format=LogFormat.none)
    batches: dict[Trial, list[Any]] = defaultdict(list)
    test_read: list[Trial] = []
    current: list[Trial] = []
    original = {n: getattr(ImageStudent, n) for n in ("batch", "test_error")}
    run = ImageTrials.run

    def watched_run(self: ImageTrials, trial: Trial, folder: Path) -> Result:
        current[:] = [trial]
        return run(self, trial, folder)

    def batch(self: ImageStudent, step: int) -> Any:
        found = original["batch"](self, step)
        chosen = (self.seed, step, self.indices(step).tolist())
        batches[current[0]].append(chosen) if current else None
        return found

    def test_error(self: ImageStudent) -> float:
        test_read.append(current[0])
        return float(original["test_error"](self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTrials, "run", watched_run)
        patch.setattr(ImageStudent, "batch", batch)
        patch.setattr(ImageStudent, "test_error", test_error)
        comparison = Comparison(loaded, [teacher], root / "out")
        summary = comparison.run(1, LogFormat.none, report=False)
    files = sorted((root / "out" / "trials").glob("*.json"))
    trials = [json.loads(path.read_text()) for path in files]
    return Watched(root / "out", summary, trials, batches, test_read)


def test_all_losses_get_as_many_trials_and_the_same_seeds(watched: Watched) -> None:
    kinds = Counter((t["trial"]["arm"], t["trial"]["final"]) for t in watched.trials)
    arms = ("cross_entropy", "label_smoothing", "large_margin", "taught")
    assert kinds == {(arm, final): 3 for arm in arms for final in (True, False)}
    seeds = defaultdict(set)
    for t in watched.trials:
        seeds[t["trial"]["arm"], t["trial"]["final"]].add(t["trial"]["seed"])
    assert all(seeds[arm, True] == {1, 2, 3} for arm in arms)
    assert all(not seeds[arm, False] & {1, 2, 3} for arm in arms)


def test_all_losses_see_the_same_batches(watched: Watched) -> None:
    for seed in (1, 2, 3):
        finals = [t for t in watched.batches if t.final and t.seed == seed]
        assert len(finals) == 4
        # The large margin looks at one batch more, before the student is reset.
        seen = [[b for b in watched.batches[t] if b[0] == seed][-24:] for t in finals]
        assert [step for _, step, _ in seen[0]] == list(range(24))
        assert all(other == seen[0] for other in seen)
    assert {r["result"]["steps"] for r in watched.trials} == {24}


def test_test_is_read_once_by_each_final_student_and_by_no_other(watched: Watched) -> None:
    assert Counter(watched.test_read) == {t: 1 for t in watched.batches if t.final}
    for t in watched.trials:
        assert (t["result"]["test"] is not None) == t["trial"]["final"]


def test_the_choice_is_the_best_on_dev(watched: Watched) -> None:
    for row in watched.summary["losses"]:
        tuned = [t for t in watched.trials if t["trial"]["arm"] == row["name"]]
        tuned = [t for t in tuned if not t["trial"]["final"]]
        best = max(tuned, key=lambda t: (t["result"]["dev"], -t["result"]["nll"]))["trial"]
        assert (row["lr"], row["settings"]) == (best["lr"], best["settings"])
        assert len(row["tuning"]) == 3


def test_the_report_is_what_the_trial_files_say(watched: Watched) -> None:
    by_arm: dict[str, dict[int, float]] = defaultdict(dict)
    cost: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for t in watched.trials:
        trial, result = t["trial"], t["result"]
        if trial["final"]:
            by_arm[trial["arm"]][trial["seed"]] = result["test"]
        cost[trial["arm"]][0] += result["seconds"]
        cost[trial["arm"]][1] += result["steps"]
    reference = [by_arm["cross_entropy"][seed] for seed in (1, 2, 3)]
    report = (watched.folder / "comparison.md").read_text()
    for row in watched.summary["losses"]:
        values = [by_arm[row["name"]][seed] for seed in (1, 2, 3)]
        assert row["test"] == values
        assert f"{mean(values):.2f} ± {stdev(values):.2f}" in report
        assert row["students_seconds"] == pytest.approx(cost[row["name"]][0])
        assert row["students_steps"] == cost[row["name"]][1] == 6 * 24
        if row["name"] == "cross_entropy":
            continue
        against = row["against_cross_entropy"]
        assert against["difference"] == pytest.approx(mean(values) - mean(reference))
        change = (mean(values) - mean(reference)) / mean(reference)
        assert against["relative"] == pytest.approx(change)
        assert row["change"] == pytest.approx(100 * change)
        assert f"{100 * change:+.1f} %" in report
        if against["t_p"] is not None:
            p = stats.ttest_rel(values, reference).pvalue
            assert against["t_p"] == pytest.approx(p)
            assert (f"| {p:.3f} |" if p >= 0.0005 else "| <0.001 |") in report
    assert watched.summary["change_unit"] == "%"
    assert watched.summary == json.loads((watched.folder / "comparison.json").read_text())
    with (watched.folder / "students.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    final = {(r["loss"], int(r["seed"])): float(r["test"]) for r in rows if r["kind"] == "final"}
    assert final == {(a, s): v for a, seeds in by_arm.items() for s, v in seeds.items()}
    for picture in ("learning_curves.png", "scores.png"):
        assert (watched.folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("lower_is_better", "better", "worse"), [(True, "a", "b"), (False, "b", "a")]
)
def test_the_verdict_goes_by_sign_and_p(lower_is_better: bool, better: str, worse: str) -> None:
    def row(label: str, difference: float, p: float) -> dict[str, Any]:
        found = asdict(PairedComparison(difference, None, 0.0, 0.0, None, p))
        return {"label": label, "against_cross_entropy": found}

    rows = [{"label": "cross-entropy"}, row("a", -1, 0.01), row("b", 1, 0.01), row("c", -9, 0.06)]
    summary = {"losses": rows, "seeds": [1, 2], "lower_is_better": lower_is_better}
    assert verdict(summary) == (
        "against tuned cross-entropy over 2 seeds: "
        f"better: {better}; worse: {worse}; not told apart: c"
    )


def test_the_teachers_training_is_part_of_its_cost(watched: Watched, tmp_path: Path) -> None:
    taught = watched.summary["losses"][-1]
    rows = (watched.folder.parent / "teacher" / "metrics.jsonl").read_text().splitlines()
    assert taught["teacher_seconds"] == pytest.approx(sum(json.loads(r)["seconds"] for r in rows))
    assert taught["teacher_steps"] == 3 * 24
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((watched.folder.parent / "teacher" / "teacher_best.safetensors").read_bytes())
    assert teacher_cost(alone, tmp_path) == (None, 3 * 24)
    # The training has gone on since: what the teacher cost is the first part of its log.
    (tmp_path / "metrics.jsonl").write_text("\n".join([*rows, rows[-1]]))
    assert teacher_cost(alone, tmp_path) == (taught["teacher_seconds"], 3 * 24)
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows[:-1]))
    assert teacher_cost(alone, tmp_path) == (None, 3 * 24)
    windows = [("windows", rule) for rule in LEARNED_RULES]
    for way, rule in [*((way, "adam") for way in OF_TWO_LIVES), *windows]:
        network, header = load_teacher(alone)
        header.record["training"] |= {"differentiation": way, "update_rule": rule}
        save_teacher(alone, network, header)
        assert teacher_cost(alone, tmp_path)[1] == 2 * 3 * 24


@pytest.mark.parametrize("command", ["compare", "transfer"])
def test_all_students_have_the_teacher_that_there_was_at_the_start(
    l2t: Run, tiny: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    shutil.copytree(watched.folder.parent / "teacher", "T")
    teacher = Path("T/teacher_best.safetensors")
    before, run = hashlib.sha256(teacher.read_bytes()).hexdigest(), ImageTrials.run
    given = ("--teacher", teacher) if command == "compare" else (teacher,)
    seeds = [f"compare.seeds={n}" for n in (2, 3)]
    arguments = (command, *given, tiny, "--jobs", "1", "compare.lr=[0.1,0.4]", "compare.losses=[]")
    assert l2t(*arguments, seeds[1], "--out", "whole").code == 0

    def replaced(self: ImageTrials, trial: Trial, folder: Path) -> Result:
        write_teacher(teacher, 10, kind="classes")
        return run(self, trial, folder)

    monkeypatch.setattr(ImageTrials, "run", replaced)
    assert l2t(*arguments, seeds[0], "--out", "used").code == 0
    again = l2t(*arguments, seeds[1], "--out", "used")
    assert again.code == 0, again.err
    assert "10 of 12 trials were finished before" in again.out
    assert "warning: taught: T/teacher_best" in again.out
    name = "comparison.json" if command == "compare" else "tiny/comparison.json"
    whole, used = (json.loads(Path(o, name).read_text())["losses"] for o in ("whole", "used"))
    assert [row["test"] for row in whole] == [row["test"] for row in used]
    assert used[1]["teacher"] == str(teacher)
    assert used[1]["teacher_seconds"] == whole[1]["teacher_seconds"] is not None
    trials = [json.loads(path.read_text())["trial"] for path in Path("used").rglob("trials/*.json")]
    assert {t["teacher_sha256"] for t in trials if t["arm"] == "taught"} == {before}


def test_final_students_are_part_of_a_teachers_cost(l2t: Run, tiny: Path) -> None:
    finals = ("training.finalists=2", "training.final_students=2")
    plan = l2t("train-teacher", tiny, *finals, "--dry-run").out
    assert "3 students of 24 steps each, 4 final ones, into" in plan
    outcome = l2t("train-teacher", tiny, *finals)
    assert outcome.code == 0, outcome.err
    rows = [json.loads(r) for r in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["episode"] * 3 + ["final"] * 2
    for row in rows[3:]:
        line = f"teacher of episode {row['episode']}  dev {row['dev_measure']:.4f}  over 2 final"
        assert line in outcome.out
    best = max(rows[3:], key=lambda row: row["dev_measure"])
    assert f"{best['dev_measure']:.4f} (episode {best['episode']})" in outcome.out
    seconds, steps = teacher_cost(Path("runs/tiny/teacher_best.safetensors"), Path("runs/tiny"))
    assert steps == (3 + 4) * 24
    assert seconds == pytest.approx(sum(row["seconds"] for row in rows))


def test_a_killed_comparison_repeats_no_finished_trial(
    l2t: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = ImageTrials.run, Counter[str]()

    def interrupted(self: ImageTrials, trial: Trial, folder: Path) -> Result:
        if sum(ran.values()) in (5, 13):  # in the tuning, then among the final students
            ran["killed"] += 1
            raise KeyboardInterrupt
        ran[trial.title()] += 1
        return run(self, trial, folder)

    monkeypatch.setattr(ImageTrials, "run", interrupted)
    for _ in range(2):
        stopped = l2t("compare", tiny, "--jobs", "1")
        assert stopped.code == 130
        assert stopped.err == (
            "l2t: interrupted: finished trials are kept; the same command continues\n"
        )
    finished = l2t("compare", tiny, "--jobs", "1")
    assert finished.code == 0 and "12 of 18 trials were finished before" in finished.out
    assert ran.pop("killed") == 2
    assert len(ran) == 18 and set(ran.values()) == {1}
    # One seed more trains one student more for each loss, and nothing else.
    assert l2t("compare", tiny, "--jobs", "1", "compare.seeds=4").code == 0
    assert len(ran) == 21 and set(ran.values()) == {1}


def is_alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(pids: list[int]) -> bool:
    """Wait for processes that are not ours to end."""
    deadline = time.monotonic() + LIMIT
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(is_alive(pid) for pid in pids)


# A comparison that SIGTERM meets when its first trial is done.
TERMINATED = """\
import json, multiprocessing, signal, sys
from pathlib import Path
from l2t_cli.comparing.trials import TrialStore
from l2t_cli.main import main
save = TrialStore.save
def met(self, trial, result):
    save(self, trial, result)
    pids = [child.pid for child in multiprocessing.active_children()]
    Path("pids.json").write_text(json.dumps(pids))
    signal.raise_signal(signal.SIGTERM)
TrialStore.save = met
main(sys.argv[1:])
"""


def test_workers_end_with_a_terminated_command_and_give_the_same_numbers(
    l2t: Run, tiny: Path, tmp_path: Path
) -> None:
    changes = ["compare.losses=[cross_entropy]", "compare.seeds=2"]
    command = ("compare", tiny, *changes, "--jobs", "2", "--out", "two")
    check_interrupted(start_python("-c", TERMINATED, *command), "finished trials are kept")
    trials = tmp_path / "two" / "trials"
    assert any(trials.glob("*.json"))
    pids = json.loads(Path("pids.json").read_text())
    assert len(pids) == 2 and ended(pids)
    for out in ("two", "one"):
        assert l2t("compare", tiny, *changes, "--jobs", "1", "--out", out).code == 0
    for one in (tmp_path / "one" / "trials").glob("*.json"):
        first, second = (json.loads(p.read_text())["result"] for p in (one, trials / one.name))
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


# Ctrl-C goes to all processes, and the first ends its workers: both signals meet one at once.
BOTH = """\
import signal, threading
from types import SimpleNamespace
from l2t_cli.comparing import trials
held = (signal.SIGINT, signal.SIGTERM)
field = SimpleNamespace(load=lambda name: lambda recipe: recipe)
trials._begin_worker(SimpleNamespace(field=field, identity=dict), {})
trials._BUSY.set()
signal.pthread_sigmask(signal.SIG_BLOCK, held)
for number in held:  # to this thread: those of libraries would take what it holds back
    signal.pthread_kill(threading.get_ident(), number)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    for _ in range(1000):
        pass
except KeyboardInterrupt:
    print("ended")
"""


def test_a_worker_that_two_signals_meet_says_nothing() -> None:
    assert end_of(start_python("-c", BOTH)) == ("ended\n", "")


# Ctrl-C goes to all processes; here it meets a worker before it has imported anything of ours.
IN_A_WORKER = """\
import os, signal, sys
if any("spawn_main" in word for word in sys.orig_argv):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        open("met", "w").close()
"""
TOO_EARLY = """\
import json, multiprocessing, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from l2t_cli.main import main
spawn = ProcessPoolExecutor._spawn_process
def met(self):
    spawn(self)
    pids = [child.pid for child in multiprocessing.active_children()]
    Path("pids.json").write_text(json.dumps(pids))
    while not Path("met").exists():
        time.sleep(0.05)
    time.sleep(1)  # for the worker to say what it should not
    signal.raise_signal(signal.SIGINT)
ProcessPoolExecutor._spawn_process = met
main(sys.argv[1:])
"""


def test_ctrl_c_while_workers_start_is_one_line(tiny: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tiny.parent)
    Path("sitecustomize.py").write_text(IN_A_WORKER)
    paths = os.pathsep.join([".", str(ROOT / "plugins"), str(ROOT)])
    command = ("compare", tiny, "--jobs", "2", "--out", "early")
    child = start_python("-c", TOO_EARLY, *command, PYTHONPATH=paths)
    check_interrupted(child, "finished trials are kept")
    pids = json.loads(Path("pids.json").read_text())
    assert pids and ended(pids)


def test_what_another_comparison_has_begun_meanwhile_is_not_written_over(
    tiny: Path, tmp_path: Path
) -> None:
    comparison = Comparison(load_for_comparison(str(tiny), []), [], tmp_path / "out")
    other = load_for_comparison(str(tiny), ["image.hidden=8", "compare.seeds=2"])
    Comparison(other, [], tmp_path / "out").run(1, LogFormat.none, report=False)
    before = (tmp_path / "out/config.json").read_bytes()
    with pytest.raises(UserError, match=r"holds another comparison \(image.hidden is 8 there"):
        comparison.run(1, LogFormat.none, report=False)
    assert (tmp_path / "out/config.json").read_bytes() == before


def test_too_few_trials_for_a_losss_own_values_are_told(l2t: Run, tiny: Path) -> None:
    outcome = l2t(
        "compare", tiny, "--jobs", "1", "compare.losses=[large_margin]", "compare.seeds=2",
        "compare.large_margin.lambda_min=[1,5]",
    )
    assert "large margin: only 3 of its 6 combinations" in outcome.out
    assert "give compare.trials=12, or fewer values" in outcome.out
    # Of two rates each of them had one.
    assert re.search(
        r"large margin: no rate (below|above) the best, 0\.[14], was tried with margin \d, "
        r"lambda_min \d; give compare.trials=12\n", outcome.out
    )


def test_divergence_counts_as_worst_and_edges_are_told(l2t: Run, tiny: Path) -> None:
    outcome = l2t(
        "compare", tiny, "--jobs", "1", "compare.losses=[cross_entropy]", "compare.lr=[0.2,1e30]",
        "compare.trials=2", "compare.seeds=2",
    )
    assert outcome.code == 0 and "lr=1e+30 seed 900001: diverged" in outcome.out
    assert "the best rate 0.2 is the lowest of compare.lr; widen it" in outcome.out
    assert "2 seeds say little" in outcome.out
    row = json.loads(Path("runs/tiny-compare/comparison.json").read_text())["losses"][0]
    assert row["tuning_diverged"] == 1 and row["lr"] == 0.2
    dead = l2t(
        "compare", tiny, "--jobs", "1", "compare.losses=[cross_entropy]", "compare.lr=[1e29,1e30]",
        "compare.trials=2", "compare.seeds=2", "--out", "dead",
    )
    assert "diverged at every rate (1e+29, 1e+30); give compare.lr lower" in dead.error()
    assert not Path("dead/comparison.json").exists() and any(Path("dead/trials").iterdir())


def test_a_student_that_its_last_step_made_none_has_diverged(l2t: Run, tiny: Path) -> None:
    """Its parameters are numbers yet, its outputs are not: argmax has a class for those, too."""
    changes = ("image.steps=1", "image.dev_interval=1", "compare.lr=[0.1,1e30]", "compare.trials=2")
    losses = "compare.losses=[cross_entropy,gold_corrected]"
    assert l2t("compare", tiny, "--jobs", "1", losses, *changes, "compare.seeds=2").code == 0
    for row in json.loads(Path("runs/tiny-compare/comparison.json").read_text())["losses"]:
        assert [point["score"] is None for point in row["tuning"]] == [False, True]


def test_a_diverged_final_student_counts_as_worst(
    l2t: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: ImageTrials, trial: Trial, folder: Path) -> Result:
        if trial.final and trial.seed == 2:
            return Result(1.0, 5, diverged="the student diverged at step 5")
        return Result(1.0, 24, dev=0.9, nll=0.1, test=4.0 if trial.final else None)

    monkeypatch.setattr(ImageTrials, "run", run)
    outcome = l2t("compare", tiny, "--jobs", "1", "compare.losses=[cross_entropy]")
    assert "1 of 3 final students diverged and count as worst" in outcome.out
    row = json.loads(Path("runs/tiny-compare/comparison.json").read_text())["losses"][0]
    assert row["test"] == [4.0, 100.0, 4.0] and row["diverged"] == 1


def test_students_that_ended_before_their_last_step_are_told(
    l2t: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fairseq's --patience ends some: whose, where, and that the steps were not the same."""
    made = {"cross_entropy": 24, "label_smoothing": 24}

    def run(self: ImageTrials, trial: Trial, folder: Path) -> Result:
        steps = made[trial.arm] + (trial.seed == 2)
        return Result(1.0, min(24, steps), dev=0.9, nll=0.1, test=4.0 if trial.final else None)

    monkeypatch.setattr(ImageTrials, "run", run)

    def compared(out: str) -> tuple[str, dict[str, Any]]:
        outcome = l2t(
            "compare", tiny, "--jobs", "1", "compare.losses=[label_smoothing]",
            "compare.label_smoothing.eps=[0.1]", "compare.seeds=5", "--out", out,
        )
        assert outcome.code == 0, outcome.err
        return outcome.out, json.loads(Path(out, "comparison.json").read_text())

    said, summary = compared("whole")
    assert "ended before" not in said and "same steps and batches" in said
    assert summary["steps"] == 24 and summary["same_steps"]
    made["label_smoothing"] = 11
    said, summary = compared("short")
    early = [line for line in summary["warnings"] if "ended before update 24" in line]
    assert len(early) == 1 and "cross-entropy" not in early[0] and "teacher" not in early[0]
    assert re.search(r"label smoothing \d+ of \d+, at 11 to 12; .*--max-update that is", early[0])
    assert not summary["same_steps"] and "same batches, but other steps" in said
    made["cross_entropy"] = 11  # as long as each other, and shorter than is said
    said, summary = compared("both")
    assert "same steps and batches" in said
    assert any("cross-entropy" in line and "at 11 to 12" in line for line in summary["warnings"])


def test_scores_that_are_not_numbers_are_a_divergence(
    l2t: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Result(1.0, 24, dev=float("nan"), nll=0.1)
    monkeypatch.setattr(ImageTrials, "run", lambda self, trial, folder: nothing)
    outcome = l2t("compare", tiny, "--jobs", "1", "compare.losses=[cross_entropy]")
    assert outcome.code == 2 and outcome.out.count(": diverged") == 3


def test_every_setting_of_the_student_belongs_to_a_trials_identity(tiny: Path) -> None:
    """A trial of other data, another model or other steps must never be taken for this one."""
    recipe = load_for_comparison(str(tiny), [])
    found = ImageTrials(recipe).identity()
    section = asdict(recipe.student)
    del section["folder"], section["device"], section["optimiser"]["lr"]
    assert found["image"] == section
    for change in ("label_noise=0.1", "imbalance=4", "data_seed=5", "train_size=400"):
        other = ImageTrials(load_for_comparison(str(tiny), [f"image.{change}"])).identity()
        assert other["content"] != found["content"]


def test_a_changed_model_of_ones_own_is_trained_again(
    l2t: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), "
        "nn.Linear(WIDTH, num_classes))\n"
    )
    arguments = ("compare", tiny, "--jobs", "1", "image.model=own_compared:net",
                 "compare.losses=[]", "compare.seeds=2")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("own_compared.py").write_text(f"WIDTH = 8\n{code}")
    assert l2t(*arguments).code == 0
    assert "5 of 5 trials were finished before" in l2t(*arguments).out
    monkeypatch.delitem(sys.modules, "own_compared")
    Path("own_compared.py").write_text(f"WIDTH = 9\n{code}")
    again = l2t(*arguments)
    assert again.code == 0 and "were finished before" not in again.out


def test_data_that_are_others_in_each_process_are_refused(l2t: Run, tiny: Path) -> None:
    Path("own_drawn.py").write_text(
        "import numpy as np\n"
        "def pictures(folder, train):\n"
        "    labels = np.arange(400) % 2\n"
        "    return np.random.default_rng().integers(0, 9, (400, 8, 8), np.uint8), labels\n"
    )
    line = l2t("compare", tiny, "image.data=own_drawn:pictures", "--jobs", "2").error()
    assert "data or code is not the same in each process" in line and not Path("runs").exists()


OWN_LOSSES = """
import torch

def brier(log_probs, targets):
    wanted = torch.nn.functional.one_hot(targets, log_probs.shape[1])
    return SCALE * (log_probs.exp() - wanted).square().sum(1)

def mean(log_probs, targets):
    return brier(log_probs, targets).mean()

def broken(log_probs, targets):
    return log_probs + targets

def never(log_probs, targets):
    return brier(log_probs, targets) * float("nan")
"""


def test_a_loss_of_ones_own_is_compared(
    l2t: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same rates and seeds as the others, and again when its code is another."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("own_losses.py").write_text(f"SCALE = 1.0\n{OWN_LOSSES}")
    arguments = ("compare", tiny, "--jobs", "1", "compare.seeds=2",
                 "compare.losses=[own_losses:brier]")
    outcome = l2t(*arguments)
    assert outcome.code == 0 and "own_losses:brier" in outcome.out
    summary = json.loads(Path("runs/tiny-compare/comparison.json").read_text())
    first, own = summary["losses"]
    assert own["label"] == "own_losses:brier" and len(own["test"]) == 2
    assert own["test"] != first["test"]
    never = l2t(*arguments[:-1], "compare.losses=[own_losses:never]")
    assert never.code == 0 and "see that the loss is a finite number everywhere" in never.out
    monkeypatch.delitem(sys.modules, "own_losses")
    Path("own_losses.py").write_text(f"SCALE = 2.0\n{OWN_LOSSES}")
    assert "5 of 10 trials were finished before" in l2t(*arguments).out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mean", "returned [] for 4 examples; return a tensor [N]"),
        ("broken", "RuntimeError: The size of tensor"),
        ("gone", "compare.losses own_refused:gone cannot be imported"),
    ],
)
def test_a_loss_that_is_none_is_refused(l2t: Run, tiny: Path, name: str, says: str) -> None:
    Path("own_refused.py").write_text(f"SCALE = 1.0\n{OWN_LOSSES}")
    outcome = l2t("compare", tiny, f"compare.losses=[own_refused:{name}]")
    assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1
    refused = l2t("compare", "demo-de-en", f"compare.losses=[own_refused:{name}]")
    assert refused.code == 2 and "losses of your own are for image recipes" in refused.err


def test_dry_run_counts_the_trials_and_writes_nothing(l2t: Run, tiny: Path) -> None:
    before = set(Path().iterdir())
    outcome = l2t("compare", tiny, "compare.tuning_seeds=2", "--dry-run")
    assert outcome.code == 0
    assert "plan: 27 trials (18 tuning, 9 final), into runs/tiny-compare" in outcome.out
    assert "0.1 0.2 0.4" in outcome.out and "eps=0.1" in outcome.out and "margin=4" in outcome.out
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize("backwards", [False, True])
def test_the_choice_does_not_depend_on_which_trial_ends_first(tiny: Path, backwards: bool) -> None:
    """After a warm-up of the whole training any mix is the same, to the bit."""
    changes = ["compare.losses=[sigmoid]", "compare.trials=6", "compare.sigmoid.warmup=[1]",
               "compare.sigmoid.mix=[0.5,0.2,0.8]"]
    recipe = load_for_comparison(str(tiny), changes)
    found = arms(recipe, [], TeacherCopies(Path("out")))
    tuning = Tuning(recipe, found, ImageTrials(recipe))
    asked = tuning.ask()
    for trial in reversed(asked) if backwards else asked:
        tuning.tell(trial, Result(1.0, 24, dev=0.9, nll=trial.lr))
    for arm in found:
        assert list(tuning.scores[arm.name]) == tuning.points(arm)
    chosen = tuning.chosen()["sigmoid"]
    assert chosen == Point(0.1, (("warmup", 1.0), ("mix", 0.5)))


def test_json_lines(l2t: Run, tiny: Path) -> None:
    arguments = ("compare", tiny, "--jobs", "1", "compare.losses=[]", "compare.seeds=2")
    outcome = l2t(*arguments, "--log-format", "json")
    assert outcome.code == 0, outcome.err
    lines = [json.loads(s) for s in outcome.out.splitlines()]
    assert [line["event"] for line in lines] == ["trial"] * 5 + ["result"]
    assert lines[-1]["losses"][0]["name"] == "cross_entropy" and lines[4]["of"] == 5


def test_another_students_comparison_is_not_replaced(l2t: Run, tiny: Path) -> None:
    options = ("compare.losses=[]", "compare.seeds=2", "--jobs", "1", "--out", "out")
    assert l2t("compare", tiny, *options).code == 0
    before = Path("out/comparison.json").read_bytes()
    line = l2t("compare", tiny, "image.label_noise=0.4", *options).error()
    assert "out holds another comparison (image.label_noise is 0.0 there, 0.4 here)" in line
    assert Path("out/comparison.json").read_bytes() == before
    # More of the same students is no other comparison.
    assert l2t("compare", tiny, "image.optimiser.lr=0.05", *options, "compare.seeds=3").code == 0


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (170, 1)])
def test_no_number_is_broken_on_a_narrow_screen(
    watched: Watched, width: int, tables: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    console._console.cache_clear()
    show(watched.summary, [])
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line[:1] in tuple("╭│╰├")]
    assert max(map(len, table)) <= width and sum(line.startswith("╭") for line in table) == tables
    text = "\n".join(table)
    for row in table_rows(watched.summary):
        for cell in row[2:]:
            assert f" {cell} " in text, cell


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("compare.losses=[focl]", "did you mean 'focal'?"),
        ("compare.losses=[focal,focal]", "names a loss twice"),
        ("compare.losses=focal", "expected a list"),
        ("compare.lr=[0.1]", "one rate"),
        ("compare.lr=[0.1,-1]", "above 0"),
        ("compare.lr=[fast]", "compare.lr"),
        ("compare.trials=1", "compare.trials is 1"),
        ("compare.trials=10001", "compare.trials is 10001; it must be in [2, 10000]"),
        ("compare.lr=[0.1,0.2,0.3,0.4]", "compare.trials is 3, fewer than the 4 rates"),
        ("compare.seeds=1", "compare.seeds is 1"),
        ("compare.seed=900001", "share seeds"),
        ("compare.search=tpe", "is 'tpe' (known: grid, optuna)"),
        ("compare.tune_on=test", "(known: measure, nll)"),
        ("compare.gce.q=[2]", "gce.q is 2; it must be from 0 to 1"),
        ("compare.large_margin.margin=[5]", "from 2 to 4"),
        ("compare.focal.gamma=[1,2,1.0]", "compare.focal.gamma names a value twice; remove one"),
        ("compare.focal.gamma=[]", "compare.focal.gamma is empty"),
        ("compare.focl.gamma=[1]", "did you mean 'compare.focal.gamma'?"),
        ("compare.teachers=[gone.safetensors]", "no teacher file at gone.safetensors"),
        ("compare.teachers=[~/gone.safetensors]", "no teacher file at /"),
        ("loss.form=dense", "no effect"),
    ],
)
def test_a_bad_section_is_one_line(l2t: Run, tiny: Path, change: str, expected: str) -> None:
    assert expected in l2t("compare", tiny, change).error()
    assert not Path("runs").exists()


def test_other_mistakes_are_one_line(l2t: Run, tiny: Path, watched: Watched) -> None:
    assert "--jobs is 0" in l2t("compare", tiny, "--jobs", "0").error()
    Path("full").mkdir()
    Path("full/letter").write_text("dear")
    assert "choose another --out" in l2t("compare", tiny, "--out", "full").error()
    teacher = watched.folder.parent / "teacher" / "teacher_best.safetensors"
    twice = l2t("compare", tiny, "--teacher", teacher, "--teacher", teacher).error()
    assert "same teacher" in twice
    assert "no effect" in l2t("train-teacher", tiny, "compare.seeds=3").error()
    assert "no effect" in l2t("apply-teacher", teacher, tiny, "compare.seeds=3").error()
    bad = Path("bad.yaml")
    text = tiny.read_text().replace("trials: 3", "trials: 0").replace("seeds: 3", "seeds: 0")
    bad.write_text(text)
    lines = l2t("recipes", "validate", bad).err.splitlines()
    assert len(lines) == 2 and "compare.trials" in lines[0] and "compare.seeds" in lines[1]
    assert not Path("runs").exists()


def test_a_damaged_trial_file_is_named(l2t: Run, tiny: Path, watched: Watched) -> None:
    change = "compare.losses=[cross_entropy]"
    assert l2t("compare", tiny, change, "--jobs", "1").code == 0
    path = next(Path("runs/tiny-compare/trials").glob("*.json"))
    path.write_text("{")
    line = l2t("compare", tiny, change, "--jobs", "1").error()
    assert str(path) in line and "delete it" in line


def test_students_of_earlier_grids_and_seeds_are_part_of_the_cost(l2t: Run, tiny: Path) -> None:
    def spent(*changes: str) -> tuple[int, float]:
        losses = "compare.losses=[cross_entropy]"
        assert l2t("compare", tiny, losses, "--jobs", "1", *changes).code == 0
        row = json.loads(Path("runs/tiny-compare/comparison.json").read_text())["losses"][0]
        return row["students_steps"], row["students_seconds"]

    grid = ("compare.trials=2", "compare.lr=[0.1,0.2]")
    steps, seconds = spent(*grid, "compare.seeds=3")
    assert steps == (2 + 3) * 24
    trials = Path("runs/tiny-compare/trials")
    path = next(trials.glob("*.json"))
    path.with_name("0123.json").write_text(path.read_text())  # as of another version: not counted
    assert spent(*grid, "compare.seeds=2") == (steps, pytest.approx(seconds))
    other = spent("compare.trials=2", "compare.lr=[1e-7,1e-6]", "compare.seeds=3")
    kept = [json.loads(p.read_text())["result"] for p in trials.glob("*.json") if p.stem != "0123"]
    assert other[0] == sum(result["steps"] for result in kept) == (2 + 3 + 2 + 3) * 24
    assert other[1] == pytest.approx(sum(result["seconds"] for result in kept))
    assert spent(*grid, "compare.seeds=3") == (other[0], pytest.approx(other[1]))


def test_a_score_changes_in_points() -> None:
    """As the field tells BLEU: 33 to 34.5 is +1.5, not +4.5 %."""
    field: Any = SimpleNamespace(
        measure="BLEU", dev_measure="BLEU", worst=0, lower_is_better=False, steps=9
    )
    point = Point(0.1, ())
    tests = {"cross_entropy": (32.0, 33.0, 34.0), "mrt": (33.5, 34.0, 36.0)}
    tuning: Any = SimpleNamespace(
        chosen=lambda: dict.fromkeys(tests, point), scores={n: {point: (1.0, 0.0)} for n in tests},
        rates=[0.05, 0.1, 0.2], on_nll=False, count=1, seeds=[900_001], grid=lambda arm: [point],
    )
    finals: Any = SimpleNamespace(
        results={n: {s: Result(1.0, 9, 1.0, 0.0, v) for s, v in enumerate(t)}
                 for n, t in tests.items()}
    )
    summary = summarise("tiny", [Arm(n, n, {}) for n in tests], tuning, finals, {}, field, {})
    assert summary["change_unit"] == "points"
    assert [row["change"] for row in summary["losses"]] == [None, pytest.approx(1.5)]
    assert [row[4] for row in table_rows(summary)] == ["", "+1.50 points"]
    assert "| +1.50 points |" in markdown(summary)


def test_transfer_to_another_student_and_length(l2t: Run, tiny: Path, watched: Watched) -> None:
    teacher = watched.folder.parent / "teacher" / "teacher_best.safetensors"
    other = Path("other.yaml")
    other.write_text(tiny.read_text().replace("hidden: 16", "hidden: 8"))
    outcome = l2t(
        "transfer", teacher, tiny, other, "image.steps=30", "compare.seeds=2", "--jobs", "1"
    )
    assert outcome.code == 0, outcome.err
    result = json.loads(Path("runs/teacher-transfer/transfer.json").read_text())
    assert list(result) == ["tiny", "other"]
    for summary in result.values():
        assert [row["name"] for row in summary["losses"]] == ["cross_entropy", "taught"]
        assert summary["losses"][1]["students_steps"] == 5 * 30
        assert f"{mean(summary['losses'][1]['test']):.2f} ± " in outcome.out
        for path in Path("runs/teacher-transfer", summary["name"], "trials").glob("*.json"):
            trial = json.loads(path.read_text())["result"]  # dev was seen at 8, 16 and 24, too
            assert trial["curve"][-1] == [30, pytest.approx(trial["dev"])]
    for name in ("tiny", "other"):
        assert f"{name}: losses compared" in outcome.out
    assert outcome.out.count("against tuned cross-entropy over 2 seeds") == 2
    # The results of recipes that came earlier stay; another run's folder is refused.
    assert l2t("transfer", teacher, tiny, "image.steps=30", "compare.seeds=2").code == 0
    assert list(json.loads(Path("runs/teacher-transfer/transfer.json").read_text())) == [
        "tiny", "other"
    ]
    line = l2t("transfer", teacher, tiny, "--out", watched.folder).error()
    assert "holds no transfer of ours (config.json)" in line


def test_a_transfer_is_of_one_teacher(l2t: Run, tiny: Path, watched: Watched) -> None:
    first = Path(shutil.copy(watched.folder.parent / "teacher/teacher_best.safetensors", "a.st"))
    second = write_teacher(Path("b.st").absolute(), 10, kind="classes")
    other = Path("other.yaml")
    other.write_text(tiny.read_text().replace("hidden: 16", "hidden: 8"))
    options = ("compare.lr=[0.1,0.4]", "compare.seeds=2", "--jobs", "1", "--out", "out")
    assert l2t("transfer", first, tiny, *options).code == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    line = l2t("transfer", second, other, *options).error()
    assert f"out holds the transfer of another teacher ({first.resolve()}), not of" in line
    assert l2t("transfer", second, other, *options, "--dry-run").error() == line
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before
    # The same one under another name is no other teacher.
    moved = first.rename("moved.st")
    assert l2t("transfer", moved, other, *options).code == 0
    assert list(json.loads(Path("out/transfer.json").read_text())) == ["tiny", "other"]


def test_a_recipe_whose_path_has_an_equals_sign_is_no_change(
    l2t: Run, tiny: Path, tmp_path: Path
) -> None:
    teacher = write_teacher(tmp_path / "ten.safetensors", 10, kind="classes")
    Path("lr=0.1").mkdir()
    recipe = shutil.copy(tiny, "lr=0.1/tiny.yaml")
    long = f"compare.lr=[0.1,0.4{'0' * 300}]"  # as a path it would be too long
    outcome = l2t("transfer", teacher, recipe, "image.steps=30", long, "--dry-run")
    assert outcome.code == 0 and " 0.4 " in outcome.out, outcome.err
    assert "is a change" in l2t("recipes", "validate", recipe, long).error()


def test_a_teacher_that_cannot_fit_is_refused_before_anything_is_trained(
    l2t: Run, tiny: Path, tmp_path: Path
) -> None:
    path = write_teacher(tmp_path / "seven.safetensors", 7, kind="classes")
    line = l2t("transfer", path, "digits", tiny).error()
    assert "trained for 7 classes, the student has 10" in line
    assert "no recipe" in l2t("transfer", path, "image.steps=3").error()
    assert not Path("runs").exists()


def test_a_student_without_a_last_linear_layer_has_no_large_margin(
    l2t: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from l2t_vision.models.architectures import MODELS

    monkeypatch.setitem(
        MODELS._entries, "odd",
        lambda shape, k, spec: nn.Sequential(nn.Flatten(), nn.Linear(64, k), nn.Tanh()),
    )
    line = l2t("compare", tiny, "image.model=odd").error()
    assert "large_margin needs a student" in line and not Path("runs").exists()


def test_every_baseline_belongs_to_a_field() -> None:
    of_fields = {loss for name in FIELDS.names() for loss in FIELDS.get(name).losses}
    assert of_fields == set(BASELINES.names())


def test_an_image_recipe_has_no_sequences(l2t: Run, tiny: Path) -> None:
    line = l2t("compare", tiny, "compare.losses=[mrt]").error()
    assert "mrt does not exist for image recipes; remove it" in line


def test_names_that_are_not_utf8_are_drawn_in_escapes(tmp_path: Path) -> None:
    name, to = os.fsdecode(b"d\xe4r"), tmp_path / "plot.png"
    curve, scores = [[1.0, 0.5], [2.0, 0.6]], [1.0, 2.0]
    panel = {"title": name, "measure": "error %", "taught": scores, "cross_entropy": scores}
    for draw in (
        lambda: plots.plot_dev_measure([{"episode": 1, "dev_measure": 0.5}], 1, "BLEU", name, to),
        lambda: plots.plot_comparison([panel], to),
        lambda: plots.plot_learning_curves({name: [curve]}, "accuracy", name, to),
        lambda: plots.plot_scores({name: scores}, "error %", name, to),
    ):
        to.unlink(missing_ok=True)
        draw()
        assert to.stat().st_size > 1000


def test_no_two_learning_curves_look_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[tuple[str, str]] = []

    def look(figure: Any, to: Path) -> None:
        (axes,) = figure.axes
        assert len(axes.get_legend().get_texts()) == len(axes.lines) == 23
        looks.extend((line.get_color(), line.get_linestyle()) for line in axes.lines)

    monkeypatch.setattr(plots, "_write_png", look)
    curves = {f"loss {n}": [[[1.0, n], [2.0, n + 1.0]]] for n in range(23)}
    plots.plot_learning_curves(curves, "accuracy", "tiny", tmp_path / "curves.png")
    assert len(set(looks)) == 23 and {style for _, style in looks[:10]} == {"-"}


def test_a_single_look_at_dev_is_seen_and_the_legend_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(figure: Any, to: Path) -> None:
        (axes,) = figure.axes
        assert [line.get_marker() for line in axes.lines] == ["o", ""]
        figure.tight_layout()
        figure.canvas.draw()
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 >= axes.get_window_extent().x1 and legend.x1 <= figure.bbox.x1

    monkeypatch.setattr(plots, "_write_png", look)
    curves = {"one look": [[[20.0, 0.5]], [[20.0, 0.6]]], "two": [[[10.0, 0.4], [20.0, 0.5]]]}
    plots.plot_learning_curves(curves, "accuracy", "tiny", tmp_path / "curves.png")


def test_a_finished_trial_leaves_no_snapshot_and_no_empty_folder(tmp_path: Path) -> None:
    store, result = TrialStore(tmp_path, {}), Result(1.0, 24, dev=0.5)
    for final in (False, True):
        for number, files in enumerate(([], ["train.log"], [SNAPSHOT], ["train.log", SNAPSHOT])):
            trial = Trial("a", "a", (("n", float(number)),), None, "", 0.1, 1, final)
            work = store.work(trial)
            work.mkdir(parents=True)
            for name in files:
                (work / name).write_text("")
            store.save(trial, result)
            # What a final student leaves is of use.
            assert work.exists() == (final and "train.log" in files)
            assert not (work / SNAPSHOT).exists()
            assert store.load(trial) == result


def test_optuna_searches_and_resumes(l2t: Run, tiny: Path) -> None:
    pytest.importorskip("optuna")
    arguments = ("compare", tiny, "--jobs", "1", "compare.search=optuna", "compare.seeds=2")
    planned = l2t(*arguments, "--dry-run").out
    assert "by optuna" in planned and "are done" not in planned
    assert l2t(*arguments).code == 0
    again = l2t(*arguments)
    assert "15 of 15 trials were finished before" in again.out
    assert "; 9 of the tuning's are done" in l2t(*arguments, "--dry-run").out
    # What a search asks next follows from an answer: the trials behind one that is missing, too.
    own = {json.loads(p.read_text())["trial"]["arm"]: p for p in Path("runs").rglob("trials/*.json")
           if not json.loads(p.read_text())["trial"]["final"]}
    own["label_smoothing"].rename("kept.json")
    assert "; 9 of the" not in l2t(*arguments, "--dry-run").out
    Path("kept.json").rename(own["label_smoothing"])
    for row in json.loads(Path("runs/tiny-compare/comparison.json").read_text())["losses"]:
        assert len(row["tuning"]) == 3 and all(0.1 <= t["lr"] <= 0.4 for t in row["tuning"])
    more = "compare.losses=[cross_entropy,focal,label_smoothing,large_margin]"
    assert "15 of 20 trials were finished before" in l2t(*arguments, more).out


def test_optuna_that_is_not_installed_is_one_line(
    l2t: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    line = l2t("compare", tiny, "compare.search=optuna").error()
    assert 'pip install "l2t[tune]"' in line and not Path("runs").exists()


def test_a_folder_of_another_tool_is_left_alone(l2t: Run, tiny: Path) -> None:
    """Many tools write a config.json; what a killed first write of ours left is no one's."""
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text('{"model_type": "bert"}')
    outcome = l2t("compare", tiny, "--out", "theirs")
    assert outcome.code == 2 and "holds no comparison of ours" in outcome.err
    assert Path("theirs/config.json").read_text() == '{"model_type": "bert"}'
    assert len(list(Path("theirs").iterdir())) == 1
    Path("ours").mkdir()
    Path("ours/.config.json.abc").write_text("{")
    assert l2t("compare", tiny, "--out", "ours", "--jobs", "1").code == 0


def test_a_second_command_at_work_in_one_folder_is_refused(
    l2t: Run, tiny: Path, watched: Watched
) -> None:
    teacher = watched.folder.parent / "teacher" / "teacher_best.safetensors"
    for command in (("compare", tiny), ("transfer", teacher, tiny)):
        with claimed(Path("out")):
            line = l2t(*command, "--out", "out", "--jobs", "1").error()
        assert "another command is at work in out; wait for it, or choose another --out" in line
        assert list(Path("out").iterdir()) == []
    # The claim ends with the command.
    options = ("--out", "out", "--jobs", "1", "compare.losses=[]", "compare.seeds=2")
    assert all(l2t("compare", tiny, *options).code == 0 for _ in range(2))


def test_gold_correction_learns_from_a_student_of_its_own(tmp_path: Path) -> None:
    """Its second student follows the confusion that the first, of cross-entropy, has on dev."""
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(DIGITS)
    overrides = ["image.noise=pair", "image.label_noise=0.4", "image.steps=60"]
    trials = ImageTrials(load_for_comparison(str(recipe), overrides))
    trial = Trial("gold correction", "gold_corrected", (), None, "", 0.1, 7, final=True)
    found = trials.run(trial, tmp_path)

    spec = trials.student.spec
    spec = replace(spec, optimiser=replace(spec.optimiser, lr=0.1))
    student = ImageStudent(spec, trials.student.data)
    train_student(student, 7)
    told = student.dev_confusion()
    labels = student.label_confusion()
    # It has seen which class each is mistaken for.
    beside = told.masked_fill(torch.eye(10, dtype=torch.bool), 0.0)
    assert beside.argmax(1).equal((labels * (1 - torch.eye(10))).argmax(1))
    second = ImageStudent(spec, trials.student.data)
    train_student(second, 7, FixedLoss("forward_corrected", total_steps=60, told=told))
    assert found.dev == second.true_measure()
    assert found.test == pytest.approx(100.0 * second.test_error())
    assert found.steps == 60 and found.steps_before == 60 and found.curve[-1][0] == 60
    assert not list(tmp_path.glob("first*"))
