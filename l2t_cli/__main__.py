"""The ``l2t`` command and ``python -m l2t_cli``: only what has to be there before imports."""

from __future__ import annotations

import os
import signal
import sys


def _stop(number: int, frame: object) -> None:
    # No exception: in the middle of an import it would go through code that takes it for its own
    # failure, and nothing is there yet that could be kept.
    sys.stderr.write("l2t: interrupted\n")
    sys.stderr.flush()
    os._exit(130)


def main() -> None:
    """Run the command line; Ctrl-C before it is there, during its imports, is one line, too."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored
    if usual:
        signal.signal(signal.SIGINT, _stop)
    from l2t_cli.main import main as run

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    finally:
        # All is told. One more Ctrl-C, while libraries tidy up at the interpreter's end, ends it
        # at once; Python would show in which of them it was.
        if usual:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    main()
