"""The ``compare`` section of a recipe: which losses, which grids, how many trials and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from functools import partial
from typing import Any

from l2t_core.losses.baselines import BASELINES, Baseline


@dataclass
class CompareSpec:
    """How losses are compared (``l2t compare``).

    ``losses`` are names of fixed losses, ``teachers`` teacher files. ``lr`` is the grid of
    learning rates for every loss (empty: the recipe's rate times 1/4, 1/2, 1, 2, 4). Each loss
    gets ``trials`` tries on dev, over ``tuning_seeds`` seeds each, by ``search`` grid or optuna,
    and is judged by ``tune_on``: measure (dev accuracy or BLEU) or nll. The final students have
    ``seeds`` seeds from ``seed`` on. :data:`CompareSection` adds each loss's own grid.
    """

    losses: list[str] = field(default_factory=lambda: ["cross_entropy", "label_smoothing"])
    teachers: list[str] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    trials: int = 12
    tuning_seeds: int = 1
    search: str = "grid"
    tune_on: str = "measure"
    seeds: int = 5
    seed: int = 1


def _grid(name: str, baseline: Baseline) -> type:
    """Return the section of a loss: a list of values to try for each of its settings."""
    lists: list[tuple[str, type, Any]] = [
        (key, list[int] if setting.whole else list[float],
         field(default_factory=partial(list, setting.grid)))
        for key, setting in baseline.settings.items()
    ]
    title = "".join(word.title() for word in name.split("_"))
    return make_dataclass(f"{title}Grid", lists, namespace={"__module__": __name__})


def _grids() -> dict[str, type]:
    """Return the sections of all losses that have settings, by name."""
    every = {name: BASELINES.get(name) for name in BASELINES.names()}
    return {name: _grid(name, baseline) for name, baseline in every.items() if baseline.settings}


GRIDS = _grids()
# The processes that train are sent a recipe: pickle looks for its classes here.
globals().update({grid.__name__: grid for grid in GRIDS.values()})
# The section as recipes have it: a section for each loss below that of all.
CompareSection: type[CompareSpec] = make_dataclass(
    "CompareSection",
    [(name, grid, field(default_factory=grid)) for name, grid in GRIDS.items()],
    bases=(CompareSpec,),
    namespace={"__module__": __name__},
)
