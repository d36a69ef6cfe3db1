"""``l2t export``: a taught student as a checkpoint that knows nothing of its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l2t_cli.options import Force
from l2t_cli.screen import console
from l2t_core.errors import UserError


def command(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...", help="Checkpoints of fairseq-train; several are averaged."
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="The file to write.")],
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the running averages of --store-ema.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a checkpoint that every fairseq command reads without this plugin."""
    from l2t_fairseq.checkpoints import export_checkpoint, unknown_to_fairseq

    if to.exists() and not force:
        raise UserError(f"--to {to} exists; name another file, or replace it with --force")
    made = export_checkpoint(checkpoints, to, ema=ema)
    architecture, task = str(made["architecture"]), str(made["task"])
    console.line(
        f"{to}: {architecture}, {made['parameters']:,} parameters, "
        f"{made['updates']:,} updates; task {task}, criterion {made['criterion']}"
    )
    if own := unknown_to_fairseq(architecture, task):
        console.line(
            f"note: fairseq itself has no {' and no '.join(own)}: its commands read the export "
            "with the --user-dir that has"
        )
