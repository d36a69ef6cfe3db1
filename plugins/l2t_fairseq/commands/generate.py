"""fairseq-generate's flags, checked before hours of training rather than after."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from l2t_core.errors import UserError


def check_generate_flags(flags: Sequence[str], data_bin: Path) -> None:
    """Let fairseq-generate's own parser read ``flags``.

    Raises:
        UserError: with the parser's reason, if it refuses them, or naming the flag that would keep
            the translations from being printed, where they are read.
    """
    from fairseq import options

    line = shlex.join(flags)
    said = io.StringIO()
    parse: Any = options.parse_args_and_arch
    try:
        with _own_arguments(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            read = parse(options.get_generation_parser(), input_args=[str(data_bin), *flags])
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        if not error.code:
            reason = "they ask for help"
        raise UserError(
            f"fairseq-generate does not take `{line}` ({reason}); "
            "mend nmt.generate, or --generate for a command"
        ) from None
    for flag, given in (("--quiet", read.quiet), ("--results-path", read.results_path)):
        if given:
            raise UserError(
                f"with {flag} fairseq-generate (`{line}`) does not print the translations, which "
                "are scored; remove it from nmt.generate, or --generate for a command"
            )


@contextlib.contextmanager
def _own_arguments() -> Iterator[None]:
    """Hide our own command line: fairseq's parser looks for --user-dir in it."""
    before = sys.argv
    sys.argv = ["fairseq-generate"]
    try:
        yield
    finally:
        sys.argv = before
