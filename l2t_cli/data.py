"""``l2t data prepare``: data sets brought into the form that recipes name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from l2t_cli.errors import Interrupted
from l2t_cli.options import ChosenFormat, help_alone, output_folder
from l2t_cli.recipe_reading.fields import FIELDS, Field
from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat
from l2t_cli.screen.progress import bar
from l2t_core.errors import UserError, suggestion

app = typer.Typer(help="Prepare data sets.")
app.callback(invoke_without_command=True)(help_alone)


@app.command()
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            help="demo, multi30k, multi30k-en-de, iwslt14, mnist, fashion-mnist, cifar10 or "
            "cifar100; digits and images of your own need no preparing."
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            show_default="download them",
            help="A folder with the official files, or for iwslt14 the archive.",
        ),
    ] = None,
    out: Annotated[Path | None, output_folder("data/NAME")] = None,
    log_format: ChosenFormat = None,
) -> None:
    """Bring a data set into the form that the recipes read."""
    prepare_data_set(name, source, out, console.default_format(log_format))


def prepare_data_set(
    name: str, source: Path | None, out: Path | None, log_format: LogFormat
) -> Path:
    """Prepare the data set ``name`` in ``out`` and return the folder.

    Raises:
        UserError: if there is no such data set, its files are missing, damaged or cannot be
            fetched, or the folder cannot be written.
    """
    field, run = _data_set(name)
    if source is not None and not source.exists():
        raise UserError(f"--from {source} is not there; give the folder with the official files")
    field.require()
    folder = out or Path("data") / name
    view = _View(name, log_format)
    try:
        with view:
            run(folder, source, view.receive)
    except KeyboardInterrupt:
        kept = "nothing half-made is left; the same command starts again"
        if source is None:
            kept = "what was downloaded is kept, an unfinished file as .part; the same command "
            kept += "continues"
        raise Interrupted(kept) from None
    if log_format.wordy:
        console.line(f"{name} is ready in {console.shown(folder)}")
    return folder


def _data_set(name: str) -> tuple[Field, Callable[..., Any]]:
    known: dict[str, Field] = {}
    for field in (FIELDS.get(entry) for entry in FIELDS.names()):
        registry = field.load("datasets")
        if name in registry.names():
            return field, registry.get(name)
        known |= dict.fromkeys(registry.names(), field)
    if name == "digits":
        raise UserError("digits come with scikit-learn; there is nothing to prepare")
    if name == "images":
        raise UserError(
            "images of your own need no preparing; name their folder or tar archive in the recipe "
            "as image.folder, with image.data=images"
        )
    raise UserError(
        f"no data set {name!r}{suggestion(name, known)} (known: {', '.join(sorted(known))})"
    )


class _View:
    """A bar for each file that is downloaded or long stage, a line for each stage."""

    def __init__(self, name: str, log_format: LogFormat) -> None:
        self.name, self.format = name, log_format
        self._bars = ExitStack()
        self._title = ""
        self._update: Callable[..., None] = lambda *a, **k: None

    def __enter__(self) -> _View:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.close()

    def receive(self, event: dict[str, Any]) -> None:
        """Take one event of a field's ``prepare`` module."""
        if event["event"] in ("download", "progress"):
            download = event["event"] == "download"
            title = f"downloading {event['file']}" if download else str(event["stage"])
            if title != self._title:
                self._bars.close()
                self._title = title
                unit = "bytes" if download else ""
                self._update = self._bars.enter_context(bar(title, self.format, unit=unit))
            self._update(event["done"], event["of"])
            return
        self._bars.close()
        self._title = ""
        if self.format.wordy:
            console.line(f"{self.name}: {event['stage']}")
