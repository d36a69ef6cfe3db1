"""``l2t teachers``: those that come with l2t, listed and copied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l2t_cli.copying import place_for, refuse_to_overwrite
from l2t_cli.options import Force, help_alone
from l2t_cli.screen import console
from l2t_core.errors import UserError, suggestion
from l2t_core.runs.files import atomic_write
from l2t_core.teachers.ready import ready_teachers

app = typer.Typer(help="List and copy the teachers that come with l2t.", no_args_is_help=False)

app.callback(invoke_without_command=True)(help_alone)

USES = {
    "wrong-labels": "classification where labels are wrong at random, any number of classes: a "
    "loss that doubts unlikely labels, learnt on MNIST with 40 % wrong ones",
}


@app.command("ls")
def list_teachers() -> None:
    """List the teachers that come with l2t; every command takes them by name."""
    rows = [(name, USES.get(name, "")) for name in ready_teachers()]
    console.table("", ["teacher", "what for"], rows)


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="A teacher's name (see `l2t teachers ls`).")],
    destination: Annotated[Path, typer.Argument(help="A file or a folder.")],
    force: Force = False,
) -> None:
    """Copy a teacher, to be kept with work of your own."""
    if name not in ready_teachers():
        raise UserError(
            f"no teacher {name!r} comes with l2t{suggestion(name, ready_teachers())} "
            "(`l2t teachers ls` lists them)"
        )
    target = place_for(destination, f"{name}.safetensors", (".safetensors",), "teacher")
    refuse_to_overwrite(target, force)
    atomic_write(target, ready_teachers()[name].read_bytes())
    console.line(f"copied {name} to {console.shown(target)}")
