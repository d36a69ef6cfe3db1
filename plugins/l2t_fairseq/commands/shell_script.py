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
from enum import Enum

from l2t_core.errors import UserError


class Quote(Enum):
    """How a piece of a word was written, which decides what happens to ``$`` in it."""

    SINGLE = "'"
    DOUBLE = '"'
    NONE = ""


Word = list[tuple[str, Quote]]


@dataclass
class SimpleCommand:
    """One command of a script: leading assignments, expanded words, left-out redirections."""

    assignments: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    error: UserError | None = None


_OPERATORS = re.compile(r"&&|\|\||;;|\||;|&(?!>)|\n|\(|\)")
_PIPE_END = re.compile(r"(?<!\\)\n|;|&&|\|\|")
_REDIRECTION = re.compile(r"(?:\d|&)?(?:>>|>&|<<<|>\||>|<)")
_HERE_DOCUMENT = re.compile(r"(?<!<)<<(?!<)-?[ \t]*\\?(['\"]?)([\w.!-]+)\1")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=")
_VARIABLE = re.compile(r"\$(?:(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\}|(?P<other>\S))")
_WHICH = re.compile(r"\$\(\s*which\s+([\w./-]+)\s*\)|`\s*which\s+([\w./-]+)\s*`")
_DEFAULT = re.compile(r"([A-Za-z_]\w*)(?::?-(.*))?")
# Words that may stand before a command and are no part of it.
_RESERVED = {"do", "then", "else", "elif", "if", "while", "until", "{", "}", "!", "time", "exec"}
_LOOPS = {"for", "while", "until", "select"}
# A line with these sets variables and runs nothing.
_DECLARATIONS = {"export", "declare", "readonly", "local", "typeset"}


def _word_end(text: str, start: int) -> tuple[Word, int]:
    """Return the word of ``text`` that begins at ``start``, and where it ends."""
    word: Word = []
    bare, at = "", start
    while at < len(text):
        char = text[at]
        if char in " \t\r" or _OPERATORS.match(text, at) or char in "<>":
            break
        if text.startswith(("$(", "`"), at):
            closing = text.find(")" if char == "$" else "`", at + 2)
            end = len(text) if closing < 0 else closing + 1
            bare, at = bare + text[at:end], end
        elif text.startswith("\\\n", at):
            at += 2
        elif char == "\\":
            word.append((bare, Quote.NONE))
            word.append((text[at + 1 : at + 2], Quote.SINGLE))
            bare, at = "", at + 2
        elif char in "'\"":
            piece, at = _quoted(text, at)
            word += [(bare, Quote.NONE), (piece, Quote(char))]
            bare = ""
        else:
            bare, at = bare + char, at + 1
    word.append((bare, Quote.NONE))
    return [piece for piece in word if piece[0] or piece[1] is not Quote.NONE], at


def _quoted(text: str, start: int) -> tuple[str, int]:
    """Return what is inside the quotes that open at ``start``, and where they end."""
    quote, at, piece = text[start], start + 1, ""
    while at < len(text) and text[at] != quote:
        if quote == '"' and text.startswith("\\\n", at):
            at += 2
        elif quote == '"' and text[at] == "\\" and text[at + 1 : at + 2] in tuple('"\\`$'):
            # An escaped dollar must survive expansion as a dollar.
            piece += "\0" if text[at + 1] == "$" else text[at + 1]
            at += 2
        else:
            piece += text[at]
            at += 1
    if at >= len(text):
        line = text.count("\n", 0, start) + 1
        raise UserError(f"script line {line}: a {quote} is opened and never closed; close it")
    return piece, at + 1


def _statements(text: str, documents: bool) -> list[list[Word | str]]:
    """Split a script into statements of words and redirections (plain strings)."""
    text = text.replace("\r\n", "\n")
    statements: list[list[Word | str]] = [[]]
    awaited: list[str] = []  # the ends of the here-documents that begin with the next line
    at = 0
    while at < len(text):
        if text.startswith("\\\n", at):
            at += 2
        elif text[at] in " \t\r":
            at += 1
        elif text[at] == "#":
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
        elif match := _HERE_DOCUMENT.match(text, at):
            awaited.append(match[2])
            statements[-1].append(match.group())
            at = match.end()
        elif match := _REDIRECTION.match(text, at):
            at = match.end()
            while at < len(text) and text[at] in " \t":
                at += 1
            _, at = _word_end(text, at)
            statements[-1].append(text[match.start() : at])
        elif match := _OPERATORS.match(text, at):
            if match.group() == "|" and statements[-1]:
                ending = _PIPE_END.search(text, match.end())
                end = ending.start() if ending else len(text)
                piped = text[match.end() : end]
                statements[-1].append(f"| {piped.strip()}")
                awaited += [found[2] for found in _HERE_DOCUMENT.finditer(piped)]
                at = end
                continue
            statements.append([])
            at = match.end()
            if match.group() == "\n":
                at = at if documents else _after_documents(text, at, awaited)
                awaited = []
        else:
            word, end = _word_end(text, at)
            statements[-1].append(word)
            # A character that begins nothing known must not stop the reading.
            at = max(end, at + 1)
    return [statement for statement in statements if statement]


def _after_documents(text: str, start: int, ends: list[str]) -> int:
    """Return where the here-documents that begin at ``start`` are over; each has its end's line."""
    for name in ends:
        # With <<- the end may be indented by tabs.
        found = re.compile(rf"^\t*{re.escape(name)}(?:\n|\Z)", re.MULTILINE).search(text, start)
        start = found.end() if found else start  # without an end it is none: 1 << 3
    return start


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

    def assigned(self, value: Word) -> str:
        """Return what an assignment gives its variable: never split, as if it were quoted."""
        whole = self._from_home(value)
        return "".join(self.expand([(p, Quote.DOUBLE if q is Quote.NONE else q) for p, q in whole]))


def _assignment(word: Word) -> tuple[str, Word] | None:
    """Return name and value where ``word`` reads ``NAME=value``."""
    if not word or word[0][1] is not Quote.NONE:
        return None
    match = _ASSIGNMENT.match(word[0][0])
    if not match:
        return None
    rest = word[0][0][match.end() :]
    return match[1], [(rest, Quote.NONE), *word[1:]] if rest else word[1:]


def _read(statement: list[Word | str], variables: _Variables) -> SimpleCommand:
    command = SimpleCommand()
    words: list[Word] = []
    for part in statement:
        if isinstance(part, str):
            command.left_out.append(part)
        else:
            words.append(part)
    while words and words[0] in [[(name, Quote.NONE)] for name in _RESERVED]:
        words.pop(0)
    declaration = bool(words) and words[0] in [[(name, Quote.NONE)] for name in _DECLARATIONS]
    if declaration:
        words.pop(0)
    assigned: list[tuple[str, Word]] = []
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
    for name, value in assigned:
        try:
            text = variables.assigned(value)
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


def _loop_step(statement: list[Word | str]) -> int:
    """Return 1 where ``statement`` begins a loop, -1 where it ends one, 0 elsewhere."""
    for word in statement:
        name = word[0][0] if len(word) == 1 and not isinstance(word, str) else ""
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
    for statement in _statements(text, documents):
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
