"""The errors that users see, and the nearest-name hint that goes with them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

# In what torch's allocators say, without an exception of their own.
_MEMORY_SIGNS = (
    "DefaultCPUAllocator: ", "Storage size calculation overflowed", "CUBLAS_STATUS_ALLOC_FAILED",
)
Limit = tuple[str, float, bool, str]  # a number's name, value, whether it can be, what it must be


class UserError(Exception):
    """A mistake that the user can mend: one line that names the thing, the place and the mend.

    The command line prints it without a stack trace and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ToldByTheFirst(UserError):
    """A mistake that the first of several processes tells; see ``processes.wait_until_told``."""


class NoEffect(str):
    """The line on a setting that another one leaves nothing to do, and which the two are.

    ``key`` is the idle setting's, ``by`` and ``value`` the other's. ``mend`` ends the line.
    """

    key: str
    by: str
    value: str

    def __new__(cls, key: str, by: str, value: object, mend: str) -> NoEffect:
        line = super().__new__(cls, f"{key} has no effect with {by}={value}; {mend}")
        line.key, line.by, line.value = key, by, str(value)
        return line


class PeerLost(Exception):
    """Another process of the run has ended, so that this one cannot go on."""


def is_for_want_of_memory(error: BaseException) -> bool:
    """Tell an allocator's refusal, on CPU or GPU, from torch's many other RuntimeErrors."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # By name: without torch there is no such error, and nothing here imports it.
    return type(error).__name__ == "OutOfMemoryError" or any(
        sign in str(error) for sign in _MEMORY_SIGNS
    )


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or ``""``."""
    names = list(known)
    bare = {k.lstrip("-"): k for k in names}  # the dashes of options make none alike
    section, _, last = name.rpartition(".")
    # A key whose section in the middle was left out: image.lr for image.optimiser.lr.
    inner = [k for k in names if section and k.startswith(f"{section}.") and k.endswith(f".{last}")]
    near = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.5)
    close = inner[:1] or [bare[k] for k in near]
    return f"; did you mean {close[0]!r}?" if close else ""


def out_of_range(section: str, limits: Iterable[Limit]) -> list[str]:
    """Return a line for each number of a recipe's ``section`` that cannot be.

    What it must be reads on after "it must be": ``"at least 1"``.
    """
    return [
        f"{section}.{name} is {value}; it must be {mend}{', but finite' * (value == math.inf)}"
        for name, value, fine, mend in limits
        if not fine
    ]


def unknown_choice(key: str, word: str, known: Sequence[str]) -> list[str]:
    """Return a line if ``word``, the value of the recipe's ``key``, is none of ``known``."""
    if word in known:
        return []
    return [f"{key} is {word!r}{suggestion(word, known)} (known: {', '.join(known)})"]
