"""``l2t apply-teacher``: a teacher applied to a recipe, a fairseq command or a shell script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l2t_cli.applying.result import ApplicationResult, report
from l2t_cli.applying.students import Application, apply, seeds_from, show_plan
from l2t_cli.options import ChosenFormat, DryRun, TeacherFile, output_folder
from l2t_cli.recipe_reading import values as recipe_values
from l2t_cli.recipe_reading.loading import COMPARE, CORE_SECTIONS, Recipe, refuse_sections
from l2t_cli.screen import console
from l2t_cli.screen.console import LogFormat
from l2t_core.errors import UserError
from l2t_fairseq.commands.train import looks_like_training

if TYPE_CHECKING:
    from l2t_cli.applying.fairseq import FairseqApplication


def command(
    teacher: TeacherFile,
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [KEY=VALUE]... | SCRIPT.sh | -- fairseq-train ...",
            help="What to train: a recipe with its changes, a script, or a command.",
        ),
    ],
    out: Annotated[Path | None, output_folder("runs/NAME-taught")] = None,
    seed: Annotated[
        int | None,
        typer.Option(show_default="the fairseq command's, or 1", help="The first student's seed."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many students, with consecutive seeds.")] = 1,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline", help="Train by cross-entropy too: same steps, batches and seeds."
        ),
    ] = False,
    generate: Annotated[
        str,
        typer.Option(
            show_default="--beam 5",
            help="Flags of fairseq-generate for the scores of a command or script.",
        ),
    ] = "",
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Score against this raw text, the test set's target side; for a command or script."
        ),
    ] = None,
    dry_run: DryRun = False,
    log_format: ChosenFormat = None,
) -> None:
    """Train a student under a teacher and score it on test.

    Three ways to say what to train: a recipe; `-- fairseq-train ...` as you would run it; a
    shell script that holds a fairseq-train command.
    """
    application = application_for(target, generate, reference)
    folder = out or Path("runs") / f"{application.name}-taught"
    first = seed if seed is not None else application.default_seed
    wanted = seeds_from(first, seeds)
    if dry_run:
        show_plan(application, teacher, folder, wanted, baseline)
        return
    run(
        application,
        teacher,
        folder,
        wanted,
        baseline=baseline,
        log_format=console.default_format(log_format),
    )


def run(
    application: Application,
    teacher: Path,
    folder: Path,
    seeds: range,
    *,
    baseline: bool,
    log_format: LogFormat,
) -> ApplicationResult:
    """Apply ``teacher`` and report.

    Raises:
        UserError: if the teacher, the data or the folder cannot be used.
    """
    result = apply(
        application, teacher, folder, seeds, baseline=baseline, log_format=log_format
    )
    report(result, log_format)
    return result


def application_for(
    target: list[str], generate: str = "", reference: Path | None = None
) -> Application:
    """Return the application that the command line's target asks for.

    Raises:
        UserError: if it is neither a recipe nor a fairseq command nor a script.
    """
    first = target[0]
    path = Path(first)
    is_recipe = path.suffix in (".yaml", ".yml", ".safetensors")  # the last is told for what it is
    training = not is_recipe and looks_like_training(target)
    if path.suffix == ".sh" or (path.is_file() and not is_recipe and not training):
        if len(target) > 1:
            raise UserError(f"{target[1]!r} after the script {first}: change the script itself")
        return _command_application().from_script(path, generate, reference)
    if training:
        return _command_application().from_words(target, generate, reference)
    if generate or reference:
        raise UserError("--generate and --reference are for commands; a recipe has its own")
    refuse_sections(
        target[1:],
        list(CORE_SECTIONS),
        "belongs to the teacher's training and has no effect here (the teacher file holds it); "
        "give it to `l2t train-teacher`",
    )
    refuse_sections(
        target[1:], [COMPARE], "has no effect here; give it to `l2t compare`"
    )
    return application_for_recipe(recipe_values.load(first, target[1:]))


def application_for_recipe(recipe: Recipe) -> Application:
    """Return the application of a recipe's field.

    Raises:
        UserError: if a package that the field needs is missing.
    """
    recipe.field.require()
    application: Application = recipe.field.load("application")(recipe)
    return application


def _command_application() -> type[FairseqApplication]:
    from l2t_cli.recipe_reading.fields import FIELDS

    FIELDS.get("nmt").require()
    from l2t_cli.applying.fairseq import FairseqApplication

    return FairseqApplication
