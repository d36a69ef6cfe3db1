"""Half precision and torch's own wrapper under fairseq's trainer.

On a CPU fairseq trains in float16 where it need not flatten its float32 copies, and in bfloat16 by
way of hydra (its flag means a TPU). For the rest ``as_gpu`` lets it run its GPU code on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_fairseq import TINY_MODEL, TINY_RUN, USER_DIR, run_module
from toy_processes import SGD, SHARED, nearly_same, same_state, state, together
from toy_runs import Result, hydra_run, same_parameters

pytest.importorskip("fairseq")

WriteTeacher = Callable[..., Path]
HALF = {
    "float32 copies": ["--fp16", "--fp16-no-flatten-grads"],
    "memory efficient": ["--fp16", "--memory-efficient-fp16"],
}


def train(
    data: Path, folder: Path, *flags: str, module: str = "fairseq_cli.train"
) -> tuple[Result, dict[str, Any]]:
    """Run fairseq-train for twelve updates; return what it printed and its last checkpoint."""
    done = run_module(
        module,
        [str(data), *TINY_MODEL, *TINY_RUN, "--validate-interval-updates", "4",
         "--max-update", "12", "--save-dir", str(folder), *flags],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done, last(folder)


def last(folder: Path) -> dict[str, Any]:
    """Return the last checkpoint in ``folder``, which a test made."""
    found: dict[str, Any] = torch.load(
        folder / "checkpoint_last.pt", weights_only=False, map_location="cpu"
    )
    return found


def learnt_in(dtype: torch.dtype, checkpoint: dict[str, Any]) -> bool:
    """Tell whether all parameters, which fairseq saves in float32, are numbers of ``dtype``."""
    floats = [v for v in checkpoint["model"].values() if v.is_floating_point()]
    return all(torch.equal(v, v.to(dtype).to(v.dtype)) for v in floats)


def updates(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["optimizer_history"][-1]["num_updates"])


@pytest.mark.parametrize("kind", HALF)
def test_the_neutral_teacher_is_cross_entropy_to_the_bit(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path, kind: str
) -> None:
    teacher = write_teacher(tmp_path / "t.safetensors", toy_data, neutral=True)
    dropout = [flag for flag in SHARED if flag not in ("--dropout", "0")]
    taught = [*dropout, "--l2t-teacher", str(teacher), "--l2t-debug"]
    _, ours = train(toy_data, tmp_path / "ours", *HALF[kind], *taught)
    _, stock = train(toy_data, tmp_path / "stock", *HALF[kind],
                     "--required-batch-size-multiple", "1")  # fmt: skip
    assert learnt_in(torch.float16, ours)
    assert same_parameters(ours, stock)


def test_bfloat16_by_hydra_is_cross_entropy_to_the_bit(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path
) -> None:
    teacher = write_teacher(tmp_path / "t.safetensors", toy_data, neutral=True)
    half = "bf16: true, fp16_no_flatten_grads: true"
    criterion = f"_name: l2t_dynamic, l2t_teacher: {teacher}, l2t_debug: true"
    hydra_run(tmp_path / "ours", f"_name: l2t_translation, data: {toy_data}", criterion,
              f"{half}, user_dir: {USER_DIR}", 12)  # fmt: skip
    hydra_run(tmp_path / "stock", f"_name: translation, data: {toy_data}", "_name: cross_entropy",
              half, 12)  # fmt: skip
    ours, stock = last(tmp_path / "ours"), last(tmp_path / "stock")
    assert updates(ours) == state(ours)["step"] == 12
    assert learnt_in(torch.bfloat16, ours)
    assert same_parameters(ours, stock)


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the module that runs fairseq's GPU code, from the folder where it is."""
    monkeypatch.chdir(Path(__file__).parent)
    return "as_gpu"


@pytest.mark.parametrize("kind", HALF)
def test_an_overflow_is_no_step_of_the_student(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path, as_gpu: str, kind: str
) -> None:
    """The trainer drops such a batch; neither s_t nor the number of its step may move."""
    teacher = write_teacher(tmp_path / "t.safetensors", toy_data, form="lowrank", warmup_steps=1)
    taught = [*HALF[kind], *SHARED, "--l2t-teacher", str(teacher), "--l2t-debug"]
    said, saved = train(
        toy_data, tmp_path / "run", *taught, "--fp16-init-scale", str(2**24), module=as_gpu
    )
    assert (said.stdout + said.stderr).count("gradient overflow detected") >= 3
    assert updates(saved) == state(saved)["step"] == 12
    assert all(isinstance(v, float) for v in state(saved)["state"]["train"].values())
    # Where nothing overflows the first batches are learnt from, too.
    calm, other = train(
        toy_data, tmp_path / "calm", *taught, "--fp16-init-scale", "4", module=as_gpu
    )
    assert "overflow detected" not in calm.stdout + calm.stderr
    assert updates(other) == state(other)["step"] == 12
    assert not same_parameters(saved, other)


def test_torchs_own_wrapper_is_one_process(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path, as_gpu: str
) -> None:
    """``--ddp-backend pytorch_ddp``, each gradient added up while the next is made."""
    teacher = write_teacher(tmp_path / "t.safetensors", toy_data, form="lowrank", dev_interval=3)
    arguments = [str(toy_data), *TINY_MODEL, *TINY_RUN, *SHARED, "--l2t-teacher", str(teacher),
                 "--max-update", "6", "--validate-interval-updates", "3", "--l2t-debug",
                 *SGD]  # fmt: skip
    one = run_module(
        "fairseq_cli.train", [*arguments, "--update-freq", "2", "--save-dir", str(tmp_path / "one")]
    )
    assert one.returncode == 0, one.stderr[-2000:]
    # fairseq 0.12.2's encoder has parameters that it uses in evaluation only.
    own = ["--ddp-backend", "pytorch_ddp", "--find-unused-parameters"]
    own += ["--save-dir", str(tmp_path / "two")]
    for result in together(arguments, own, own, module=as_gpu):
        assert result.returncode == 0, result.stderr[-2000:]
    whole = last(tmp_path / "one"), last(tmp_path / "two")
    nearly_same(*whole)
    same_state(*map(state, whole))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("flags", [["--fp16"], ["--fp16", "--memory-efficient-fp16"], ["--amp"],
                                   ["--ddp-backend", "pytorch_ddp"]])  # fmt: skip
def test_on_a_gpu(
    toy_data: Path, write_teacher: WriteTeacher, tmp_path: Path, flags: list[str]
) -> None:
    teacher = write_teacher(tmp_path / "t.safetensors", toy_data, form="lowrank", warmup_steps=1)
    run = [flag for flag in TINY_RUN if flag != "--cpu"]
    done = run_module(
        "fairseq_cli.train",
        [str(toy_data), *TINY_MODEL, *run, *SHARED, "--l2t-teacher", str(teacher), "--l2t-debug",
         "--max-update", "12", "--save-dir", str(tmp_path), *flags],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    saved = last(tmp_path)
    assert updates(saved) == state(saved)["step"] == 12
    assert all(isinstance(v, float) for v in state(saved)["state"]["train"].values())
