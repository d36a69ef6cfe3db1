"""Reading the simple commands of a shell script without running it.

Understands what training scripts are written in: comments, line continuations, quoting, variables
set in the script or the environment, ``~``, environment prefixes, several commands, redirections,
here-documents. What only a shell can know (command substitution, arguments of the script, arrays,
loops) is an error, but only where the command that is looked for depends on it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

from l2t_core.errors import UserError
from l2t_fairseq.commands.shell_words import ARRAY, Quote, Statement, Word, bare, statements


@dataclass
class SimpleCommand:
    """One command of a script: leading assignments, expanded words, left-out redirections."""

    assignments: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    error: UserError | None = None


_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_VARIABLE = re.compile(r"\$(?:(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\}|(?P<other>\S))")
_WHICH = re.compile(r"\$\(\s*which\s+([\w./-]+)\s*\)|`\s*which\s+([\w./-]+)\s*`")
_DEFAULT = re.compile(r"([A-Za-z_]\w*)(?::?-(.*))?")
# Words that may stand before a command and are no part of it.
_RESERVED = {"do", "then", "else", "elif", "if", "while", "until", "{", "}", "!", "time", "exec"}
_LOOPS = {"for", "while", "until", "select"}
# A line with these sets variables and runs nothing.
_DECLARATIONS = {"export", "declare", "readonly", "local", "typeset"}


class _Variables:
    """Values of shell variables, or the reason why a value cannot be known."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.known: dict[str, str | UserError] = {}

    def value(self, name: str, default: str | None = None) -> str:
        found: str | UserError | None = self.known.get(name, self.environment.get(name))
        if isinstance(found, UserError):
            raise found
        if found is None or (default is not None and not found):
            if default is None:
                raise UserError(
                    f"the script uses ${name}, which it does not set; set it in the script or "
                    "the environment, or write the value"
                )
            return default
        return found

    def _substitute(self, match: re.Match[str]) -> str:
        if match["other"]:
            raise UserError(
                f"the script uses {match.group()!r}, which only a running shell knows; "
                "write the value"
            )
        if match["plain"]:
            return self.value(match["plain"])
        braced = _DEFAULT.fullmatch(match["braced"])
        if not braced:
            raise UserError(
                f"the script uses {match.group()!r}, which l2t does not understand; write the value"
            )
        return self.value(braced[1], braced[2])

    def _from_home(self, word: Word) -> Word:
        """Return ``word`` with the ``~`` that it may begin with written out, as a shell does."""
        first, quote = word[0] if word else ("", Quote.NONE)
        if quote is not Quote.NONE or (first != "~" and not first.startswith("~/")):
            return word
        if first == "~" and len(word) > 1:  # ~"/x" and ~'' are not the home folder
            return word
        return [(self.value("HOME"), Quote.SINGLE), (first[1:], Quote.NONE), *word[1:]]

    def expand(self, word: Word) -> list[str]:
        """Return the arguments that ``word`` stands for: one, or several from a bare variable."""
        parts, quoted = [""], False
        for piece, quote in self._from_home(word):
            if quote is Quote.SINGLE:
                parts[-1] += piece
                quoted = True
                continue
            named = _WHICH.sub(lambda m: shutil.which(m[1] or m[2]) or m[1] or m[2], piece)
            if "$(" in named or "`" in named:
                raise UserError(
                    f"the script uses the output of a command ({piece.strip()}); write the value"
                )
            if quote is Quote.NONE and piece.endswith("$"):
                raise UserError("the script uses $ before a quote; write the value in plain quotes")
            value = _VARIABLE.sub(self._substitute, named).replace("\0", "$")
            if quote is Quote.DOUBLE or "$" not in piece:
                parts[-1] += value
                quoted = quoted or quote is Quote.DOUBLE
                continue
            pieces = value.split()
            if pieces:
                parts[-1] += pieces[0]
                parts += pieces[1:]
        return parts if quoted else [part for part in parts if part]

    def assigned(self, assignment: _Assignment) -> str:
        """Return what an assignment gives its variable: never split, as if it were quoted."""
        name, whole = assignment.name, self._from_home(assignment.value)
        if whole[:1] == [ARRAY]:
            raise UserError(
                f"the script makes {name} an array, which l2t does not understand; write its words "
                "into the command"
            )
        before = self.value(name, "") if assignment.appends else ""
        quoted = [(piece, Quote.DOUBLE if q is Quote.NONE else q) for piece, q in whole]
        return before + "".join(self.expand(quoted))


@dataclass
class _Assignment:
    """``NAME=value``; ``NAME+=value`` where it ``appends``."""

    name: str
    appends: bool
    value: Word


def _assignment(word: Word) -> _Assignment | None:
    """Return what ``word`` assigns, None where it is no assignment."""
    if not word or word[0][1] is not Quote.NONE:
        return None
    match = _ASSIGNMENT.match(word[0][0])
    if not match:
        return None
    rest = word[0][0][match.end() :]
    value = [(rest, Quote.NONE), *word[1:]] if rest else word[1:]
    return _Assignment(match[1], bool(match[2]), value)


def _read(statement: Statement, variables: _Variables) -> SimpleCommand:
    command = SimpleCommand(left_out=statement.left_out)
    words = list(statement.words)
    while words and bare(words[0]) in _RESERVED:
        words.pop(0)
    declaration = bool(words) and bare(words[0]) in _DECLARATIONS
    if declaration:
        words.pop(0)
    assigned: list[_Assignment] = []
    while words and (pair := _assignment(words[0])):
        assigned.append(pair)
        words.pop(0)
    try:
        for word in words:
            command.words += variables.expand(word)
    except UserError as error:
        command.error = error
        # What is recognisable without a value still tells which command this is.
        command.words += ["".join(piece for piece, _ in word) for word in words]
    for assignment in assigned:
        name = assignment.name
        try:
            text = variables.assigned(assignment)
        except UserError as error:
            if words and not declaration:
                command.error = error
            else:
                variables.known[name] = error
            continue
        if words and not declaration:
            command.assignments[name] = text
        else:
            variables.known[name] = text
    return command


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
    variables = _Variables(os.environ if environment is None else environment)
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
