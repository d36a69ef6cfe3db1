"""``make test-matrix``: what it says where there is nothing that it could test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import ROOT  # type: ignore[import-not-found]


def matrix(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script in ``folder``, where no Python of the list is found."""
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "matrix.sh", folder / "tests")
    (folder / "bin").mkdir()
    for tool in ("bash", "dirname"):
        found = shutil.which(tool)
        assert found
        (folder / "bin" / tool).symlink_to(found)
    # One outside the list is here, and would be taken.
    python = folder / "bin" / "python3.13"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    return subprocess.run(
        [str(folder / "bin" / "bash"), str(folder / "tests" / "matrix.sh")], check=False,
        env={"PATH": str(folder / "bin"), "HOME": str(folder), **environment},
        capture_output=True, text=True,
    )


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ("3.11 3.13", "matrix: VERSIONS has 3.13, and l2t runs on 3.10 3.11 3.12; take it out\n"),
        ("main", "matrix: VERSIONS has main, and l2t runs on 3.10 3.11 3.12; take it out\n"),
        (" ", "matrix: VERSIONS names no Python; name some of 3.10 3.11 3.12, or unset it\n"),
    ],
)
def test_versions_that_cannot_be_are_refused_first(
    tmp_path: Path, versions: str, says: str
) -> None:
    done = matrix(tmp_path, VERSIONS=versions)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", says)
    assert not (tmp_path / ".matrix").exists()


@pytest.mark.skipif(Path("/opt/python").exists(), reason="Pythons that the script looks for")
def test_nothing_tested_is_no_success(tmp_path: Path) -> None:
    done = matrix(tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"skipped: {version} (no python{version} with venv)" for version in ("3.10", "3.11", "3.12")
    ]
    assert done.stderr == (
        "matrix: nothing was tested, for none of these Pythons is here; install one\n"
    )
