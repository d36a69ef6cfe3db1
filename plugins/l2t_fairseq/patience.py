"""fairseq's count for ``--patience``, which it keeps in its process alone.

Killed and given again, a run would wait for a better dev score from the beginning once more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any


def waited() -> dict[str, float]:
    """Return the best dev score so far and the looks at dev since; empty without ``--patience``."""
    for check in _checks():
        if getattr(check, "best", None) is not None:
            return {"best": float(check.best), "num_runs": int(check.num_runs)}
    return {}


def go_on_waiting(state: Mapping[str, float]) -> None:
    """Take over what :func:`waited` returned in the process before."""
    for check in _checks():
        check.best, check.num_runs = state["best"], state["num_runs"]


def _checks() -> Iterator[Any]:
    """Yield the function of fairseq-train whose attributes hold the count."""
    for name in ("__main__", "fairseq_cli.train"):  # the first with python -m fairseq_cli.train
        check = getattr(sys.modules.get(name), "should_stop_early", None)
        if check is not None:
            yield check
