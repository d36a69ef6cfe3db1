"""``l2t data prepare``: data sets brought into the form that recipes name."""

from __future__ import annotations

import typer

app = typer.Typer(help="Prepare data sets.")
