"""The layers: l2t_cli -> l2t_fairseq, l2t_vision -> l2t_core -> torch. Modules stay readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

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


def test_what_a_docstring_refers_to_is_there():
    """``:func:`x` `` is in the module that says so, ``:func:`package.module.x` `` in that one."""
    modules = {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    checked, lost = 0, []
    for own, path in modules.items():
        for reference in REFERENCE.findall(path.read_text(encoding="utf-8")):
            home = next((m for m in modules if reference.startswith(f"{m}.")), own)
            sought = reference.removeprefix(f"{home}.").split(".")
            checked += 1
            if reference not in modules and not names_in(modules[home]).issuperset(sought):
                lost.append(f"{path.relative_to(ROOT)}: {reference}")
    assert checked > 50
    assert lost == []
