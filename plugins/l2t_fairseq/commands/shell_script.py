"""Reading the simple commands of a shell script without running it.

Understands what training scripts are written in: comments, line continuations, quoting, variables
set in the script or the environment, ``~``, environment prefixes, several commands, redirections,
here-documents. What only a shell can know (command substitution, arguments of the script, arrays,
loops) is an error, but only where the command that is looked for depends on it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from l2t_core.errors import UserError
from l2t_fairseq.commands.shell_variables import Assignment, Variables, assignment_of
from l2t_fairseq.commands.shell_words import Statement, Word, bare, statements


@dataclass
class SimpleCommand:
    """One command of a script: what it adds to the environment, expanded words, what is left out.

    ``assignments`` are the variables that the script has exported, and those before the command.
    ``left_out`` are redirections, pipes, and exported variables whose value nobody knows.
    """

    assignments: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    error: UserError | None = None


# Words that may stand before a command and are no part of it.
_RESERVED = {"do", "then", "else", "elif", "if", "while", "until", "{", "}", "!", "time", "exec"}
_LOOPS = {"for", "while", "until", "select"}
# A line with these sets variables and runs nothing.
_DECLARATIONS = {"export", "declare", "readonly", "local", "typeset"}
_OTHER_KINDS = {*"aAilnu"}  # options of declare: arrays, numbers, other names, letters' case


def _read(statement: Statement, variables: Variables) -> SimpleCommand:
    """Return the command that ``statement`` is, without words where it only sets variables."""
    command = SimpleCommand(left_out=list(statement.left_out))
    words = list(statement.words)
    while words and bare(words[0]) in _RESERVED:
        words.pop(0)
    if words and bare(words[0]) in _DECLARATIONS:
        _declare(words, variables)
        return command
    assigned: list[Assignment] = []
    while words and (pair := assignment_of(words[0])):
        assigned.append(pair)
        words.pop(0)
    if not words:
        for assignment in assigned:
            variables.set(assignment.name, variables.result(assignment))
        return command
    for name, value in variables.exported().items():
        if isinstance(value, UserError):
            command.left_out.append(f"export {name}")
        else:
            command.assignments[name] = value
    try:
        for word in words:
            command.words += variables.expand(word)
    except UserError as error:
        command.error = error
        # What is recognisable without a value still tells which command this is.
        command.words += ["".join(piece for piece, _ in word) for word in words]
    for assignment in assigned:
        try:
            command.assignments[assignment.name] = variables.assigned(assignment)
        except UserError as error:
            command.error = error
    return command


def _declare(words: list[Word], variables: Variables) -> None:
    """Do what ``export``, ``declare`` and their like do with the variables that they name."""
    kind, options = bare(words[0]), ""
    values: dict[str, str | UserError | None] = {}
    for word in words[1:]:
        assignment = assignment_of(word)
        if bare(word).startswith(("-", "+")):
            options += bare(word) if bare(word)[0] == "-" else ""
        elif assignment is None:
            values[bare(word)] = None
        elif kind != "export" and set(options) & _OTHER_KINDS:
            values[assignment.name] = UserError(
                f"the script sets {assignment.name} by `{kind} {options}`, which l2t does not "
                "understand; write the value into the command"
            )
        else:
            values[assignment.name] = variables.result(assignment)
    for name, value in values.items():  # a shell, too, expands all of them first
        if value is not None:
            variables.set(name, value)
        if "x" in options or (kind == "export" and "n" not in options):
            variables.export(name)


def _loop_step(statement: Statement) -> int:
    """Return 1 where ``statement`` begins a loop, -1 where it ends one, 0 elsewhere."""
    for name in map(bare, statement.words):
        if name in _LOOPS or name == "done":
            return -1 if name == "done" else 1
        if name not in _RESERVED:
            return 0
    return 0


def simple_commands(
    text: str, environment: Mapping[str, str] | None = None, documents: bool = False
) -> list[SimpleCommand]:
    """Return the commands of the shell script ``text`` in order, variables expanded.

    ``environment`` supplies variables that the script does not set (default: the process's).
    A command that cannot be expanded carries the :class:`UserError` that says why. With
    ``documents`` here-documents are read as commands, too: some are given to a shell.

    Raises:
        UserError: if a quotation is never closed.
    """
    variables = Variables(os.environ if environment is None else environment)
    commands, loops = [], 0
    for statement in statements(text, documents):
        loops = max(0, loops + _loop_step(statement))
        command = _read(statement, variables)
        if loops and command.error is None:
            command.error = UserError("the script runs it in a loop; give one command after --")
        commands.append(command)
    return [command for command in commands if command.words]


def split_flags(text: str, origin: str) -> list[str]:
    """Return the words of a line of flags; ``origin`` is where the user wrote it.

    Raises:
        UserError: if a quote is left open.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{origin}: {error} in the flags; close the quotes") from None
