"""The ``l2t`` command and ``python -m l2t_cli``: only what has to be there before imports."""

from __future__ import annotations

import io
import os
import signal
import sys


def _stop(number: int, frame: object) -> None:
    # No exception: in the middle of an import it would go through code that takes it for its own
    # failure, and nothing is there yet that could be kept.
    sys.stderr.write("l2t: interrupted\n")
    sys.stderr.flush()
    os._exit(130)


def _prepare_streams() -> None:
    """Make streams of those that are closed, and none that a name or a text can end a run on."""
    # Files opened later would take their place.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    # A file's name that is not UTF-8, or an "ö" under an encoding without it. Python has stderr so.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line; Ctrl-C before it is there and after it has ended is no stack trace."""
    _prepare_streams()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored
    if usual:
        signal.signal(signal.SIGINT, _stop)
    from l2t_cli.main import main as run

    def at_once() -> None:
        if usual:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # From the command's end on one more Ctrl-C ends the process at once: while libraries tidy
        # up, Python would show in which of them it was.
        run(on_end=at_once)
    except KeyboardInterrupt:  # before that was said
        sys.exit(130)


if __name__ == "__main__":
    main()
