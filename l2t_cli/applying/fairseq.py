"""Applying a teacher to a fairseq command: from a recipe, after ``--``, or out of a script."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from l2t_cli.applying.fairseq_process import lost_its_numbers, train_to_end, updates_made
from l2t_cli.applying.fairseq_scoring import BLEU, TestSet, data_folder
from l2t_cli.applying.result import Score
from l2t_cli.applying.students import student_title
from l2t_cli.recipe_reading.loading import Recipe
from l2t_cli.screen.console import LogFormat
from l2t_cli.screen.progress import bar
from l2t_cli.user_dir import plugin_of
from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_write, file_digest
from l2t_core.teachers.file import load_header
from l2t_fairseq.commands.shell_script import split_flags
from l2t_fairseq.commands.taught import (
    TaughtCommand,
    keeps_the_worst,
    teach_command,
    without_criterion_flags,
)
from l2t_fairseq.commands.train import (
    FairseqCommand,
    has_flag,
    parse_command,
    parse_script,
    restored_from,
    save_dir,
    shell_text,
    total_steps,
    value_of,
    with_value,
    without,
    without_exports,
)
from l2t_fairseq.corpora.folder import data_bin_of, open_data
from l2t_fairseq.fingerprint import data_digest
from l2t_fairseq.measures.sentence_scores import LIKELIHOOD, build_measure, measure_content
from l2t_fairseq.students.start import FINETUNE_FLAG, restored_content, start_content

_MARK = "command.sh"
BEST = "--best-checkpoint-metric"
_ACCURACIES = ("accuracy", "l2t_accuracy")


class FairseqApplication:
    """A fairseq-train command that a teacher is applied to.

    ``generate`` are flags for fairseq-generate, ``reference`` a raw text of the test set; both may
    be left to :class:`~l2t_cli.applying.fairseq_scoring.TestSet`. ``scored_by`` is the measure's
    name in a recipe, ``measure`` its title.
    """

    scored_by = BLEU
    measure = "BLEU"
    lower_is_better = False
    worst = 0.0
    rate = "--lr"
    may_change: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        command: FairseqCommand,
        generate: str = "",
        reference: Path | None = None,
    ) -> None:
        self.name, self.command = name, command
        split_flags(generate, "--generate")
        self.generate, self.reference = generate, reference
        self._teacher = Path()
        self.default_seed = _seed(command)
        self.defaults: dict[str, Any] = {}  # the command holds what is set, and no more

    @classmethod
    def from_words(
        cls, words: list[str], generate: str = "", reference: Path | None = None
    ) -> FairseqApplication:
        """Take the command as the shell split it."""
        command = parse_command(words)
        return cls(_name(command), command, generate, reference)

    @classmethod
    def from_script(
        cls, path: Path, generate: str = "", reference: Path | None = None
    ) -> FairseqApplication:
        """Take the command that a shell script holds."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the script {path}: {error}") from None
        try:
            return cls(path.stem, parse_script(text), generate, reference)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def config(self) -> dict[str, Any]:
        """Return what identifies the student: the command without its seed, and its data."""
        command = without(self.command, "--seed", takes_value=True)
        return {
            **self.other_measure(),
            "command": self.identity_of(command),
            "generate": self.generate,
            "reference": str(self.reference) if self.reference else None,
            "content": self.content(),
        }

    def identity_of(self, command: FairseqCommand) -> str:
        """Return the part of ``command`` that tells its students from others, as one line.

        What a script exports is not: it may hold what the shell has (``PATH=bin:$PATH``), which is
        another one where the run goes on.
        """
        return shell_text(without_exports(command))

    def other_measure(self) -> dict[str, str]:
        """Return ``scored_by`` as a setting, nothing for BLEU."""
        return {} if self.scored_by == BLEU else {"measure": self.scored_by}

    def content(self) -> dict[str, str]:
        """Return digests of what the command names without holding it."""
        found = {"data_sha256": data_digest(self.test_set().data_bin)}
        found |= start_content(value_of(self.command, FINETUNE_FLAG))
        found |= restored_content(restored_from(self.command))
        found |= measure_content(self.scored_by)
        if self.reference:
            found["reference_sha256"] = file_digest(self.reference, "sha256")
        return found

    def check(self, teacher: Path) -> None:
        """Refuse what cannot be taught, missing data, and a teacher for another dictionary."""
        self._teacher = teacher
        self.taught(teacher)
        test_set = self.test_set()
        open_data(test_set.data_bin)
        _refuse_empty_dev(test_set.data_bin, value_of(self.command, "--valid-subset") or "valid")
        test_set.check(teacher)

    def notes(self, teacher: Path, baseline: bool) -> list[str]:
        """Return what was replaced and what went with it, in one line, and what looks wrong."""
        said = [
            change
            for change in self._teach(teacher).changes
            if change.startswith(("--criterion", "--task", "left out")) or " removed: " in change
        ]
        if baseline:
            said.append("the student to compare with trains by plain cross-entropy")
        lines = [f"changed: {'; '.join(said)}"] if said else []
        worst = keeps_the_worst(self.command)
        return [*lines, f"warning: {worst}"] if worst else lines

    def test_set(self) -> TestSet:
        """Return what the student is scored on."""
        plugin = plugin_of(self.command).folder
        return TestSet.of(self.command, self.generate, self.reference, self.scored_by, plugin)

    def taught(self, teacher: Path) -> FairseqCommand:
        """Return the command with the teacher in it."""
        return self._teach(teacher).command

    def _teach(self, teacher: Path) -> TaughtCommand:
        plugin, header = plugin_of(self.command), load_header(teacher)
        return teach_command(
            self.command, teacher.resolve(), header, plugin.folder, plugin.tasks
        )

    def baseline(self, teacher: Path) -> FairseqCommand:
        """Return the same command on cross-entropy, validating as often as the taught one."""
        # The task stays, so that this student, too, goes on exactly where it was killed.
        command = without_criterion_flags(self.taught(teacher))
        return on_cross_entropy(command)

    def command_for(self, seed: int, teacher: Path | None, folder: Path) -> FairseqCommand:
        """Return exactly what is run for one student."""
        command = self.taught(teacher) if teacher else self.baseline(self._teacher)
        command = with_value(command, "--seed", str(seed))
        return with_value(command, "--save-dir", str(self.checkpoints(seed, teacher, folder)))

    def checkpoints(self, seed: int, teacher: Path | None, folder: Path) -> Path:
        """Return where a student's checkpoints go: where the user said, for the one asked for."""
        if teacher and seed == self.default_seed and value_of(self.command, "--save-dir"):
            return save_dir(self.command)
        return folder / "checkpoints"

    def plan(self, seed: int, teacher: Path | None, folder: Path) -> list[str]:
        """Return the training command, ready to be pasted into a shell."""
        return [shell_text(self.command_for(seed, teacher, folder))]

    def begun(self, seed: int, teacher: Path | None, folder: Path) -> bool:
        """Tell whether there are checkpoints of ours to go on from, wherever they go."""
        checkpoints = self.checkpoints(seed, teacher, folder)
        return (folder / _MARK).exists() and any(checkpoints.glob("checkpoint*.pt"))

    def run(self, seed: int, teacher: Path | None, folder: Path, log_format: LogFormat) -> Score:
        """Run fairseq-train, or let it go on from its last checkpoint; generate and score.

        The checkpoints of a student that diverges stay; it is not scored.
        """
        began = time.monotonic()
        command = self.command_for(seed, teacher, folder)
        checkpoints = self.checkpoints(seed, teacher, folder)
        _claim(checkpoints, folder, shell_text(command))
        steps, log = total_steps(command), folder / "train.log"
        try:
            with bar(student_title(teacher, seed), log_format, quiet=True) as update:
                update(0, steps)
                train_to_end(command, log, lambda updates, note: update(updates, steps, note))
        except UserError as error:
            if not lost_its_numbers(error, log):
                raise
            return Score(None, "", time.monotonic() - began, diverged=str(error))
        with bar("generating and scoring", log_format, quiet=True):
            best = checkpoint_of(checkpoints, command)
            value, signature = self.test_set().score(best, folder)
        made = updates_made(log)
        early = f"update {made:,} of {steps:,}" if 0 < made < steps else ""
        return Score(value, signature, time.monotonic() - began, early=early)


