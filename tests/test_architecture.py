"""The layers: l2t_cli -> l2t_fairseq, l2t_vision -> l2t_core -> torch. Modules stay readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from textwrap import dedent

import pytest
from checkout import ROOT  # type: ignore[import-not-found]

PACKAGES = {
    "l2t_core": ROOT / "plugins/l2t_core",
    "l2t_fairseq": ROOT / "plugins/l2t_fairseq",
    "l2t_vision": ROOT / "plugins/l2t_vision",
    "l2t_cli": ROOT / "l2t_cli",
}
FORBIDDEN = {
    "l2t_core": {"fairseq", "fairseq_cli", "typer", "rich", "omegaconf", "sklearn", "sacrebleu",
                 "torchvision", "l2t_cli", "l2t_fairseq", "l2t_vision"},
    "l2t_vision": {"fairseq", "fairseq_cli", "typer", "rich", "l2t_cli", "l2t_fairseq"},
    "l2t_fairseq": {"typer", "rich", "l2t_cli", "l2t_vision"},
    "l2t_cli": {"fairseq", "fairseq_cli"},
}

REFERENCE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"\bl2t_(?:cli|core|fairseq|vision)(?:[./]\w+)+")


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in files
        if (bad := imported_names(path) & FORBIDDEN[package])
    }
    assert wrong == {}


@pytest.mark.parametrize("package", ["l2t_core", "l2t_vision", "l2t_fairseq"])
def test_every_module_imports_without_fairseq_where_it_should(package):
    """Core and vision import whole; the fairseq plugin as a package, as the CLI needs it."""
    modules = [package]
    if package != "l2t_fairseq":
        modules += [
            f"{package}.{'.'.join(p.relative_to(PACKAGES[package]).with_suffix('').parts)}"
            for p in sorted(PACKAGES[package].rglob("[a-z]*.py"))
        ]
    block = (
        "import sys, importlib; sys.modules['fairseq'] = None; sys.modules['fairseq_cli'] = None\n"
        f"[importlib.import_module(m) for m in {modules!r}]\n"
    )
    path = f"{ROOT / 'plugins'}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{block}"],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr


def test_modules_and_functions_stay_short():
    """A module that a reader can hold: under 400 lines, functions under 50."""
    long = []
    for package in PACKAGES.values():
        for path in sorted(package.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if len(text.splitlines()) > 400:
                long.append(str(path.relative_to(ROOT)))
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and node.end_lineno:
                    first = node.body[0]
                    doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                    start = first.end_lineno if doc and first.end_lineno else node.lineno
                    if node.end_lineno - start > 50:
                        long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []


@cache
def names_in(path: Path) -> set[str]:
    """Return all that a module defines, assigns or imports, members of its classes included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return names


def dotted(package: str, path: Path) -> str:
    """Return the name by which a module of ``package`` is imported."""
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


MODULES = {
    dotted(package, path): path for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}


def is_there(name: str) -> bool:
    """Tell whether dotted ``name`` is a module of ours, or something in one."""
    parts = name.split(".")
    lengths = range(len(parts), 0, -1)
    length = next(n for n in lengths if ".".join(parts[:n]) in MODULES)
    sought = parts[length:]
    return not sought or names_in(MODULES[".".join(parts[:length])]).issuperset(sought)


def ours_imported_in(tree: ast.AST) -> set[str]:
    """Return what ``tree`` imports of our packages, in functions too, as dotted names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in PACKAGES}


def imported_at_once(tree: ast.Module) -> set[str]:
    """Return what of ours is imported as the module of ``tree`` is: not in functions or for types.

    Where a name is not a module itself, its module is meant.
    """
    left = ast.Module(body=[], type_ignores=[])
    queue: list[ast.stmt] = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
        elif isinstance(node, ast.Import | ast.ImportFrom):
            left.body.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    names = ours_imported_in(left)
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & set(MODULES)


def test_no_module_needs_itself_to_be_imported():
    """A circle of imports works or not by which of its modules a program imports first."""
    needs = {
        name: imported_at_once(ast.parse(path.read_text(encoding="utf-8")))
        for name, path in MODULES.items()
    }
    assert needs["l2t_core.training.episodes"] >= {"l2t_core.training.checks", "l2t_core.errors"}
    left = set(needs)
    while True:  # those that need none of the others, and those that none of them needs, are free
        needed = set().union(*(needs[name] for name in left))
        free = {name for name in left if not needs[name] & left or name not in needed}
        if not free:
            break
        left -= free
    assert sorted(left) == []


def test_what_is_imported_of_ours_is_there():
    """In every module, test and benchmark, and in what pages print of Python."""
    code = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]
    }
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        code |= {f"{page.name}, example {n}": dedent(text) for n, text in enumerate(blocks, 1)}
    lost = [
        f"{where}: {name}"
        for where, text in code.items()
        for name in sorted(ours_imported_in(ast.parse(text)))
        if not is_there(name)
    ]
    assert lost == []


def test_what_pages_name_of_the_source_is_there():
    checked, lost = 0, []
    for page in PAGES:
        for place in PLACE.findall(page.read_text("utf-8")):
            checked += 1
            if not is_there(place.removesuffix(".py").replace("/", ".")):
                lost.append(f"{page.name}: {place}")
    assert checked > 30
    assert lost == []


def test_what_a_docstring_refers_to_is_there():
    """``:func:`x` `` is in the module that says so, ``:func:`package.module.x` `` in that one."""
    checked, lost = 0, []
    for own, path in MODULES.items():
        for reference in REFERENCE.findall(path.read_text(encoding="utf-8")):
            ours = reference.split(".")[0] in PACKAGES
            checked += 1
            if not is_there(reference if ours else f"{own}.{reference}"):
                lost.append(f"{path.relative_to(ROOT)}: {reference}")
    assert checked > 50
    assert lost == []
