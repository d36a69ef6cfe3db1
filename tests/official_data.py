"""Official data sets: where the environment says (``MNIST=FOLDER make test``), or beside us."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkout import ROOT  # type: ignore[import-not-found]


def folder_of(name: str) -> Path:
    """Return the folder that the environment variable ``name`` names, or shared/data's."""
    beside = ROOT.parent / "shared" / "data" / name.lower()
    return Path(os.environ.get(name) or beside).absolute()


def needs(name: str) -> pytest.MarkDecorator:
    """Return the mark of a test that reads ``folder_of(name)``."""
    return pytest.mark.skipif(
        not folder_of(name).is_dir(), reason=f"{name}=FOLDER names a copy of the official files"
    )