class RecipeApplication(FairseqApplication):
    """An NMT recipe's fairseq command, scored by the measure that its teacher climbs."""

    rate = "--lr in nmt.train"

    def __init__(self, recipe: Recipe) -> None:
        spec = recipe.student
        self.data = Path(spec.data)
        flags = split_flags(spec.train, "nmt.train")
        split_flags(spec.generate, "nmt.generate")
        command = parse_command(["fairseq-train", str(data_bin_of(self.data)), *flags])
        super().__init__(recipe.short_name, command, spec.generate)
        if spec.measure != LIKELIHOOD:
            self.scored_by = spec.measure
        self.measure = build_measure(self.scored_by).title

    def identity_of(self, command: FairseqCommand) -> str:
        """Return ``command`` without the place of the data, which may be moved."""
        folder = str(data_folder(command))
        words = [word for word in command.arguments if word != folder]
        return shell_text(replace(command, arguments=words))

    def check(self, teacher: Path) -> None:
        """Refuse data that is missing or cut short, too."""
        open_data(self.data)
        super().check(teacher)


def on_cross_entropy(command: FairseqCommand, eps: float | None = None) -> FairseqCommand:
    """Return ``command`` on cross-entropy, smoothed by ``eps`` if that is given.

    Its checkpoint is chosen by what the command asks for, as far as there is a name for it.
    """
    if eps is None and value_of(command, BEST) not in _ACCURACIES:
        command = with_value(command, "--criterion", "cross_entropy")
        return judged_by(command, "loss", "")  # which is the plain one
    # Plain cross_entropy reports no accuracy; smoothing by 0 is the same loss and does.
    command = with_value(command, "--criterion", "label_smoothed_cross_entropy")
    command = with_value(command, "--label-smoothing", f"{eps or 0:g}")
    command = replace(command, arguments=[*command.arguments, "--report-accuracy"])
    return judged_by(command, "nll_loss", "accuracy")


