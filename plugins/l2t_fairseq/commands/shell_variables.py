"""Variables of a shell script as far as their values are known without running it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

from l2t_core.errors import UserError
from l2t_fairseq.commands.shell_words import ARRAY, Quote, Word

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_VARIABLE = re.compile(r"\$(?:(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\}|(?P<other>\S))")
_WHICH = re.compile(r"\$\(\s*which\s+([\w./-]+)\s*\)|`\s*which\s+([\w./-]+)\s*`")
_DEFAULT = re.compile(r"([A-Za-z_]\w*)(?::?-(.*))?")


@dataclass
class Assignment:
    """``NAME=value``; ``NAME+=value`` where it ``appends``."""

    name: str
    appends: bool
    value: Word


def assignment_of(word: Word, declared: bool = False) -> Assignment | None:
    """Return what ``word`` assigns, None where it is no assignment; quoted it is one to export."""
    if not word or not (word[0][1] is Quote.NONE or declared):
        return None
    match = _ASSIGNMENT.match(word[0][0])
    if not match:
        return None
    rest = word[0][0][match.end() :]
    value = [(rest, word[0][1]), *word[1:]] if rest else word[1:]
    return Assignment(match[1], bool(match[2]), value)


SUBSHELL = "("


def follows_a_shell(name: str) -> UserError:
    """Return why nobody knows what a block, which may run or not, has made of a variable."""
    return UserError(
        f"the script sets ${name} in a loop, a condition or a function, which only a running shell "
        "follows; write the value"
    )


@dataclass
class Block:
    """A part of a script that may run or not, or a subshell, and what was known before it."""

    kind: str
    known: dict[str, str | UserError]
    exports: dict[str, None]
    changed: set[str] = field(default_factory=set)


class Variables:
    """Values of shell variables, or the reason why a value cannot be known.

    What a block sets is known within it. Behind it nobody knows whether it was run; behind a
    subshell all is as before.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.known: dict[str, str | UserError] = {}
        self.exports: dict[str, None] = {}  # in order
        self.blocks: list[Block] = []  # those that are open

    def enter(self, kind: str) -> None:
        """Begin a block."""
        self.blocks.append(Block(kind, dict(self.known), dict(self.exports)))

    def branch(self) -> None:
        """Begin another branch of the innermost block."""
        self.known = dict(self.blocks[-1].known)

    def leave(self) -> None:
        """End the innermost block."""
        block = self.blocks.pop()
        self.known = block.known
        if block.kind == SUBSHELL:
            self.exports = block.exports
            return
        for name in block.changed:
            self.set(name, follows_a_shell(name))

    def result(self, assignment: Assignment) -> str | UserError:
        """Return what an assignment gives its variable, or why nobody knows it."""
        try:
            return self.assigned(assignment)
        except UserError as error:
            return error

    def set(self, name: str, value: str | UserError) -> None:
        """Give a variable a value, or the reason why nobody knows it."""
        self.known[name] = value
        self._changed(name)
        if name in self.environment:  # what came with the environment stays in it
            self.export(name)

    def export(self, name: str) -> None:
        """Hand a variable to the commands that follow."""
        self.exports.setdefault(name)
        self._changed(name)

    def _changed(self, name: str) -> None:
        if self.blocks:
            self.blocks[-1].changed.add(name)

    def exported(self) -> dict[str, str | UserError]:
        """Return what commands get from the script beside the environment that it was given."""
        return {name: self.known[name] for name in self.exports if name in self.known}

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

    def assigned(self, assignment: Assignment) -> str:
        """Return what an assignment gives its variable: never split, as if it were quoted."""
        name, whole = assignment.name, self._from_home(assignment.value)
        if whole[:1] == [ARRAY]:
            raise UserError(
                f"the script makes {name} an array, which l2t does not understand; write its words "
                "into the command"
            )
        before = self.value(name, "") if assignment.appends else ""
        quoted: Word = [(piece, Quote.DOUBLE if q is Quote.NONE else q) for piece, q in whole]
        return before + "".join(self.expand(quoted))
