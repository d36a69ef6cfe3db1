"""Values of a recipe, checked without building or training anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from l2t_cli.recipe_loading import Recipe
from l2t_core.errors import UserError
from l2t_core.specs import OptimiserSpec, ScheduleSpec


def wrong_names(recipe: Recipe) -> list[str]:
    """Return a line for every name in ``recipe`` that no registry of the core knows."""
    problems = []
    for key, registry, name in _names(recipe):
        try:
            registry.get(name)
        except UserError as error:
            problems.append(f"{recipe.source}: {key}: {error}")
    return problems


def wrong_student(recipe: Recipe) -> list[str]:
    """Return a line for everything that is wrong with the field's section of ``recipe``."""
    return [f"{recipe.source}: {line}" for line in recipe.field.problems(recipe.student)]


def impossible_settings(recipe: Recipe, total_steps: int, classes: int | None) -> list[str]:
    """Return a line if no teacher can learn anything with the settings of ``recipe``.

    ``classes`` is the student's K; None where it is not known without building the student.
    """
    from l2t_core.settings import check_settings

    try:
        check_settings(recipe.loss, recipe.teacher, recipe.training, total_steps, classes)
    except UserError as error:
        return [f"{recipe.source}: {error}"]
    return []


def _names(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    from l2t_core.differentiation import DIFFERENTIATIONS
    from l2t_core.losses import FORMS, SIGMAS
    from l2t_core.optimisers import OPTIMISERS
    from l2t_core.schedules import SCHEDULES
    from l2t_core.second_derivatives import SECOND
    from l2t_core.teachers import TEACHERS

    yield "loss.form", FORMS, recipe.loss.form
    yield "loss.sigma", SIGMAS, recipe.loss.sigma
    yield "teacher.name", TEACHERS, recipe.teacher.name
    yield "training.differentiation", DIFFERENTIATIONS, recipe.training.differentiation
    yield "training.hvp", SECOND, recipe.training.hvp
    registries = {OptimiserSpec: OPTIMISERS, ScheduleSpec: SCHEDULES}
    for item in dataclasses.fields(recipe.student):
        value = getattr(recipe.student, item.name)
        if registry := registries.get(type(value)):
            yield f"{recipe.field.name}.{item.name}.name", registry, value.name
