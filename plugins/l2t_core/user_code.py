"""Functions of the user's own, named in a recipe by their import path ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from l2t_core.errors import UserError

# What the user's code may do; a script that ends itself must not end the command without a word.
FAILURES = (Exception, SystemExit)

_ADDED: list[str] = []  # the folder that is on sys.path for the user's modules, if any


def is_import_path(name: str) -> bool:
    """Tell whether ``name`` is an import path rather than an entry of ours."""
    return ":" in name


def imported(path: str, key: str) -> Callable[..., Any]:
    """Return what ``path``, the value of the recipe's ``key``, names.

    The module may be installed or lie in the folder where the command is run.

    Raises:
        UserError: if there is no such module or function, or it cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # It stays: what is named may import its neighbours when it is called.
        while _ADDED:
            sys.path.remove(_ADDED.pop())
        sys.path.append(here)
        _ADDED.append(here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except FAILURES as error:  # a script without a guard ends itself as it is imported
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{key} {path} cannot be imported ({reason}); write module:function, with the module "
            "installed or in the folder where you are"
        ) from error
    if not callable(found):
        raise UserError(f"{key} {path} is no function; write module:function")
    return found


def import_problems(used: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each (key of a recipe, import path) that :func:`imported` refuses.

    A value that is no import path is left to others.
    """
    found = []
    for key, path in used:
        if is_import_path(path):
            try:
                imported(path, key)
            except UserError as error:
                found.append(str(error))
    return found


def source_of(path: str, key: str) -> bytes:
    """Return the content of the file that defines what ``path`` names, empty if there is none.

    Raises:
        UserError: as :func:`imported`.
    """
    found = imported(path, key)
    try:
        file = inspect.getsourcefile(inspect.unwrap(found))
    except TypeError:  # an object that can be called, or compiled code
        file = getattr(sys.modules[path.partition(":")[0]], "__file__", None)
    return Path(file).read_bytes() if file and Path(file).is_file() else b""
