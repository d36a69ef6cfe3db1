"""The students that several test files look at, trained once."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from toy_fairseq import TINY_MODEL, TINY_RUN, USER_DIR, run_module

from l2t_core.teachers.file import load_header
from l2t_fairseq.commands.taught import resumable, teach_command
from l2t_fairseq.commands.train import FairseqCommand, has_flag, with_value

STEPS = 20
Result = subprocess.CompletedProcess[str]


class Runs:
    """The runs that the tests look at, by name: their folder, output and checkpoints."""

    def __init__(self, root: Path, data: Path, write_teacher: Callable[..., Path]) -> None:
        self.root, self.data = root, data
        self.teachers = {
            "neutral": write_teacher(root / "neutral.safetensors", data, neutral=True),
            "real": write_teacher(root / "real.safetensors", data, warmup_steps=2),
        }
        self.results: dict[str, Result] = {}

    def plain(self) -> FairseqCommand:
        """Return the cross-entropy command that everything starts from."""
        return FairseqCommand({}, [], [str(self.data), *TINY_MODEL, *TINY_RUN])

    def taught(self, teacher: str) -> FairseqCommand:
        """Return the command as ``l2t apply-teacher`` writes it."""
        path = self.teachers[teacher]
        return teach_command(self.plain(), path, load_header(path), USER_DIR).command

    def run(self, name: str, command: FairseqCommand) -> None:
        """Train under ``name``."""
        command = with_value(command, "--save-dir", str(self.root / name))
        self.results[name] = run_module("fairseq_cli.train", command.arguments)
        assert self.results[name].returncode == 0, self.results[name].stderr[-2000:]

    def checkpoint(self, name: str, file: str = "checkpoint_last.pt") -> dict[str, Any]:
        """Return a checkpoint's content."""
        # Own files of a moment ago; what a checkpoint may hold is tested by fairseq's loading.
        return torch.load(self.root / name / file, weights_only=False)

    def logged(self, name: str) -> list[dict[str, str]]:
        """Return what fairseq logged, without times and speeds."""
        entries = []
        for line in self.results[name].stdout.splitlines():
            if re.search(r"\| (train_inner|train|valid) \| \{", line):
                entry = json.loads(line[line.index("{") :])
                slow = ("wps", "ups", "wall")
                entries.append({k: v for k, v in entry.items() if not k.endswith(slow)})
        return entries


def train_all(root: Path, data: Path, write_teacher: Callable[..., Path]) -> Runs:
    """Train all students that the tests compare, two at a time."""
    runs = Runs(root, data, write_teacher)
    # What matters to the comparison: all validate at the same updates.
    plain = with_value(runs.plain(), "--validate-interval-updates", "4")
    assert has_flag(plain, "--max-update")
    jobs = {
        "plain": plain,
        "plain_ours": resumable(plain, USER_DIR),
        "neutral": runs.taught("neutral"),
        "neutral_stock": with_value(runs.taught("neutral"), "--task", "translation"),
        "real": runs.taught("real"),
        "real_stock": with_value(runs.taught("real"), "--task", "translation"),
    }
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: runs.run(*job), jobs.items()))
    half = str(runs.root / "real" / "checkpoint_2_10.pt")
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda job: runs.run(*job),
                {
                    "resumed": with_value(runs.taught("real"), "--restore-file", half),
                    "resumed_at_epoch": with_value(
                        runs.taught("real"),
                        "--restore-file",
                        str(runs.root / "real/checkpoint1.pt"),
                    ),
                    "warm_start": FairseqCommand(
                        {},
                        [],
                        [
                            *runs.taught("real").arguments,
                            *("--restore-file", str(runs.root / "plain/checkpoint_last.pt")),
                            *("--reset-optimizer", "--reset-dataloader", "--reset-meters"),
                        ],
                    ),
                    "plain_resumed": with_value(
                        jobs["plain_ours"],
                        "--restore-file",
                        str(runs.root / "plain_ours/checkpoint_2_10.pt"),
                    ),
                    "resumed_stock": with_value(jobs["real_stock"], "--restore-file", half),
                }.items(),
            )
        )
    return runs


# The model and the run of TINY_MODEL and TINY_RUN.
_HYDRA = """\
# @package _global_
common: {{cpu: true, seed: 3, {common}}}
task: {{{task}}}
criterion: {{{criterion}}}
model:
  _name: transformer
  encoder: {{layers: 1, embed_dim: 16, ffn_embed_dim: 32, attention_heads: 2}}
  decoder: {{layers: 1, embed_dim: 16, ffn_embed_dim: 32, attention_heads: 2}}
  dropout: 0.1
  base_layers: 0
dataset: {{batch_size: 8, num_workers: 0, validate_interval_updates: 4}}
optimization: {{max_update: {updates}, lr: [0.003]}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: inverse_sqrt, warmup_updates: 4}}
checkpoint: {{save_dir: {folder}}}
hydra: {{run: {{dir: {folder}}}}}
"""


def hydra_run(folder: Path, task: str, criterion: str, common: str, updates: int) -> None:
    """Run fairseq-hydra-train with these sections' settings; checkpoints go to ``folder``."""
    settings = {"task": task, "criterion": criterion, "common": common, "updates": updates}
    name = f"{folder.name}-by-hydra"
    (folder.parent / f"{name}.yaml").write_text(_HYDRA.format(folder=folder, **settings))
    done = run_module(
        "fairseq_cli.hydra_train", ["--config-dir", str(folder.parent), "--config-name", name]
    )
    assert done.returncode == 0, done.stderr[-2000:]


def parameters(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a model's state without the marker of its device.

    fairseq 0.12.2 saves that one without ever filling it: whatever was in memory.
    """
    return {key: value for key, value in state.items() if not key.endswith("._float_tensor")}


def same_parameters(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two checkpoints hold the same parameters, bit for bit."""
    assert one["model"].keys() == other["model"].keys()
    return all(
        torch.equal(value, other["model"][key]) for key, value in parameters(one["model"]).items()
    )
