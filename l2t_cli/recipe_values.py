"""Values of a recipe, checked without building or training anything."""

from __future__ import annotations

from dataclasses import replace

from l2t_cli.recipe_loading import COMMAND_LINE, Recipe
from l2t_core.errors import UserError


def problems(recipe: Recipe, classes: int | None = None) -> list[str]:
    """Return a line for every unknown name and impossible number in ``recipe``, file and key first.

    ``classes`` is the student's K; None where it is not known without building the student. The
    ``compare`` section has a check of its own.
    """
    from l2t_core import settings
    from l2t_core.life import precision_of

    precision = precision_of(recipe.student, recipe.training.precision)
    training = replace(recipe.training, precision=precision)
    found = settings.problems(
        recipe.loss, recipe.teacher, training, recipe.student.steps, classes
    )
    return [located(recipe, line) for line in [*found, *recipe.field.problems(recipe.student)]]


def located(recipe: Recipe, problem: str) -> str:
    """Return ``problem``, which begins with a key, after the place where the key was set."""
    key = problem.split(maxsplit=1)[0].rstrip(":")
    return f"{COMMAND_LINE if key in recipe.overridden else recipe.source}: {problem}"


def refuse_impossible(recipe: Recipe, classes: int | None = None) -> None:
    """Refuse what :func:`problems` lists.

    Raises:
        UserError: with the first line.
    """
    if found := problems(recipe, classes):
        raise UserError(found[0])
