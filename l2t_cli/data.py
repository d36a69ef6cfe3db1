"""``l2t data prepare``: data sets brought into the form that recipes name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from l2t_cli import console
from l2t_cli.console import LogFormat

app = typer.Typer(help="Prepare data sets.")
