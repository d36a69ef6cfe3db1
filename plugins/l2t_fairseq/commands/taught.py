"""What a teacher makes of a fairseq-train command, and which commands it refuses.

Pure functions over commands; nothing here runs one, and fairseq is not needed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2t_core.errors import UserError, suggestion
from l2t_fairseq.commands.train import (
    FairseqCommand,
    has_flag,
    total_steps,
    value_of,
    with_value,
    without,
)

if TYPE_CHECKING:  # reading a command should not wait for torch
    from l2t_core.teachers.file import TeacherHeader

TASKS = ("translation", "l2t_translation")
CRITERIONS = ("cross_entropy", "label_smoothed_cross_entropy", "l2t_dynamic")
# Flags that exist only together with the criterion they belong to, and whether a value follows.
CRITERION_FLAGS = {
    "--label-smoothing": True,
    "--ignore-prefix-size": True,
    "--report-accuracy": False,
}
# Those of the criterion l2t_dynamic.
OWN_FLAGS = {
    "--l2t-teacher": True,
    "--l2t-total-steps": True,
    "--l2t-warmup-steps": True,
    "--l2t-debug": False,
}
# What --best-checkpoint-metric may name that is not a loss.
HIGHER_IS_BETTER = ("accuracy", "bleu", "l2t_accuracy", "l2t_measure")
_REMAKE = "--update-epoch-batch-itr"  # batches made anew for each epoch


@dataclass(frozen=True)
class TaughtCommand:
    """The command with a teacher, and in words what was changed in it."""

    command: FairseqCommand
    changes: list[str]


def teach_command(
    command: FairseqCommand,
    teacher: Path,
    header: TeacherHeader,
    user_dir: Path,
    own_tasks: Collection[str] = (),
) -> TaughtCommand:
    """Return ``command`` with its criterion replaced by the teacher's loss.

    Adds what the plugin needs, drops flags that belong to the old criterion, and leaves all other
    flags as they are and where they are. ``user_dir`` is the plugin's folder, or the command's own
    with the plugin in it; ``own_tasks`` are the tasks there that build on the plugin's.

    Raises:
        UserError: if the command trains what cannot be taught, or contradicts itself.
    """
    refuse_unteachable(command, own_tasks)
    _refuse_blind(command, header)
    refuse_other_user_dir(command, user_dir)
    steps = total_steps(command)
    changes = [f"left out of the script's line: {part}" for part in command.left_out]
    for flag, wanted, default in (
        ("--criterion", "l2t_dynamic", "cross_entropy"),
        ("--task", _task_with_state(command, own_tasks), "translation"),
    ):
        before = value_of(command, flag) or default
        if before != wanted:
            why = ", so that a resumed run is exact" if flag == "--task" else ""
            changes.append(f"{flag} {before} -> {wanted}{why}")
        command = with_value(command, flag, wanted)
    for flag, takes_value in CRITERION_FLAGS.items():
        if has_flag(command, flag):
            command = without(command, flag, takes_value)
            changes.append(f"{flag} removed: it belongs to the old criterion")
    if value_of(command, "--best-checkpoint-metric") == "accuracy":
        command = with_value(command, "--best-checkpoint-metric", "l2t_accuracy")
        changes.append("--best-checkpoint-metric accuracy -> l2t_accuracy")
    added = {"--user-dir": str(user_dir), "--l2t-teacher": str(teacher)}
    if value_of(command, "--validate-interval-updates") is None:
        added["--validate-interval-updates"] = str(header.dev_interval_for(steps))
    if _orders_batches_by_epoch(command):
        added[_REMAKE] = "True"
    for flag, value in added.items():
        if value_of(command, flag) != value:
            command = with_value(command, flag, value)
            changes.append(f"{flag} {value}")
    return TaughtCommand(command, changes)


def keeps_the_worst(command: FairseqCommand) -> str:
    """Return a warning where fairseq would keep the checkpoint that is worst on dev, else ""."""
    metric = value_of(command, "--best-checkpoint-metric")
    if metric not in HIGHER_IS_BETTER or has_flag(command, "--maximize-best-checkpoint-metric"):
        return ""
    return (
        f"with --best-checkpoint-metric {metric} alone fairseq keeps the checkpoint that "
        "has least of it, and that one is scored; add --maximize-best-checkpoint-metric"
    )


def without_criterion_flags(command: FairseqCommand) -> FairseqCommand:
    """Return a command without the flags of any criterion, ours or another, for a new one."""
    for flag, takes_value in {**CRITERION_FLAGS, **OWN_FLAGS}.items():
        command = without(command, flag, takes_value)
    return command


def resumable(
    command: FairseqCommand, user_dir: Path, own_tasks: Collection[str] = ()
) -> FairseqCommand:
    """Return a command without a teacher that, killed, goes on to the same student.

    By itself fairseq cannot read its own checkpoints on torch from 2.6 on, and goes on with other
    batches once the first epoch is over; with the plugin's task it trains the same student and does
    neither. A command with another plugin or task stays as it is. ``user_dir`` and ``own_tasks``
    are as :func:`teach_command` has them.
    """
    given = value_of(command, "--user-dir")
    ours = given is None or Path(given).resolve() == user_dir.resolve()
    task = value_of(command, "--task") or "translation"
    if not ours or task not in (*TASKS, *own_tasks):
        return command
    command = with_value(command, "--task", _task_with_state(command, own_tasks))
    if _orders_batches_by_epoch(command):
        command = with_value(command, _REMAKE, "True")
    return with_value(command, "--user-dir", str(user_dir))


def _task_with_state(command: FairseqCommand, own_tasks: Collection[str]) -> str:
    """Return the task that carries s_t: the command's own if it builds on ours."""
    given = value_of(command, "--task")
    return given if given is not None and given in own_tasks else "l2t_translation"


