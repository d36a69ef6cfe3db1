"""Recipe files: shipped or one's own, found by name or path, read as YAML.

A run's ``config.yaml`` is one, too: the run's settings as resolved, under its recipe's name.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from l2t_core.errors import UserError, suggestion
from l2t_core.teachers.ready import ready_teachers

_RUN_CONFIG = "config.yaml"


def shipped_recipes() -> dict[str, Path]:
    """Return the paths of the recipes that come with l2t, by name (``image/digits``)."""
    try:
        root = Path(str(importlib.resources.files("l2t_cli.recipes")))
    except ModuleNotFoundError:  # run from a checkout that is not installed
        root = Path(__file__).resolve().parents[2] / "recipes"
    paths = sorted(root.glob("*/*.yaml"), key=lambda path: (path.parent.name, path.stem))
    return {f"{path.parent.name}/{path.stem}": path for path in paths}


def is_change(word: str) -> bool:
    """Tell whether ``word`` is a ``KEY=VALUE`` and no recipe, whose path may have a ``=``, too."""
    try:
        return "=" in word and not Path(word).is_file()
    except OSError:  # too long for a path
        return True


def find_recipe(name: str) -> tuple[str, Path]:
    """Return the full name and the path of a recipe given by name or as a file.

    Raises:
        UserError: if there is none; the nearest name is suggested.
    """
    shipped = shipped_recipes()
    if name in shipped:
        return name, shipped[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(
                f"no recipe file {name}; `l2t recipes ls` lists those that come with l2t"
            )
        return path.stem, path
    if path.suffix == ".safetensors" or name in ready_teachers():
        what = "teacher's file" if path.suffix else "teacher"
        raise UserError(
            f"{name} is a {what} and no recipe; write `l2t apply-teacher TEACHER RECIPE` "
            "or `l2t compare RECIPE --teacher TEACHER`"
        )
    short = [full for full in shipped if full.split("/")[1] == name]
    if len(short) == 1:
        return short[0], shipped[short[0]]
    if short:
        raise UserError(f"recipe {name!r} is ambiguous; give one of {', '.join(short)}")
    names = [*shipped, *(full.split("/")[1] for full in shipped)]
    raise UserError(
        f"no recipe {name!r}{suggestion(name, names)} (`l2t recipes ls` lists them; "
        "a file of your own ends in .yaml)"
    )


def read_recipe(name: str) -> tuple[str, Path, dict[str, Any]]:
    """Return full name, path and settings of a recipe given by name or as a file.

    A run's ``config.yaml`` says by ``recipe`` and ``content`` what the run was made from; these
    are no settings. It goes by its recipe's name, and a copy of it by its own. One that was written
    without a ``compare`` section gets that of the shipped recipe of its name.

    Raises:
        UserError: if there is no such recipe, or it cannot be read as YAML.
    """
    full_name, path = find_recipe(name)
    settings = read_yaml(path)
    recipe = settings.get("recipe")
    if not isinstance(recipe, str) or not isinstance(settings.get("content"), dict):
        return full_name, path, settings
    settings = {key: value for key, value in settings.items() if key not in ("recipe", "content")}
    if recipe in shipped_recipes():
        settings.setdefault("compare", read_yaml(shipped_recipes()[recipe]).get("compare"))
    return recipe if path.name == _RUN_CONFIG else full_name, path, settings


def recipe_text(path: Path) -> str:
    """Return what the recipe file ``path`` holds, as it is written.

    Raises:
        UserError: if it cannot be read or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: if it cannot be read, is no YAML (with the line) or no mapping.
    """
    try:
        # omegaconf's reader refuses duplicate keys and takes 1e-3 for the number that it is.
        content = OmegaConf.to_container(OmegaConf.create(recipe_text(path) or "{}"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}" if mark else ""
        reason = error.problem or error.context or ""
        if reason.startswith("but "):  # the second half of a sentence
            reason = f"{error.context}, {reason}"
        raise UserError(f"{path}{place}: not valid YAML: {reason}") from None
    except RecursionError:
        raise UserError(
            f"{path}: sections lie in each other too deep, or one holds itself by an alias; "
            "`l2t recipes show NAME` shows how a recipe is built"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not valid YAML: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is a {kind_of(content)}")
    return {str(key): value for key, value in content.items()}


def kind_of(value: Any) -> str:
    """Return what a value of a YAML file is, in words: ``whole number``."""
    names = {
        bool: "yes/no value",
        int: "whole number",
        float: "number",
        str: "text",
        list: "list",
        dict: "section",
        type(None): "empty value",
    }
    return names.get(type(value), type(value).__name__)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return str(error).strip().splitlines()[0]
