"""The built wheel: what it holds, and that it works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT  # type: ignore[import-not-found]

SHIPPED = ("l2t_cli", "plugins", "recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that the checkout gets no build folder."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in SHIPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            ".",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--disable-pip-version-check",
            "--quiet",
            "-w",
            str(target),
        ],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    return next(target.glob("l2t-*.whl"))


def test_only_our_names_land_in_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"l2t_cli", "l2t_core", "l2t_fairseq", "l2t_vision"}


def test_every_module_and_recipe_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    moved = {"plugins/": "", "recipes/": "l2t_cli/recipes/"}
    for folder in SHIPPED:
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT).as_posix()
            told = path.suffix in (".py", ".yaml", ".safetensors")
            if not told or inside == "plugins/__init__.py":
                continue
            for start, place in moved.items():
                if inside.startswith(start):
                    inside = place + inside[len(start) :]
            assert inside in names


def test_no_dependency_replaces_an_installed_fairseq(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist: ")]
    fairseq = [line for line in required if "fairseq" in line]
    assert len(fairseq) == 2 and all("extra == 'nmt'" in line.replace('"', "'") for line in fairseq)
    # 0.12.2 asks for omegaconf < 2.1: a lower bound above that would force it out.
    assert "Requires-Dist: omegaconf>=2.0.5" in required


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    run = subprocess.run(
        [sys.executable, "-m", "l2t_cli", "recipes", "ls"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "image/digits" in run.stdout and "nmt/demo-de-en" in run.stdout
    folder = subprocess.run(
        [sys.executable, "-m", "l2t_cli", "user-dir"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert Path(folder) == site / "l2t_fairseq"
