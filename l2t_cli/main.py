"""The ``l2t`` command: the subcommands put together, and errors told in one line.

Nothing here imports torch: ``l2t --help`` has to answer at once.
"""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from l2t_cli import (
    data,
    demo,
    doctor,
    export,
    inspect_teacher,
    ready_teachers,
    train_teacher,
    user_dir,
)
from l2t_cli.applying import command as apply_teacher
from l2t_cli.comparing import command as compare
from l2t_cli.comparing import transfer
from l2t_cli.errors import INTERRUPTED, Terminated, exit_code_of, say, tell_before_sigterm
from l2t_cli.options import help_alone
from l2t_cli.recipe_reading import command as recipe_commands
from l2t_core.errors import PeerLost

app = typer.Typer(
    name="l2t",
    help="Train a teacher that writes a student's loss function, and apply it to fairseq and "
    "image recipes.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None]) -> None:
    """Add a command; its help has a docstring's paragraphs, not the line breaks inside them."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(name, help="\n\n".join(" ".join(text.split()) for text in paragraphs))(command)


_add("train-teacher", train_teacher.command)
_add("apply-teacher", apply_teacher.command)
_add("compare", compare.command)
_add("transfer", transfer.command)
app.add_typer(data.app, name="data")
app.add_typer(recipe_commands.app, name="recipes")
app.add_typer(ready_teachers.app, name="teachers")
_add("inspect", inspect_teacher.command)
_add("export", export.command)
_add("doctor", doctor.command)
_add("user-dir", user_dir.command)
_add("demo", demo.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from l2t_core import __version__

        print(f"l2t {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    help_alone(context)


def _interrupt(number: int, frame: object) -> None:
    raise Terminated


def _prepare_process() -> None:
    # First come, first served: fairseq would set the root logger to DEBUG as it is imported.
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if not sys.warnoptions:
        # Advice from libraries to their callers; nothing that a user of l2t could act on.
        warnings.filterwarnings("ignore", category=UserWarning, module="torch|fairseq|hydra")
    # A batch system's SIGTERM ends a run as Ctrl-C does: children ended, work kept.
    signal.signal(signal.SIGTERM, _interrupt)


def main(
    arguments: Sequence[str] | None = None, on_end: Callable[[], None] = lambda: None
) -> None:
    """Run the command line and exit: 0 done, 2 the user's mistake, 130 after Ctrl-C.

    ``on_end`` is called when the command has ended, before a failure is told; where another process
    was lost, after that.
    """
    try:
        _prepare_process()
        code = typer.main.get_command(app).main(
            args=list(sys.argv[1:] if arguments is None else arguments),
            prog_name="l2t",
            standalone_mode=False,
        )
        on_end()
        if code == INTERRUPTED:  # Typer has taken a Ctrl-C that no command turned into advice
            say("l2t: interrupted")
        sys.stdout.flush()  # what cannot be printed is told here
    except BaseException as error:
        if lost := isinstance(error, PeerLost):
            tell_before_sigterm()
        else:
            on_end()
        try:
            code = exit_code_of(error)
        except KeyboardInterrupt:  # one more, while the first is told
            code = INTERRUPTED
        if code is None:
            raise
        if lost:
            on_end()
    # Nothing is left to be kept: Python would show where in its own end it was.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(code if isinstance(code, int) else 0)
