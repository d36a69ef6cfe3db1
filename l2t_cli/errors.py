"""What a failed command says: one line on stderr, never a stack trace for a user's mistake."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import typer

from l2t_core.errors import (
    PeerLost,
    ToldByTheFirst,
    UserError,
    is_for_want_of_memory,
    suggestion,
)

# Recent Typer carries its own Click, older Typer imports it: this finds the classes in both.
UsageError: Any = typer.BadParameter.__base__
ClickError: Any = UsageError.__base__

USER_MISTAKE = 2
PEER_LOST = 3
INTERRUPTED = 130
# What the system may refuse wherever a file or a program is opened or written, output included.
_FULL = "free some space where the output goes"
_SYSTEM_MENDS = {
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
    errno.EIO: "look after the disk or the terminal that the output goes to",
    errno.EMFILE: "allow more with `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.EAGAIN: "close other programs, or allow more processes with `ulimit -u`",
    errno.ENOMEM: "take a smaller batch or model, or close other programs",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it, and torchrun to the others when a process has died."""


class Interrupted(Exception):
    """Ctrl-C during a long run; the message says how to go on."""


def say(message: str) -> None:
    """Print one line on stderr, if anybody can read it."""
    with suppress(OSError):
        print(" ".join(message.split()), file=sys.stderr, flush=True)


def tell_before_sigterm() -> None:
    """Pass over SIGTERM from now on: torchrun sends it as soon as a process has died.

    One of the survivors is to tell of that before they end. (A mask would not do: any other thread
    would take the signal for this one.)
    """
    # Not SIG_IGN: of one that has come already Python would complain.
    signal.signal(signal.SIGTERM, lambda number, frame: None)


def _have_met() -> bool:
    """Tell whether this is one of several processes that have joined."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _is_left_to_the_first(error: BaseException) -> bool:
    """Tell whether this is one of several processes that have all made the same mistake.

    Until they have joined they all read the same command line and recipe.
    """
    # The first of each machine: the recipe may be missing on one of them only.
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    return isinstance(error, ToldByTheFirst) or not (first or _have_met())


def _tell_mistake(error: BaseException, message: str) -> None:
    """Say what the user can mend, once for all processes that meet it."""
    if _is_left_to_the_first(error):
        from l2t_core.runs.processes import wait_until_told

        try:
            if wait_until_told():
                return
        except KeyboardInterrupt:  # ended, as all are once the first has told and ended
            return
    say(f"l2t: error: {message}")
    if _have_met():
        from l2t_core.runs.processes import tell_the_others

        tell_the_others()


def exit_code_of(error: BaseException) -> int | None:
    """Report ``error`` in one line and return the exit code, or None where it is a bug."""
    if isinstance(error, UserError):
        _tell_mistake(error, str(error))
        return USER_MISTAKE
    if isinstance(error, ClickError):
        _tell_mistake(error, usage_message(error))
        return USER_MISTAKE
    if isinstance(error, Interrupted):
        say(f"l2t: interrupted: {error}")
        return INTERRUPTED
    if isinstance(error, PeerLost):
        from l2t_core.runs.processes import is_first_to_tell_a_loss

        if is_first_to_tell_a_loss():  # torchrun ends all survivors at once
            say(f"l2t: error: {error}")
        return PEER_LOST
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        say("l2t: interrupted")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away (`l2t recipes ls | head`).
        _drop_output()
        return 1
    if isinstance(error, OSError) and (refusal := _refusal(error)):
        say(f"l2t: error: {refusal}")
        _drop_output()
        return USER_MISTAKE
    if is_for_want_of_memory(error):
        wanted = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
        say(
            f"l2t: error: out of memory{f' ({wanted.group(1)} at once)' if wanted else ''}; take a "
            "smaller batch or model, and for a teacher's training a smaller training.memory"
        )
        return USER_MISTAKE
    return None


def _drop_output() -> None:
    """Have what cannot be printed forgotten: Python would complain when it flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refusal(error: OSError) -> str:
    """Return what the system refused and the mend, "" where that is not the user's to mend."""
    mend = _SYSTEM_MENDS.get(error.errno or 0, "")
    if error.filename is not None:
        mend = mend or "check the path and its permissions"
        return f"{error.filename}: {error.strerror}; {mend}"
    return f"{error.strerror}; {mend}" if mend else ""


def usage_message(error: Any) -> str:
    """Return one line for a Click usage error, with the nearest flag or command named."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    path = context.command_path if context else "l2t"
    known: Iterable[str] = ()
    name = ""
    if match := re.match(r"No such command ['\"]?([^'\"]+?)['\"]?(?:\.|$| )", message):
        name = match.group(1)
        known = context.command.list_commands(context) if context else ()
        message = f"no command {name!r}"
    elif option := getattr(error, "option_name", None):
        if type(error).__name__ == "NoSuchOption":
            name = option
            known = [o for p in context.command.params for o in p.opts] if context else ()
            message = f"no option {option!r}"
    elif match := re.search(r"'([^']*)' is not one of (.*)$", message):
        name = match.group(1)
        known = re.findall(r"'([^']*)'", match.group(2))
    message = message[:1].lower() + message[1:]
    return f"{message}{suggestion(name, known)} (see `{path} --help`)"
