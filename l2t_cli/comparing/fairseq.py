"""The trials of a translation recipe's comparison: one fairseq-train command, several losses."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from l2t_cli.applying.fairseq import (
    BEST,
    RecipeApplication,
    checkpoint_of,
    judged_by,
    on_cross_entropy,
)
from l2t_cli.applying.fairseq_process import UPDATES, lost_its_numbers, train_to_end, updates_made
from l2t_cli.comparing.trials import Result, Trial
from l2t_cli.recipe_reading.loading import Recipe
from l2t_cli.user_dir import plugin_of
from l2t_core.errors import UserError
from l2t_core.losses.baselines import complete_settings
from l2t_fairseq.commands.shell_script import split_flags
from l2t_fairseq.commands.taught import (
    keeps_the_worst,
    refuse_other_user_dir,
    resumable,
    without_criterion_flags,
)
from l2t_fairseq.commands.train import (
    FairseqCommand,
    has_flag,
    total_steps,
    value_of,
    with_value,
    without,
)
from l2t_fairseq.corpora.folder import open_data
from l2t_fairseq.corpora.text_form import TextForm

MRT = "mrt"
# `nll_loss 5.31`, `"valid_nll_loss": "5.31"`; plain cross-entropy calls it `loss`.
_NLL = (
    r"(?<![\w])(?:{}_)?(nll_loss|loss)[\"']?\s*[=: ]\s*[\"']?(\d+\.?\d*(?:e[+-]?\d+)?|nan|inf)"
)


class FairseqTrials:
    """Trains and measures a translation recipe's students; see ``FieldTrials``."""

    lower_is_better = False
    worst = 0.0
    curve = "dev nll (nats a token)"

    def __init__(self, recipe: Recipe) -> None:
        import torch

        self.application = RecipeApplication(recipe)
        self.measure = self.dev_measure = self.application.measure
        self.steps = total_steps(self.application.command)
        command = self.application.command
        if value_of(command, "--validate-interval-updates") is None:
            # As often as the teacher's students looked at dev, and the same for every loss.
            every = max(1, round(recipe.student.dev_interval * self.steps / recipe.student.steps))
            command = with_value(command, "--validate-interval-updates", str(every))
        self.application.command = command
        self.one_a_core = has_flag(command, "--cpu") or not torch.cuda.is_available()

    @property
    def rate(self) -> float:
        """The command's learning rate.

        Raises:
            UserError: if it has none, or several.
        """
        text = value_of(self.application.command, "--lr")
        try:
            return float(text or "")
        except ValueError:
            given = f"--lr {text}" if text else "no --lr"
            raise UserError(
                f"nmt.train has {given}; a comparison needs one rate to start from, or compare.lr"
            ) from None

    def check(self, teachers: Sequence[Path], losses: Sequence[str]) -> None:
        """Refuse missing data, flags that cannot generate, and teachers for another dictionary."""
        open_data(self.application.data)
        self.application.test_set().check_flags()
        for teacher in teachers:
            self.application.check(teacher)
        if MRT in losses:
            command = self.application.command
            refuse_other_user_dir(command, plugin_of(command).folder)

    def notes(self) -> list[str]:
        """Return what looks wrong in the command."""
        return [text for text in [keeps_the_worst(self.application.command)] if text]

    def identity(self) -> dict[str, Any]:
        """Return the command without rate and seed, the data's record, and the versions."""
        import torch

        from l2t_core import __version__

        command = without(self.application.command, "--seed", takes_value=True)
        command = without(command, "--lr", takes_value=True)
        return {
            "field": "nmt",
            "command": self.application.identity_of(command),
            "generate": self.application.generate,
            **self.application.other_measure(),
            "content": self.application.content(),
            "versions": {
                "l2t": __version__,
                "torch": torch.__version__,
                # Whichever distribution or checkout gives `import fairseq`.
                "fairseq": str(getattr(import_module("fairseq"), "__version__", "unknown")),
            },
        }

    def command(self, trial: Trial, folder: Path) -> FairseqCommand:
        """Return exactly what is run for one student."""
        command = self.application.command
        if trial.teacher:
            command = self.application.taught(trial.teacher)
            command = judged_by(command, "nll_loss", "l2t_accuracy")
        else:
            plugin = plugin_of(command)
            command = without_criterion_flags(resumable(command, plugin.folder, plugin.tasks))
            if trial.loss == MRT:
                command = self._at_risk(command, trial)
            else:
                command = on_cross_entropy(command, dict(trial.settings).get("eps"))
        command = with_value(command, "--lr", f"{trial.lr:g}")
        command = with_value(command, "--seed", str(trial.seed))
        return with_value(command, "--save-dir", str(folder / "checkpoints"))

    def _at_risk(self, command: FairseqCommand, trial: Trial) -> FairseqCommand:
        """Return cross-entropy's command with minimum risk training in its last updates.

        The checkpoint is then chosen by what is trained, the dev measure: plain dev nll grows as
        soon as something else is.
        """
        own = complete_settings(MRT, dict(trial.settings))
        flags = split_flags(self.application.generate, "nmt.generate")
        form = TextForm("words").as_generated(flags, "")
        values = {
            "--criterion": "l2t_expected_measure",
            "--l2t-warmup-steps": str(round((1.0 - own["share"]) * self.steps)),
            "--l2t-ce-mix": f"{own['mix']:g}",
            "--l2t-samples": f"{own['samples']:g}",
            "--l2t-alpha": f"{own['alpha']:g}",
            "--l2t-tokenizer": form.tokenizer,
            **{f"--l2t-{k}": v for k, v in self.application.other_measure().items()},
        }
        for flag, value in values.items():
            command = with_value(command, flag, value)
        if value_of(command, BEST) in (None, "loss", "nll_loss"):
            words = [*command.arguments, "--maximize-best-checkpoint-metric"]
            command = replace(command, arguments=words)
        return judged_by(command, "l2t_measure", "l2t_accuracy")

    def run(self, trial: Trial, folder: Path) -> Result:
        """Run fairseq-train, or let it go on; translate dev, and test if it is a final student."""
        began = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        command = self.command(trial, folder)
        log = folder / "train.log"
        dev_split = (value_of(command, "--valid-subset") or "valid").split(",")[0]
        try:
            train_to_end(command, log, lambda updates, note: None)
        except UserError as error:
            if not lost_its_numbers(error, log):
                raise
            curve = _curve(log, dev_split)
            made = int(curve[-1][0]) if curve else 0
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return Result(time.monotonic() - began, made, diverged="fairseq-train lost its numbers")
        curve = _curve(log, dev_split)
        dev, _ = self._score(folder, dev_split)
        test, signature = self._score(folder, "test") if trial.final else (None, "")
        return Result(
            seconds=time.monotonic() - began,
            steps=updates_made(log) or self.steps,  # 0 where --log-format none tells nothing
            dev=dev,
            nll=min((nll for _, nll in curve), default=None),
            test=test,
            signature=signature,
            curve=curve,
        )

    def _score(self, folder: Path, split: str) -> tuple[float, str]:
        checkpoint = checkpoint_of(folder / "checkpoints", self.application.command)
        return self.application.test_set().score(checkpoint, folder, split)


def _curve(log: Path, subset: str) -> list[list[float]]:
    """Return ``[updates, dev nll in nats]`` of every validation on ``subset`` in the output.

    fairseq-train validates on each of ``--valid-subset``, and chooses by the first alone.
    """
    marks = (f"valid on '{subset}' subset", f'"{subset}_loss"')  # the second with --log-format json
    nll = re.compile(_NLL.format(re.escape(subset)))
    found: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        at = UPDATES.search(line)
        if at is None or not any(mark in line for mark in marks):
            continue
        losses = dict(nll.findall(line))
        value = float(losses.get("nll_loss") or losses.get("loss") or "nan")
        if math.isfinite(value):
            found[int(at.group(1))] = value * math.log(2)  # fairseq reports base 2
    return [[updates, found[updates]] for updates in sorted(found)]
