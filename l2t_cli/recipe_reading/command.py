"""``l2t recipes``: listed, shown, copied, validated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l2t_cli.copying import place_for, refuse_to_overwrite
from l2t_cli.errors import say
from l2t_cli.options import Force, RecipeName, help_alone
from l2t_cli.recipe_reading.files import (
    find_recipe,
    is_change,
    read_yaml,
    recipe_text,
    shipped_recipes,
)
from l2t_cli.recipe_reading.loading import check_recipe
from l2t_cli.screen import console
from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_write

app = typer.Typer(help="List, show, copy and validate recipes.", no_args_is_help=False)

app.callback(invoke_without_command=True)(help_alone)


@app.command("ls")
def list_recipes() -> None:
    """List the recipes that come with l2t."""
    rows = [
        (name, str(read_yaml(path).get("description", "")))
        for name, path in shipped_recipes().items()
    ]
    console.table("", ["recipe", "what it trains"], rows)


@app.command()
def show(name: RecipeName) -> None:
    """Print a recipe as it is written."""
    _, path = find_recipe(name)
    print(recipe_text(path).rstrip())


@app.command()
def cp(
    name: RecipeName,
    destination: Annotated[Path, typer.Argument(help="A file or a folder.")],
    force: Force = False,
    no_clobber: Annotated[
        bool, typer.Option("--no-clobber", help="Quietly keep a file that exists.")
    ] = False,
) -> None:
    """Copy a recipe, to be changed and given back by its path."""
    _, path = find_recipe(name)
    target = place_for(destination, path.name, (".yaml", ".yml"), "recipe")
    if target.exists() and no_clobber:
        return
    refuse_to_overwrite(target, force)
    atomic_write(target, recipe_text(path))
    console.line(f"copied {name} to {console.shown(target)}")


@app.command()
def validate(
    names: Annotated[list[str], typer.Argument(help="Recipes by name or file.")],
) -> None:
    """Check recipes and list everything that is wrong with them."""
    from l2t_cli.comparing import plan as compare_plan
    from l2t_cli.recipe_reading import values as recipe_values

    for name in names:
        if is_change(name):
            raise UserError(
                f"{name!r} is a change, and recipes are checked as they are; give it to a command "
                "with --dry-run"
            )
    problems: list[str] = []
    for name in names:
        try:
            recipe, found = check_recipe(name)
        except UserError as error:
            recipe, found = None, [str(error)]
        if recipe is not None:
            classes = recipe.field.known_classes(recipe.student)
            found = [
                *recipe_values.problems(recipe, classes),
                *compare_plan.problems(recipe),
                *compare_plan.wrong_teachers(recipe),
            ]
        if recipe is not None and not found:
            console.line(f"{recipe.name}: ok")
        problems += found
    for problem in problems[:-1]:
        say(f"l2t: error: {problem}")
    if problems:
        raise UserError(problems[-1])
