"""Why a fairseq command that ran in a process of its own failed, in a few words."""

from __future__ import annotations

import re
import signal
from pathlib import Path

_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt))\b:?\s*(.*)")
_USAGE = re.compile(r"^\S+: error: (.*)")
# Notes and progress that may follow the line that says what went wrong.
_NOISE = re.compile(r"\s|.*(Warning:|warnings\.warn)|.*\| (INFO|WARNING) \|")
# What fairseq itself writes holds an argparse.Namespace.
UNREADABLE = (
    "it names a checkpoint that torch from 2.6 on reads with the plugin alone; make a clean copy, "
    "`l2t export CHECKPOINT --to FILE`, and name that"
)
# What torch says of a checkpoint that the disk had no room for: where in its own code it noticed.
_UNWRITTEN = re.compile(r"inline_container\.cc.*unexpected pos|PytorchStreamWriter failed writing")
NO_ROOM = "a checkpoint could not be written; is there space left on its disk?"


def reason(output: str, code: int) -> str:
    """Return the most telling line of a failed command's ``output``, or the signal that ended it.

    ``code`` is its exit status as subprocess gives it: a signal's number is negative.
    """
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", perhaps out of memory" if name == "SIGKILL" else "")
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    for line in reversed(lines):
        if found := _USAGE.match(line.strip()):
            return found.group(1)
        if found := _EXCEPTION.match(line.strip()):
            name, text = found.groups()
            if name == "UnpicklingError" and "eights only" in text:
                return UNREADABLE
            if _UNWRITTEN.search(text):
                return NO_ROOM
            return text if name == "UserError" and text else f"{name}: {text}".rstrip(": ")
    telling = [line for line in lines if not _NOISE.match(line)] or [f"exit code {code}"]
    return telling[-1]


def reason_in(log: Path, code: int, start: int = 0) -> str:
    """Return :func:`reason` of what ``log`` holds from the byte ``start`` on."""
    return reason(log.read_bytes()[start:].decode("utf-8", errors="replace"), code)
