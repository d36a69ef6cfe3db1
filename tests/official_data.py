"""Official data sets, read where the environment says that they lie: ``MNIST=FOLDER make test``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def folder_of(name: str) -> Path:
    """Return the folder that the environment variable ``name`` names."""
    return Path(os.environ[name]).absolute()


def needs(name: str) -> pytest.MarkDecorator:
    """Return the mark of a test that reads ``folder_of(name)``."""
    return pytest.mark.skipif(
        not os.environ.get(name), reason=f"{name}=FOLDER names a copy of the official files"
    )
