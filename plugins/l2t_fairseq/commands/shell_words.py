"""Splitting a shell script into statements of words, as a shell does before it runs anything."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from l2t_core.errors import UserError


class Quote(Enum):
    """How a piece of a word was written, which decides what happens to ``$`` in it."""

    SINGLE = "'"
    DOUBLE = '"'
    NONE = ""


Word = list[tuple[str, Quote]]
ARRAY = ("(", Quote.NONE)  # the value of NAME=(…)


_OPERATORS = re.compile(r"&&|\|\||;;|\||;|&(?!>)|\n|\(|\)")
_REDIRECTION = re.compile(r"(?:\d|&)?(?:>>|>&|<<<|>\||>|<)")
_HERE_DOCUMENT = re.compile(r"(?<!<)<<(?!<)-?[ \t]*\\?(['\"]?)([\w.!-]+)\1")
_ARRAY_NAME = re.compile(r"[A-Za-z_]\w*\+?=")


@dataclass
class Statement:
    """Words up to an operator, redirections and pipes that go with them, and the operator.

    ``end`` is ``""`` at the end of the script. Of an array, ``NAME=(…)``, the word is ``NAME=(``.
    """

    words: list[Word] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    end: str = ""

    def first(self) -> str:
        """Return the first word as it is written where it has no quotes, else nothing."""
        return bare(self.words[0]) if self.words else ""


def bare(word: Word) -> str:
    """Return ``word`` where it has no quotes and is not empty, else nothing."""
    return word[0][0] if len(word) == 1 and word[0][1] is Quote.NONE else ""


def _word_end(text: str, start: int) -> tuple[Word, int]:
    """Return the word of ``text`` that begins at ``start``, and where it ends."""
    word: Word = []
    bare, at = "", start
    while at < len(text):
        char = text[at]
        if char in " \t\r" or _OPERATORS.match(text, at) or char in "<>":
            break
        if text.startswith(("$(", "`"), at):
            end = _output_end(text, at)
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


def _output_end(text: str, start: int) -> int:
    """Return where the ``$(…)`` or `` `…` `` that begins at ``start`` ends."""
    if text[start] == "`":
        closing = text.find("`", start + 1)
        return len(text) if closing < 0 else closing + 1
    depth = 0
    for at in range(start + 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return len(text)


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


def _after_documents(text: str, start: int, ends: list[str]) -> int:
    """Return where the here-documents that begin at ``start`` are over; each has its end's line."""
    for name in ends:
        # With <<- the end may be indented by tabs.
        found = re.compile(rf"^\t*{re.escape(name)}(?:\n|\Z)", re.MULTILINE).search(text, start)
        start = found.end() if found else start  # without an end it is none: 1 << 3
    return start


def _pipe_end(text: str, start: int, in_subshell: bool) -> int:
    """Return where the rest of a pipe that goes on at ``start`` ends."""
    at, depth = start, 0
    while at < len(text):
        if text[at] in "'\"":
            at = _quoted(text, at)[1]
            continue
        if text.startswith(("\n", ";", "&&", "||"), at):
            return at
        if text[at] == "#" and text[at - 1] in " \t":
            ending = text.find("\n", at)
            return len(text) if ending < 0 else ending
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth < 0 and in_subshell:
            return at
        at += 2 if text[at] == "\\" else 1
    return len(text)


class _Splitter:
    """Where a script is read, and what of it has been."""

    def __init__(self, text: str, documents: bool) -> None:
        self.text, self.documents, self.at = text.replace("\r\n", "\n"), documents, 0
        self.statements = [Statement()]
        self.awaited: list[str] = []  # ends of the here-documents that begin with the next line
        self.open = 0  # subshells
        self.array = 0  # how many statements there were where an array began

    def step(self) -> None:
        """Read what comes next."""
        text, at = self.text, self.at
        if text.startswith("\\\n", at):
            self.at += 2
        elif text[at] in " \t\r":
            self.at += 1
        elif text[at] == "#":
            end = text.find("\n", at)
            self.at = len(text) if end < 0 else end
        elif match := _HERE_DOCUMENT.match(text, at):
            self.awaited.append(match[2])
            self.statements[-1].left_out.append(match.group())
            self.at = match.end()
        elif match := _REDIRECTION.match(text, at):
            self._redirection(match.end())
        elif match := _OPERATORS.match(text, at):
            self._operator(match.group())
        else:
            word, end = _word_end(text, at)
            self.statements[-1].words.append(word)
            # A character that begins nothing known must not stop the reading.
            self.at = max(end, at + 1)

    def _redirection(self, end: int) -> None:
        while end < len(self.text) and self.text[end] in " \t":
            end += 1
        _, end = _word_end(self.text, end)
        self.statements[-1].left_out.append(self.text[self.at : end])
        self.at = end

    def _operator(self, found: str) -> None:
        last = self.statements[-1]
        self.at += len(found)
        if found == "|" and (last.words or last.left_out) and not self._in_pattern():
            self._pipe(last)
            return
        if found == "(" and last.words and self._opens_array(bare(last.words[-1])):
            last.words[-1] = [(bare(last.words[-1]) + ARRAY[0], Quote.NONE)]
            self.array = len(self.statements)
        elif found == ")" and self.array:
            del self.statements[self.array :]
            self.array = 0
            return
        elif not self.array:
            self.open = max(0, self.open + {"(": 1, ")": -1}.get(found, 0))
        last.end = found
        self.statements.append(Statement())
        if found == "\n":
            self.at = self.at if self.documents else _after_documents(
                self.text, self.at, self.awaited
            )
            self.awaited = []

    def _opens_array(self, before: str) -> bool:
        touches = self.text[self.at - 2] == "="
        return touches and bool(_ARRAY_NAME.fullmatch(before)) and not self.array

    def _in_pattern(self) -> bool:
        """Tell whether the statement is a pattern of ``case``, where | parts alternatives."""
        last = self.statements[-1].first()
        before = [s for s in self.statements[:-1] if s.words or s.end != "\n"]
        return last == "case" or (last != "esac" and bool(before) and before[-1].end == ";;")

    def _pipe(self, last: Statement) -> None:
        end = _pipe_end(self.text, self.at, self.open > 0)
        piped = self.text[self.at : end]
        last.left_out.append(f"| {piped.strip()}")
        self.awaited += [found[2] for found in _HERE_DOCUMENT.finditer(piped)]
        self.at = end


def statements(text: str, documents: bool) -> list[Statement]:
    """Split a script; with ``documents`` here-documents are read as parts of it.

    Raises:
        UserError: if a quotation is never closed.
    """
    splitter = _Splitter(text, documents)
    while splitter.at < len(splitter.text):
        splitter.step()
    return splitter.statements
