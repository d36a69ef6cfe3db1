"""Functions of the user's own, named in a recipe by their import path ``module:function``."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from l2t_core.errors import UserError

# What the user's code may do; a script that ends itself must not end the command without a word.
FAILURES = (Exception, SystemExit)

_OURS = ("l2t_core", "l2t_cli", "l2t_vision", "l2t_fairseq")  # they have a version of their own

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

    Followed by names and digests of the other files of the user's that come with it: those that the
    named module imports, they in turn, and the packages around them.

    Raises:
        UserError: as :func:`imported`.
    """
    found = imported(path, key)
    module = sys.modules[path.partition(":")[0]]
    try:
        file = inspect.getsourcefile(inspect.unwrap(found))
    except TypeError:  # an object that can be called, or compiled code
        file = getattr(module, "__file__", None)
    defined = Path(file) if file and Path(file).is_file() else None
    parts = [defined.read_bytes() if defined else b""]
    for name, content in sorted(_with_neighbours(module, defined).items()):
        parts += [b"\0", name.encode(errors="surrogateescape"), hashlib.sha256(content).digest()]
    return b"".join(parts)


def _with_neighbours(module: ModuleType, defined: Path | None) -> dict[str, bytes]:
    """Return the files that come with the user's ``module``, by their names from its root on.

    Without the file ``defined``, empty ones, and those of installed packages: they are not changed
    between two commands. Found by reading import statements, not by what is loaded, which is more
    once a student has been trained.
    """
    file = Path(getattr(module, "__file__", None) or "")
    depth = module.__name__.count(".") + (file.name == "__init__.py")
    if file.suffix != ".py" or depth >= len(file.parents):
        return {}
    root = file.parents[depth]
    if {"site-packages", "dist-packages"} & set(root.parts) or root == Path(os.__file__).parent:
        return {}
    found: dict[Path, bytes] = {}
    wanted = [file, *([defined] if defined and root in defined.parents else [])]
    while wanted:
        here = wanted.pop()
        if here not in found and here.is_file():
            found[here] = here.read_bytes()
            names = _imports(found[here], here.relative_to(root))
            wanted += [place for name in names for place in _places(root, name)]
    return {
        here.relative_to(root).as_posix(): content
        for here, content in found.items() if content and here != defined
    }


def _imports(source: bytes, file: Path) -> Iterator[str]:
    """Yield the dotted names that may be modules in ``file``'s imports, and its own package."""
    package = [*file.parts[:-1]]
    yield ".".join(package)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _places(root: Path, name: str) -> Iterator[Path]:
    """Yield where the module ``name`` and the packages around it would be below ``root``."""
    parts = name.split(".")
    if not name or parts[0] in sys.stdlib_module_names or parts[0] in _OURS:
        return
    for end in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:end])
        yield place / "__init__.py"
        yield place.with_name(f"{place.name}.py")
