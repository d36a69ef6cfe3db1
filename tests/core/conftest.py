"""The toy students as a fixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from toy_students import STUDENTS, ToyStudent  # type: ignore[import-not-found]

from l2t_core.specs import OptimiserSpec


@pytest.fixture
def make_student() -> Callable[..., ToyStudent]:
    """Return a function (name, OptimiserSpec, **options) -> ToyStudent."""

    def make(name: str, optimiser: OptimiserSpec, **options: Any) -> ToyStudent:
        return ToyStudent(STUDENTS[name], optimiser, **options)

    return make