def _orders_batches_by_epoch(command: FairseqCommand) -> bool:
    """Tell whether a resumed run would only by ``_REMAKE`` find the first run's batches again."""
    ordered = has_flag(command, "--update-ordered-indices-seed")
    ordered = ordered or value_of(command, "--curriculum") not in (None, "0")
    return ordered and value_of(command, _REMAKE) is None


def refuse_unteachable(command: FairseqCommand, own_tasks: Collection[str] = ()) -> None:
    """Refuse a command whose student no teacher can train or teach.

    ``own_tasks`` are the user's tasks that build on the plugin's.

    Raises:
        UserError: naming the flag, in words that fit a command and the flags of a recipe.
    """
    task = value_of(command, "--task") or "translation"
    if task not in (*TASKS, *own_tasks):
        own = ", or build yours on l2t_fairseq.task.L2TTranslationTask"
        raise UserError(
            f"--task {task} cannot be taught: l2t teaches translation; give a command with "
            f"--task translation{suggestion(task, ['translation'])}"
            + (own if value_of(command, "--user-dir") else "")
        )
    arch = value_of(command, "--arch") or ""
    if "_lm" in arch:
        raise UserError(
            f"--arch {arch} is a language model and cannot be taught: l2t teaches translation; "
            "give a command with an encoder-decoder"
        )
    criterion = value_of(command, "--criterion") or "cross_entropy"
    if criterion not in CRITERIONS:
        raise UserError(
            f"--criterion {criterion} cannot be replaced by a teacher's loss: it trains something "
            f"else; give a command with --criterion {' or '.join(CRITERIONS[:2])}"
        )
    if has_flag(command, "--tpu"):
        raise UserError("--tpu cannot be taught: statistics are not reported at every update there")


def _refuse_blind(command: FairseqCommand, header: TeacherHeader) -> None:
    """Refuse a command that never looks at dev where the teacher reads what is seen there."""
    if header.reads_dev and has_flag(command, "--disable-validation"):
        raise UserError(
            "--disable-validation leaves the teacher without the dev statistics that it reads; "
            "remove it"
        )


def refuse_other_user_dir(command: FairseqCommand, user_dir: Path) -> None:
    """Refuse a command that names another plugin than ``user_dir``: fairseq takes only one.

    Raises:
        UserError: naming both folders.
    """
    given = value_of(command, "--user-dir")
    if given is None or Path(given).resolve() == user_dir.resolve():
        return
    raise UserError(
        f"the command has --user-dir {given}, and fairseq takes only one; remove it, or put "
        "`import l2t_fairseq` first into that folder's __init__.py"
    )
