"""Values of a recipe, checked without building or training anything."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

from l2t_cli.errors import say
from l2t_cli.recipe_reading.loading import COMMAND_LINE, Recipe, load_recipe
from l2t_core.errors import NoEffect, UserError


def load(name: str, overrides: Sequence[str]) -> Recipe:
    """Return the recipe ``name`` with ``overrides``, less what those leave nothing to do.

    What is left out of the file's settings is told on stderr.

    Raises:
        UserError: as :func:`l2t_cli.recipe_reading.loading.load_recipe`.
    """
    recipe, told = without_idle(load_recipe(name, overrides))
    if os.environ.get("RANK", "0") == "0":
        for text in told:
            say(f"note: {text}")
    return recipe


def without_idle(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return ``recipe`` with settings of its file at their defaults that the command line idles.

    And a line on each. A setting of the command line without effect, or one whose reason stands
    in the file beside it, stays to be refused.
    """
    told: dict[str, str] = {}
    # One by one: what is out of the way may show another.
    while idle := _idled(recipe, told):
        value, recipe = _at_its_default(recipe, idle.key)
        told[idle.key] = (
            f"{idle.key}={value} of the recipe has no effect with {idle.by}={idle.value}"
        )
    return recipe, [*told.values()]


def _idled(recipe: Recipe, done: Container[str]) -> NoEffect | None:
    """Return what is said of the first setting of the file that the command line idles."""
    for idle in _problems(recipe, None) if recipe.overridden else ():
        if not isinstance(idle, NoEffect) or idle.key in done or idle.key in recipe.overridden:
            continue
        if idle.by in recipe.overridden:
            return idle
    return None


def _at_its_default(recipe: Recipe, key: str) -> tuple[Any, Recipe]:
    """Return the value of ``key``, and the recipe with its default in its place."""
    section, *path = key.split(".")
    section = "student" if section == recipe.field.name else section
    value, changed = _reset(getattr(recipe, section), path)
    return value, replace(recipe, **{section: changed})


def _reset(spec: Any, path: Sequence[str]) -> tuple[Any, Any]:
    name, *rest = path
    value, default = getattr(spec, name), None
    if rest:
        value, default = _reset(value, rest)
    else:
        default = getattr(type(spec), name)
    return value, replace(spec, **{name: default})


def problems(recipe: Recipe, classes: int | None = None) -> list[str]:
    """Return a line for every unknown name and impossible number in ``recipe``, file and key first.

    ``classes`` is the student's K; None where it is not known without building the student. The
    ``compare`` section has a check of its own.
    """
    return [located(recipe, line) for line in _problems(recipe, classes)]


def _problems(recipe: Recipe, classes: int | None) -> list[str]:
    from l2t_core.students.life import precision_of
    from l2t_core.training import checks

    precision = precision_of(recipe.student, recipe.training.precision)
    training = replace(recipe.training, precision=precision)
    found = checks.problems(recipe.loss, recipe.teacher, training, recipe.student.steps, classes)
    return [*found, *recipe.field.problems(recipe.student)]


def located(recipe: Recipe, problem: str) -> str:
    """Return ``problem``, which begins with a key, after the place where the key was set."""
    key = problem.split(maxsplit=1)[0].partition("=")[0].rstrip(":")
    return f"{COMMAND_LINE if key in recipe.overridden else recipe.source}: {problem}"


def refuse_impossible(recipe: Recipe, classes: int | None = None) -> None:
    """Refuse what :func:`problems` lists.

    Raises:
        UserError: with the first line.
    """
    if found := problems(recipe, classes):
        raise UserError(found[0])
