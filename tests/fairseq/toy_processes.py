"""Two processes of fairseq-train over gloo, and what their checkpoints have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkout import reserved_port  # type: ignore[import-not-found]
from toy_fairseq import USER_DIR, start_module
from toy_runs import Result, parameters

# Adam would turn the rounding error of a gradient that is zero in theory into a step.
SGD = ["--optimizer", "sgd", "--lr", "0.5"]
# On one process and on two the same batches make an update; dropout would draw other masks.
SHARED = ["--dropout", "0", "--required-batch-size-multiple", "1", "--task", "l2t_translation",
          "--criterion", "l2t_dynamic", "--user-dir", str(USER_DIR)]  # fmt: skip
GLOO = ["--distributed-world-size", "2", "--distributed-init-method", "env://",
        "--distributed-no-spawn", "--device-id", "0", "--distributed-backend", "gloo",
        "--ddp-backend", "legacy_ddp"]  # fmt: skip


def together(
    arguments: list[str], *own: list[str], module: str = "fairseq_cli.train"
) -> list[Result]:
    """Run ``module`` on two processes over gloo; ``own`` are the flags of each."""
    with reserved_port() as port:
        running = [
            start_module(
                module,
                [*arguments, *GLOO, "--distributed-rank", str(rank), *own[rank]],
                RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                LOCAL_RANK=str(rank),
            )
            for rank in range(2)
        ]  # fmt: skip
        return [process.wait() for process in running]


def nearly_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key, tensor in parameters(one["model"]).items():
        torch.testing.assert_close(tensor, other["model"][key], rtol=0, atol=1e-6)


def state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["extra_state"]["train_iterator"]["l2t"]["applied"]


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["step"] == other["step"]
    for split in ("train", "dev"):
        for name in ("nll", "accuracy"):
            assert one["state"][split][name] == pytest.approx(other["state"][split][name], rel=1e-5)
