"""Scoring a student of a fairseq command: on raw text where there is some, and saying so if not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from l2t_core.errors import UserError
from l2t_core.teachers.file import check_teacher
from l2t_fairseq.commands.generate import check_generate_flags
from l2t_fairseq.commands.shell_script import split_flags
from l2t_fairseq.commands.train import (
    FairseqCommand,
    direction,
    has_flag,
    restored_from,
    value_of,
)
from l2t_fairseq.corpora.prepare import read_lines
from l2t_fairseq.fingerprint import data_fingerprint
from l2t_fairseq.scoring import language_pair, score_checkpoint

DEFAULT_GENERATE = "--beam 5"
BLEU = "expected_bleu"
_RESETS = ("--reset-optimizer", "--reset-dataloader", "--reset-lr-scheduler", "--reset-meters")


@dataclass(frozen=True)
class TestSet:
    """Where a command's test data is, and how to score on it.

    ``generate`` holds fairseq-generate's flags; ``reference`` a raw text with a line for each test
    sentence. Without one, the raw text of a folder that ``l2t data prepare`` made is used; failing
    that, the data-bin's own target side with its subwords joined. ``measure`` is a teacher's,
    ``user_dir`` the plugin to generate with (None: ours), ``languages`` the student's source and
    target (None: as the data's files are named), ``environment`` what the command has in front.
    """

    data_bin: Path
    generate: str = DEFAULT_GENERATE
    reference: Path | None = None
    measure: str = BLEU
    user_dir: Path | None = None
    languages: tuple[str, str] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        command: FairseqCommand,
        generate: str = "",
        reference: Path | None = None,
        measure: str = BLEU,
        user_dir: Path | None = None,
    ) -> TestSet:
        """Return the test set in the data folder that ``command`` names.

        Raises:
            UserError: if it names none, there is no test split to score on, or the command would
                leave no checkpoint to score or to go on from.
        """
        _refuse_to_leave_nothing(command)
        _refuse_to_count_anew(command)
        found = data_folder(command)
        if found is None:
            words = [word for word in command.arguments if not word.startswith("-")]
            looked = f" (first argument: {words[0].split(':')[0]})" if words else ""
            raise UserError(
                f"the command names no folder with dict.*.txt{looked}; give the folder that "
                "fairseq-preprocess or `l2t data prepare` wrote"
            )
        pair = direction(command)
        language_pair(found, "train", pair)
        _refuse_missing_test(command, found)
        language_pair(found, "test", pair)
        if reference is not None:
            read_lines(reference)
        flags = generate or DEFAULT_GENERATE
        return cls(found, flags, reference, measure, user_dir, pair, command.environment)

    @property
    def target(self) -> str:
        """The target language's code."""
        return language_pair(self.data_bin, "test", self.languages)[1]

    def check(self, teacher: Path) -> None:
        """Refuse a teacher for another target dictionary, and flags that cannot generate.

        Raises:
            UserError: with the two sizes side by side, or fairseq's reason.
        """
        self.check_flags()
        check_teacher(teacher, data_fingerprint(self.data_bin, self.target))

    def check_flags(self) -> None:
        """Refuse flags that cannot generate what is scored.

        Raises:
            UserError: with fairseq's reason.
        """
        check_generate_flags(split_flags(self.generate, "--generate"), self.data_bin)

    def score(
        self, checkpoint: Path, folder: Path, split: str = "test"
    ) -> tuple[float, str]:
        """Generate with ``checkpoint``, write hypotheses into ``folder``; return score, signature.

        Raises:
            UserError: if fairseq-generate fails or leaves sentences out.
        """
        flags = split_flags(self.generate, "--generate")
        reference = self.reference if split == "test" else None
        result = score_checkpoint(
            self.data_bin, checkpoint, flags, split, folder, reference, self.measure,
            self.user_dir, self.languages, self.environment,
        )  # fmt: skip
        return result.score, result.signature


def _refuse_missing_test(command: FairseqCommand, folder: Path) -> None:
    """Refuse data without a test set; of several folders (``one:two``) the first has to hold it."""
    if any(folder.glob("test.*-*.*.idx")):
        return
    shards = any(word.startswith(f"{folder}:") for word in command.arguments)
    first = " (of the folders, the first has to have it)" if shards else ""
    raise UserError(
        f"{folder} holds no split 'test', which students are scored on{first}; add one with "
        "fairseq-preprocess --testpref and the same dictionaries (--srcdict, --tgtdict)"
    )


def _refuse_to_leave_nothing(command: FairseqCommand) -> None:
    """Refuse what would be found missing after hours of training: the checkpoint to score."""
    flag = ""
    if has_flag(command, "--no-save"):
        flag = "--no-save"
    elif value_of(command, "--checkpoint-suffix"):
        flag = "--checkpoint-suffix"
    elif has_flag(command, "--no-last-checkpoints") and has_flag(command, "--disable-validation"):
        flag = "--no-last-checkpoints"
    if flag:
        raise UserError(
            f"{flag} leaves no checkpoint_best.pt or checkpoint_last.pt, and those are what is "
            "scored at the end; remove it"
        )


def _refuse_to_count_anew(command: FairseqCommand) -> None:
    """Refuse checkpoints that fairseq goes on from with the parameters alone."""
    if has_flag(command, "--no-save-optimizer-state"):
        raise UserError(
            "--no-save-optimizer-state leaves out the update's number with the optimiser's state: "
            "a student that was killed would train from update 0 to --max-update once more; "
            "remove it (--no-epoch-checkpoints saves room, too)"
        )
    resets = [flag for flag in _RESETS if has_flag(command, flag)]
    if resets and restored_from(command) is None:
        raise UserError(
            f"{resets[0]} acts when fairseq goes on from a checkpoint, which here is that of a "
            "student that was killed: it would become another; remove it, or name by "
            "--restore-file the checkpoint that it is meant for"
        )


def data_folder(command: FairseqCommand) -> Path | None:
    """Return the first folder with dictionaries that ``command`` names, if any."""
    for word in command.arguments:
        folder = Path(word.split(":")[0])
        if not word.startswith("-") and folder.is_dir() and any(folder.glob("dict.*.txt")):
            return folder
    return None
