"""fairseq-train commands as people write them: reading them, and setting their flags.

Pure functions over argument lists; nothing here runs a command, and fairseq is not needed.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from l2t_core.errors import UserError, suggestion
from l2t_fairseq.commands.shell_script import SimpleCommand, simple_commands

# Other spellings that fairseq accepts for the same setting.
_ALIASES = {"--arch": ("-a",), "--source-lang": ("-s",), "--target-lang": ("-t",)}
_TRAIN = {"fairseq-train", "fairseq_cli.train"}
_HYDRA = {"fairseq-hydra-train", "fairseq_cli.hydra_train", "hydra_train.py"}
_QUOTED = re.compile(r"\bfairseq(?:-|_cli\.)train\b.*\s|\s.*\bfairseq(?:-|_cli\.)train\b")
# Commands of scripts that run no other: words like fairseq-train behind them are names.
_NO_LAUNCHERS = {
    *("echo", "printf", "which", "type", "hash", "test", "[", "[[", "mkdir", "rmdir", "rm", "ls"),
    *("cp", "mv", "ln", "touch", "cat", "tee", "head", "tail", "grep", "find", "du", "tar", "cd"),
    *("pushd", "chmod", "rsync", "pip", "pkill", "killall"),
}
_PYTHON = re.compile(r"python[\d.]*$|pypy[\d.]*$")


@dataclass(frozen=True)
class FairseqCommand:
    """A fairseq-train command: ``environment program arguments``.

    ``program`` is all that stands before fairseq-train's own arguments (``fairseq-train``,
    ``python -m fairseq_cli.train``, ``srun -n 1 fairseq-train``). ``left_out`` tells which parts
    of a script's line (redirections, pipes) are not in it, ``exported`` which variables of the
    ``environment`` the script exports on other lines.
    """

    environment: dict[str, str]
    program: list[str]
    arguments: list[str]
    left_out: list[str] = field(default_factory=list)
    exported: frozenset[str] = frozenset()


def parse_command(tokens: Sequence[str]) -> FairseqCommand:
    """Return the fairseq-train command that ``tokens``, split by a shell already, hold.

    Raises:
        UserError: if they are no fairseq-train command.
    """
    if not tokens:
        raise UserError("no command given; write it after --, as in -- fairseq-train DATA --arch …")
    environment, rest = _after_environment(tokens)
    length = _program_length(rest)
    if length == 0:
        shown = shlex.join(tokens[:3]) + (" …" if len(tokens) > 3 else "")
        hint = suggestion(PurePosixPath(rest[0]).name, ["fairseq-train"]) if rest else ""
        mend = hint or "; give one like `fairseq-train DATA --arch …`"
        if any(_QUOTED.search(token) for token in rest):  # bash -c 'exec fairseq-train "$@"'
            mend = " outside quotes; give that one plain, with --dry-run, and quote what it prints"
        raise UserError(f"`{shown}` is no fairseq-train command{mend}")
    return FairseqCommand(environment, rest[:length], rest[length:])


def looks_like_training(tokens: Sequence[str]) -> bool:
    """Tell a command, perhaps misspelt, from the name of a recipe or a script."""
    _, rest = _after_environment(tokens)
    name = PurePosixPath(rest[0]).name if rest else ""
    if name.startswith(("fairseq-", "torchrun")) or name == "train.py" or _PYTHON.match(name):
        return True
    try:
        return _program_length(rest) > 0
    except UserError:
        return True  # parse_command says what is wrong with it


def parse_script(text: str, environment: Mapping[str, str] | None = None) -> FairseqCommand:
    """Return the one fairseq-train command of the shell script ``text``.

    ``environment`` supplies variables that the script does not set (default: the process's).

    Raises:
        UserError: if there is none or more than one, or if the command depends on something that
            only a running shell knows.
    """
    commands = simple_commands(text, environment)
    if "<<" in text and not any(map(_is_training, commands)):
        with contextlib.suppress(UserError):  # a document that is no script may be anything
            commands = simple_commands(text, environment, documents=True)
    found = [i for i, command in enumerate(commands) if _is_training(command)]
    if not found:
        raise UserError(
            "the script holds no fairseq-train command; give one with `fairseq-train DATA --arch …`"
        )
    if len(found) > 1:
        raise UserError(
            f"the script holds {len(found)} fairseq-train commands; keep one, or give the "
            "command after --"
        )
    command = commands[found[0]]
    moves = [c for c in commands[: found[0]] if c.words[0] in ("cd", "pushd")]
    if moves:
        raise UserError(
            f"the script changes folder (`{shlex.join(moves[0].words)}`) before fairseq-train; "
            "take that line out and start from that folder"
        )
    if command.error is not None:
        raise command.error
    parsed = parse_command(command.words)
    own = {**command.assignments, **parsed.environment}
    return replace(
        parsed,
        environment={**command.exports, **own},
        left_out=command.left_out,
        exported=frozenset(command.exports.keys() - own.keys()),
    )


def value_of(command: FairseqCommand, flag: str) -> str | None:
    """Return the value of ``flag`` (``--max-update``), the last one given, or None."""
    value = None
    for position, length in _occurrences(command.arguments, flag, takes_value=True):
        argument = command.arguments[position]
        value = argument.split("=", 1)[1] if "=" in argument else None
        if value is None and length == 2:
            value = command.arguments[position + 1]
    return value


def has_flag(command: FairseqCommand, flag: str) -> bool:
    """Tell whether ``flag`` is given, with or without a value."""
    return bool(_occurrences(command.arguments, flag, takes_value=False))


def save_dir(command: FairseqCommand) -> Path:
    """Return where the command writes its checkpoints (fairseq's default: ``checkpoints``)."""
    return Path(value_of(command, "--save-dir") or "checkpoints")


def direction(command: FairseqCommand) -> tuple[str, str] | None:
    """Return source and target if the command names both; fairseq passes over one alone."""
    source, target = (value_of(command, flag) for flag in ("--source-lang", "--target-lang"))
    return (source, target) if source and target else None


def restored_from(command: FairseqCommand) -> str | None:
    """Return the checkpoint of ``--restore-file``, None for that of the save folder."""
    given = value_of(command, "--restore-file")
    return None if given == "checkpoint_last.pt" else given


def shell_text(command: FairseqCommand) -> str:
    """Return the command as one line that can be pasted into a shell."""
    prefix = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    return " ".join([*prefix, shlex.join([*command.program, *command.arguments])])


def without_exports(command: FairseqCommand) -> FairseqCommand:
    """Return ``command`` without what its script exports on other lines."""
    own = {k: v for k, v in command.environment.items() if k not in command.exported}
    return replace(command, environment=own)


def with_value(command: FairseqCommand, flag: str, value: str) -> FairseqCommand:
    """Return ``command`` with ``flag`` set to ``value``: where it stands, else at the end.

    ``--flag value`` and ``--flag=value`` keep their form; repeated flags are all set.
    """
    arguments = list(command.arguments)
    places = _occurrences(arguments, flag, takes_value=True)
    for position, length in places:
        if length == 2:
            arguments[position + 1] = value
        elif "=" in arguments[position]:
            arguments[position] = f"{arguments[position].split('=', 1)[0]}={value}"
    if not places:
        arguments += [flag, value]
    return replace(command, arguments=arguments)


def without(command: FairseqCommand, flag: str, takes_value: bool) -> FairseqCommand:
    """Return ``command`` without ``flag`` and, if it ``takes_value``, its value."""
    arguments = list(command.arguments)
    for position, length in reversed(_occurrences(arguments, flag, takes_value)):
        del arguments[position : position + length]
    return replace(command, arguments=arguments)


def total_steps(command: FairseqCommand) -> int:
    """Return T', the length of the student's training, from ``--max-update``.

    Raises:
        UserError: if it is missing or no positive whole number.
    """
    text = value_of(command, "--max-update")
    if text is None:
        raise UserError(
            "the command has no --max-update, and a teacher has to know how long the student "
            "trains; add --max-update N"
        )
    try:
        steps = int(text)
    except ValueError:
        steps = 0
    if steps <= 0:
        raise UserError(f"--max-update {text} is no positive whole number; write --max-update N")
    return steps


def _occurrences(arguments: Sequence[str], flag: str, takes_value: bool) -> list[tuple[int, int]]:
    """Return (position, number of arguments) of every occurrence of ``flag``."""
    names = (flag, *_ALIASES.get(flag, ()))
    found: list[tuple[int, int]] = []
    for position, argument in enumerate(arguments):
        if argument.split("=", 1)[0] not in names:
            continue
        separate = takes_value and "=" not in argument and position + 1 < len(arguments)
        found.append((position, 2 if separate else 1))
    return found


def _after_environment(tokens: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables in front of a command, after ``env`` or without it, and the rest."""
    environment: dict[str, str] = {}
    rest = list(tokens)
    while rest and (rest[0] == "env" or _environment_pair(rest[0])):
        if pair := _environment_pair(rest.pop(0)):
            environment[pair[0]] = pair[1]
    return environment, rest


def _environment_pair(token: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", token, re.DOTALL)
    return (match[1], match[2]) if match else None


def _program_length(tokens: Sequence[str]) -> int:
    """Return how many tokens stand before fairseq-train's own arguments, 0 if it is none."""
    for position, token in enumerate(tokens):
        name = PurePosixPath(token).name
        if name in _HYDRA:
            raise UserError(
                f"{name} is not supported yet; write the run as a fairseq-train command: "
                "flags instead of key=value"
            )
        if name in _TRAIN and (token != "fairseq_cli.train" or tokens[position - 1] == "-m"):
            return position + 1
        if name == "train.py" and _is_fairseq_script(tokens, position):
            return position + 1
    return 0


def _is_fairseq_script(tokens: Sequence[str], position: int) -> bool:
    """Tell whether ``tokens[position]``, a train.py, is fairseq's: many projects have one."""
    parts = PurePosixPath(tokens[position]).parts
    if "fairseq" in parts or "fairseq_cli" in parts:
        return True
    started = any(_PYTHON.match(PurePosixPath(token).name) for token in tokens[:position])
    arguments = [token.split("=", 1)[0] for token in tokens[position + 1 :]]
    return (started or position == 0) and bool({"--arch", "-a"} & set(arguments))


def _is_training(command: SimpleCommand) -> bool:
    """Tell a command that runs fairseq-train, itself or by another (srun), from a mention of it."""
    if command.words[0] in _NO_LAUNCHERS:
        return False
    length = _program_length(command.words)
    # `somewhere runs/fairseq-train`: what is run has at least its data behind it.
    return length == 1 or 1 < length < len(command.words)
