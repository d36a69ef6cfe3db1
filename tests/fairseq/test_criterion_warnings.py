"""What the criterion says in the log where a run is not what its teacher was trained for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_fairseq import run_module
from toy_trainer import Bench, taught_bench

pytest.importorskip("fairseq")

from fairseq.logging import metrics

from l2t_fairseq.criterion import L2TDynamicCriterion

WriteTeacher = Callable[..., Path]


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that takes the warnings since its last call."""
    caplog.set_level(logging.WARNING, "l2t_fairseq")

    def take() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name.startswith("l2t_fairseq")]
        caplog.clear()
        return found

    return take


@pytest.fixture
def make(tmp_path: Path, toy_data: Path, write_teacher: WriteTeacher) -> Any:
    """Return a function that makes a trainer of 20 updates; a teacher looks at dev every 2."""
    teacher = write_teacher(tmp_path / "t.safetensors", toy_data, total_steps=10, dev_interval=1)

    def build(*flags: str, teacher: Path = teacher) -> Bench:
        return taught_bench(toy_data, teacher, tmp_path, "--task", "l2t_translation", *flags)

    yield build
    metrics.reset()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], []),
        (["--l2t-total-steps", "20"], []),
        (["--l2t-total-steps", "50"], []),  # a part of a longer training
        (["--max-update", "0", "--l2t-total-steps", "20"], []),
        (["--l2t-total-steps", "12"], ["--l2t-total-steps 12 is less than --max-update 20;"]),
    ],
)
def test_a_length_that_ends_before_the_run(
    make: Any, warned: Callable[[], list[str]], flags: list[str], says: list[str]
) -> None:
    make(*flags)
    found = warned()
    assert len(found) == len(says) and all(map(str.startswith, found, says))


def test_a_dev_set_that_is_seen_too_rarely(make: Any, warned: Callable[[], list[str]]) -> None:
    bench = make()
    for _ in range(4):
        bench.trainer.train_step([bench.batches[0]])
    assert warned() == []
    bench.trainer.train_step([bench.batches[0]])
    (said,) = warned()
    assert "not seen the dev set for 5 updates" in said
    assert said.endswith("add --validate-interval-updates 2")
    for _ in range(6):
        bench.trainer.train_step([bench.batches[0]])
    assert warned() == []  # once


def test_a_dev_set_that_is_seen_often_enough_is_no_news(
    make: Any, warned: Callable[[], list[str]]
) -> None:
    bench = make()
    for update in range(12):
        bench.trainer.train_step([bench.batches[0]])
        if update % 3 == 2:  # as a run whose epochs end in between
            bench.validate("valid")
    assert warned() == []


def test_a_run_that_goes_on_as_another(
    make: Any,
    warned: Callable[[], list[str]],
    tmp_path: Path,
    toy_data: Path,
    write_teacher: WriteTeacher,
) -> None:
    state = make().state()
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((tmp_path / "t.safetensors").read_bytes())
    make(teacher=moved).criterion.load_teacher_state(state)
    assert warned() == []
    make("--max-update", "30").criterion.load_teacher_state(state)
    (said,) = warned()
    assert "goes on as one of 30 updates and began as one of 20" in said
    other = write_teacher(tmp_path / "other.safetensors", toy_data, neutral=True)
    make(teacher=other).criterion.load_teacher_state(state)
    assert warned() == ["the run goes on under another teacher than it began with"]
    del state["origin"]  # as early versions saved it
    make(teacher=other).criterion.load_teacher_state(state)
    assert warned() == []


def test_the_first_process_warns_for_all(
    make: Any, warned: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, longer = make(), make("--max-update", "30")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, count in ((1, 0), (0, 1)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        longer.criterion.load_teacher_state(bench.state())
        assert len(warned()) == count


def test_a_missing_teacher_is_named_with_its_folder(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """hydra changes the working folder: a relative path is looked for in another one."""
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    monkeypatch.chdir(tmp_path)
    cfg = SimpleNamespace(
        max_update=5, l2t_total_steps=None, l2t_teacher="teachers/t.safetensors",
        l2t_warmup_steps=None, sentence_avg=False, l2t_debug=False, best_checkpoint_metric="loss",
    )  # fmt: skip
    task = TranslationTask.setup_task(TranslationConfig(data=str(toy_data)))
    with pytest.raises(SystemExit):
        L2TDynamicCriterion.build_criterion(cfg, task)
    assert str(tmp_path / "teachers/t.safetensors") in capsys.readouterr().err


def test_the_warnings_reach_the_log_of_a_command(runs: Any, tmp_path: Path) -> None:
    command = [*runs.taught("real").arguments, "--l2t-total-steps", "6"]
    command += ["--max-update", "8", "--save-dir", str(tmp_path)]
    done = run_module("fairseq_cli.train", command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| WARNING | l2t_fairseq.criterion | --l2t-total-steps 6 is") == 1
