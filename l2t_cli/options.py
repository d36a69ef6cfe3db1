"""Arguments and options that several subcommands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from l2t_cli.recipe_reading.files import shipped_recipes
from l2t_cli.screen.console import LogFormat
from l2t_core.teachers.ready import find_teacher


def complete_recipe(incomplete: str) -> list[str]:
    """Complete recipe names in the shell."""
    return [name for name in shipped_recipes() if incomplete in name]


RecipeName = Annotated[
    str,
    typer.Argument(
        help="A recipe's name (see `l2t recipes ls`) or YAML file.",
        autocompletion=complete_recipe,
    ),
]
TeacherFile = Annotated[
    Path,
    typer.Argument(
        parser=find_teacher,
        metavar="TEACHER",
        help="A file that `l2t train-teacher` wrote, or the name of a teacher that comes with l2t "
        "(see `l2t teachers ls`).",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        show_default="the cores; 1 on a GPU",
        help="Students trained side by side, each on one core.",
    ),
]
ChosenFormat = Annotated[
    LogFormat | None,
    typer.Option(
        metavar="FORMAT",  # the four names would cut long options off at 80 characters
        show_default="rich on a terminal, else simple",
        help="How to report: rich, simple, json or none.",
    ),
]


def changes(example: str) -> Any:
    """Return the argument ``[KEY=VALUE]...``, with an ``example`` of one."""
    return typer.Argument(metavar="[KEY=VALUE]...", help=f"Changes, e.g. {example}.")


def output_folder(default: str | bool = True) -> Any:
    """Return the option ``--out``; ``default`` says what it is where none can be written down."""
    return typer.Option(show_default=default, help="Output folder.")


def help_alone(context: typer.Context) -> None:
    """Print the help of a command that was given without a subcommand."""
    if context.invoked_subcommand is None:
        print(context.get_help())
