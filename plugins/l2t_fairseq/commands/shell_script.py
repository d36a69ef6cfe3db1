"""Reading the simple commands of a shell script without running it.

Understands what training scripts are written in: comments, line continuations, quoting, variables
set in the script or the environment, ``~``, environment prefixes, several commands, redirections,
here-documents, blocks. What only a shell can know (command substitution, arguments of the script,
what a branch has set behind it, loops) is an error, and so are arrays, but only where the command
that is looked for depends on it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from l2t_core.errors import UserError
from l2t_fairseq.commands.shell_variables import (
    SUBSHELL,
    Assignment,
    Variables,
    assignment_of,
    follows_a_shell,
)
from l2t_fairseq.commands.shell_words import Statement, Word, bare, statements


@dataclass
class SimpleCommand:
    """One command of a script: what it adds to the environment, expanded words, what is left out.

    ``exports`` are the variables that the script has exported, ``assignments`` those in front of
    the command. ``left_out`` are redirections, pipes, and exported variables whose value nobody
    knows.
    """

    exports: dict[str, str] = field(default_factory=dict)
    assignments: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    error: UserError | None = None


# Words that may stand before a command and are no part of it.
_RESERVED = {"do", "then", "else", "elif", "if", "while", "until", "{", "}", "!", "time", "exec"}
_CHAINS = ("&&", "||")
_HEAD, _LOOP = "while", "do"  # a loop before and behind its `do`
_BEGINNINGS = {
    **dict.fromkeys(("for", "while", "until", "select"), _HEAD),
    **{word: word for word in ("if", "case", "{")},
}
_ENDS = {"done": _LOOP, "fi": "if", "esac": "case", "}": "{"}
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
            command.exports[name] = value
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
        assignment = assignment_of(word, declared=True)
        if bare(word).startswith(("-", "+")):
            options += bare(word) if bare(word)[0] == "-" else ""
        elif assignment is None:
            values.update({bare(word): None} if bare(word) else {})
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


class _Blocks:
    """Follows a script into its blocks and out of them, for what is known of its variables."""

    def __init__(self, variables: Variables) -> None:
        self.variables = variables
        self.awaits = False  # && or || stands before what comes next, perhaps on another line

    @property
    def _kinds(self) -> list[str]:
        return [block.kind for block in self.variables.blocks]

    def in_loop(self) -> bool:
        """Tell whether a loop is open."""
        return bool({_HEAD, _LOOP} & {*self._kinds})

    def is_pattern(self, statement: Statement) -> bool:
        """Tell a pattern of ``case`` from a command."""
        return statement.end == ")" and self._kinds[-1:] == ["case"]

    def begin(self, statement: Statement) -> None:
        """Enter and leave what the words that ``statement`` begins with begin and end."""
        words = [bare(word) for word in statement.words]
        for at, word in enumerate(words):
            if word in _ENDS and self._back_to(_ENDS[word]):
                self.variables.leave()
            elif word in ("elif", "else") and self._back_to("if"):
                self.variables.branch()
            elif word in _BEGINNINGS:
                self.variables.enter(_BEGINNINGS[word])
            elif word == "function" and words[-1] == "{":
                self.variables.enter("{")
            elif word == "do" and self._kinds[-1:] == [_HEAD]:
                self.variables.blocks[-1].kind = _LOOP
            elif word == "do":  # of a loop behind a |
                self.variables.enter(_LOOP)
            if word in ("for", "select") and words[at + 1 :]:
                self.variables.set(words[at + 1], follows_a_shell(words[at + 1]))
            if word not in _RESERVED:
                return

    def end(self, statement: Statement, only_sets: bool) -> None:
        """Enter and leave what the operator behind ``statement`` begins and ends."""
        if statement.words or statement.left_out:
            self.awaits = False
        if statement.end in _CHAINS:
            self._chain(statement.end, only_sets)
        elif statement.end == SUBSHELL:
            self.variables.enter(SUBSHELL)
            self.awaits = False
        elif statement.end != "|" and not (statement.end == "\n" and self.awaits):
            if self._kinds[-1:] and self._kinds[-1] in _CHAINS:
                self.variables.leave()
            if statement.end == ")" and self._kinds[-1:] == [SUBSHELL]:
                self.variables.leave()
            if statement.end == ";;" and self._back_to("case"):
                self.variables.branch()

    def _chain(self, operator: str, only_sets: bool) -> None:
        """Take what stands behind ``operator`` for a block, which may not run."""
        before = self._kinds[-1:]
        if before and before[0] in _CHAINS:
            if operator == "||":
                self.variables.branch()
                self.variables.blocks[-1].kind = operator
            elif before == ["||"]:  # a || b && c: which of the two it was is not known in c
                self.variables.leave()
                self.variables.enter(operator)
        elif operator == "||" or not only_sets:  # setting a variable does not fail
            self.variables.enter(operator)
        self.awaits = True

    def _back_to(self, kind: str) -> bool:
        """Leave what is open within the innermost block of a kind, if there is one."""
        if kind not in self._kinds:
            return False
        while self._kinds[-1] != kind:
            self.variables.leave()
        return True


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
    blocks, commands = _Blocks(variables), []
    for statement in statements(text, documents):
        if blocks.is_pattern(statement):
            continue
        blocks.begin(statement)
        command = _read(statement, variables)
        if blocks.in_loop() and command.error is None:
            command.error = UserError("the script runs it in a loop; give one command after --")
        commands.append(command)
        only_sets = bool(statement.words) and not command.words and statement.first() != "}"
        blocks.end(statement, only_sets)
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