def judged_by(command: FairseqCommand, nll: str, accuracy: str) -> FairseqCommand:
    """Choose the checkpoint by plain dev nll, or by what the user asked for, for every loss."""
    given = value_of(command, BEST)
    if given in (None, "loss", "nll_loss"):
        return with_value(command, BEST, nll)
    if given in _ACCURACIES:
        return with_value(command, BEST, accuracy)
    return command


def _name(command: FairseqCommand) -> str:
    """Name a command by its --save-dir, else by its data and model."""
    if value_of(command, "--save-dir"):
        return save_dir(command).name
    parts = []
    folder = data_folder(command)
    if folder is not None:
        place = folder.resolve()
        parts.append(place.parent.name if place.name == "data-bin" else place.name)
    parts.append(value_of(command, "--arch") or "fairseq")
    return "-".join(part for part in parts if part)


def _seed(command: FairseqCommand) -> int:
    text = value_of(command, "--seed") or "1"
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--seed {text} is no whole number; write --seed N") from None


def _refuse_empty_dev(data_bin: Path, splits: str) -> None:
    for split in splits.split(","):
        if any(file.stat().st_size == 0 for file in data_bin.glob(f"{split}.*.bin")):
            raise UserError(
                f"the dev set ({split}) of {data_bin} is empty; preprocess it again with "
                "--validpref, or name another --valid-subset"
            )


def _claim(checkpoints: Path, folder: Path, text: str) -> None:
    """Refuse checkpoints of another run: fairseq would go on from them, or we score them."""
    mark = folder / _MARK
    found = sorted(checkpoints.glob("checkpoint*.pt"))
    if found and not mark.exists():
        raise UserError(
            f"--save-dir {checkpoints} holds checkpoints of another run ({found[0].name}), which "
            "would be taken for this student's; choose another --save-dir"
        )
    # To be run, so a name that is not UTF-8 is written as it is.
    atomic_write(mark, f"{text}\n".encode(errors="surrogateescape"))


def checkpoint_of(folder: Path, command: FairseqCommand) -> Path:
    """Return the checkpoint to score: the best on dev, or the last where none was kept."""
    best = folder / "checkpoint_best.pt"
    looked = not has_flag(command, "--disable-validation")
    return best if looked and best.exists() else folder / "checkpoint_last.pt"
