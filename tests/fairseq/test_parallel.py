"""Micro-batches, several processes and the flags around them: still one student, one s_t."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_fairseq import TINY_MODEL, TINY_RUN, run_module
from toy_processes import SGD, SHARED, nearly_same, same_state, state, together
from toy_runs import same_parameters
from toy_trainer import Bench, taught_bench

from l2t_core.teachers.applied import AppliedTeacher

pytest.importorskip("fairseq")

WriteTeacher = Callable[..., Path]


@pytest.mark.parametrize("task", ["translation", "l2t_translation"])
def test_grouped_updates_equal_one_large_batch(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path, task: str
) -> None:
    teacher = write_teacher(
        tmp_path / "t.safetensors", toy_data, form="lowrank", warmup_steps=1, dev_interval=1
    )
    benches, computed = [], []
    for flags in (["--update-freq", "4"], []):
        bench = taught_bench(
            toy_data, teacher, tmp_path, "--task", task, "--dropout", "0", *SGD, *flags
        )
        data = bench.task.dataset("train")
        calls: list[int] = []
        applied = bench.criterion.applied

        def spy(features: Any, *, f=applied.teacher.forward, calls=calls) -> Any:
            calls.append(1)
            return f(features)

        applied.teacher.forward = spy  # type: ignore[method-assign]
        for update in range(4):
            ids = list(range(8 * update, 8 * update + 8))
            pieces = [ids[i : i + 2] for i in range(0, 8, 2)] if flags else [ids]
            batches = [data.collater([data[i] for i in piece]) for piece in pieces]
            bench.trainer.train_step(batches)
            if update == 1:
                bench.validate("valid")
        benches.append(bench)
        computed.append(len(calls))
    grouped, large = benches
    start = taught_bench(toy_data, teacher, tmp_path, "--task", task)
    assert computed == [4, 4]  # phi_t once an update, not once a micro-batch
    assert state_of(grouped)["step"] == 4
    same_state(state_of(grouped), state_of(large))
    nearly_same(*({"model": bench.model.state_dict()} for bench in benches))
    moved = zip(grouped.model.parameters(), start.model.parameters(), strict=True)
    assert max(float((one - other).abs().max()) for one, other in moved) > 0.05


def state_of(bench: Bench) -> dict[str, Any]:
    return bench.state()["applied"]


def test_two_processes_are_one(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path
) -> None:
    teacher = write_teacher(tmp_path / "t.safetensors", toy_data, form="lowrank", dev_interval=3)
    arguments = [str(toy_data), *TINY_MODEL, *TINY_RUN, *SHARED, "--l2t-teacher", str(teacher),
                 "--max-update", "6", "--validate-interval-updates", "3", "--l2t-debug",
                 "--save-interval-updates", "3", *SGD]  # fmt: skip
    one = run_module(
        "fairseq_cli.train", [*arguments, "--update-freq", "2", "--save-dir", str(tmp_path / "one")]
    )
    assert one.returncode == 0, one.stderr[-2000:]
    folder = ["--save-dir", str(tmp_path / "two")]
    for result in together(arguments, folder, folder):
        assert result.returncode == 0, result.stderr[-2000:]
    whole = [
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)
        for name in ("one", "two")
    ]
    nearly_same(*whole)
    same_state(*map(state, whole))
    # And a resumed pair of processes is the pair that went on; each reads rank 0's checkpoint.
    resumed = ["--save-dir", str(tmp_path / "resumed"),
               "--restore-file", str(tmp_path / "two/checkpoint_1_3.pt")]  # fmt: skip
    for result in together(arguments, resumed, resumed):
        assert result.returncode == 0, result.stderr[-2000:]
    again = torch.load(tmp_path / "resumed/checkpoint_last.pt", weights_only=True)
    assert same_parameters(again, whole[1])
    assert state(again) == state(whole[1])


def test_processes_that_differ_are_found_out(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path
) -> None:
    arguments = [str(toy_data), *TINY_MODEL, *TINY_RUN, *SHARED, "--max-update", "3",
                 "--save-dir", str(tmp_path / "run"), "--l2t-debug"]  # fmt: skip
    files = [write_teacher(tmp_path / f"{name}.safetensors", toy_data, neutral=name == "a")
             for name in ("a", "b")]  # fmt: skip
    results = together(arguments, *(["--l2t-teacher", str(file)] for file in files))
    said = [line for r in results for line in r.stderr.splitlines() if "l2t: error: " in line]
    assert [r.returncode for r in results] == [2, 2], results[0].stderr[-2000:]
    assert len(said) == 1
    assert "process 1 differs from process 0's at update 0" in said[0]
    assert not (tmp_path / "run/checkpoint_last.pt").exists()


def test_the_check_sees_every_bit(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path
) -> None:
    from l2t_fairseq.ranks import fingerprint_of, refuse_differences

    def follow() -> AppliedTeacher:
        applied = AppliedTeacher.from_file(teacher, 10)
        applied.begin_step(0.1)
        return applied

    teacher = write_teacher(tmp_path / "t.safetensors", toy_data)
    first, second = follow(), follow()
    assert fingerprint_of(first) == fingerprint_of(second)
    second.coefficients["b"].view(-1)[0].mul_(1 + 1e-6)
    assert fingerprint_of(first) != fingerprint_of(second)
    third = follow()
    third.step = 1
    assert fingerprint_of(first) != fingerprint_of(third)
    refuse_differences(1, 0)  # one process alone never differs


# Flags that change what a trainer or a model is, each of which has broken some criterion.
FLAGS = {
    "fp16-no-flatten-grads": ["--fp16-no-flatten-grads"],
    "ema": ["--store-ema", "--ema-decay", "0.9"],
    "no positions": ["--no-token-positional-embeddings", "--no-cross-attention"],
    "frozen": ["--arch", "lstm_wiseman_iwslt_de_en", "--encoder-freeze-embed",
               "--encoder-embed-dim", "8", "--decoder-out-embed-dim", "8"],
    "layer drop": ["--encoder-layerdrop", "0.5", "--decoder-layerdrop", "0.5"],
    "tied": ["--share-all-embeddings"],
    "adaptive batches": ["--max-tokens", "40", "--batch-size-valid", "3"],
    "remainder": ["--skip-remainder-batch", "--update-freq", "2"],
    "sentences": ["--sentence-avg"],
    "clipped": ["--clip-norm", "0.1"],
    "nag": ["--optimizer", "nag"],
    "activations": ["--checkpoint-activations"],
    "patience": ["--patience", "1", "--keep-best-checkpoints", "1", "--no-epoch-checkpoints"],
    "empty cache": ["--empty-cache-freq", "2", "--log-interval", "7"],
    "no adam moments saved": ["--no-save-optimizer-state"],
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags_do_not_break_it(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path, name: str
) -> None:
    teacher = write_teacher(tmp_path / "t.safetensors", toy_data, form="lowrank", warmup_steps=1)
    model = [] if "--arch" in FLAGS[name] else TINY_MODEL
    base = [str(toy_data), *model, *TINY_RUN, *SHARED, "--l2t-teacher", str(teacher)]
    done = run_module(
        "fairseq_cli.train",
        [*base, "--max-update", "4", "--save-interval-updates", "0", "--save-dir", str(tmp_path),
         *FLAGS[name]],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert saved["optimizer_history"][-1]["num_updates"] == state(saved)["step"] == 4
    valid = [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines()
             if "| valid |" in line]  # fmt: skip
    assert valid and float(valid[-1]["valid_loss"]) > 0


@pytest.mark.parametrize("first_tells", [True, False])
def test_the_others_speak_where_the_first_has_nothing_to_tell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first_tells: bool
) -> None:
    """A teacher file may be missing on one machine only; else it is told once."""
    from l2t_core.errors import UserError
    from l2t_fairseq import ranks

    asked = []

    def wait() -> bool:
        asked.append(True)
        return first_tells

    monkeypatch.setattr(ranks, "is_first", lambda: False)
    monkeypatch.setattr(ranks, "wait_until_told", wait)
    assert ranks.end_with(UserError("no teacher")).code == 2
    said = "" if first_tells else "l2t: error: no teacher\n"
    assert capsys.readouterr().err == said and asked
    ranks.end_with(UserError("my own part"), mine=True)
    assert capsys.readouterr().err == "l2t: error: my own part\n" and len(asked) == 1
