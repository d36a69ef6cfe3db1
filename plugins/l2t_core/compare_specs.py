"""The ``compare`` section of a recipe: which losses, which grids, how many trials and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LabelSmoothingGrid:
    """Values to try for the share ``eps`` of the uniform distribution in the targets."""

    eps: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2])


@dataclass
class LargeMarginGrid:
    """Values to try for L-Softmax's ``margin`` m and its smallest annealing ``lambda_min``."""

    margin: list[int] = field(default_factory=lambda: [2, 3, 4])
    lambda_min: list[float] = field(default_factory=lambda: [5.0])


@dataclass
class FocalGrid:
    """Values to try for the focal loss's exponent ``gamma``."""

    gamma: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])


@dataclass
class GceGrid:
    """Values to try for generalised cross-entropy's ``q``, between CE (0) and 1 - p (1)."""

    q: list[float] = field(default_factory=lambda: [0.1, 0.4, 0.7])


@dataclass
class LogitAdjustedGrid:
    """Values to try for ``tau``, by which the classes' log-shares are multiplied."""

    tau: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5])


@dataclass
class SigmoidGrid:
    """Values to try for the sigmoid form's ``warmup`` (a fraction of T) and CE share ``mix``."""

    warmup: list[float] = field(default_factory=lambda: [0.1])
    mix: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.5])


@dataclass
class MrtGrid:
    """Values to try for minimum risk training: the ``share`` of the updates that it takes at the
    end, the weight ``mix`` of cross-entropy in it, candidates (``samples``), sharpness ``alpha``.
    """

    share: list[float] = field(default_factory=lambda: [0.25])
    mix: list[float] = field(default_factory=lambda: [0.1, 0.5])
    samples: list[int] = field(default_factory=lambda: [8])
    alpha: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class CompareSpec:
    """How losses are compared (``l2t compare``).

    ``losses`` are names of fixed losses, ``teachers`` teacher files. ``lr`` is the grid of
    learning rates for every loss (empty: the recipe's rate times 1/4, 1/2, 1, 2, 4). Each loss
    gets ``trials`` tries on dev, over ``tuning_seeds`` seeds each, by ``search`` grid or optuna,
    and is judged by ``tune_on``: measure (dev accuracy or BLEU) or nll. The final students have
    ``seeds`` seeds from ``seed`` on. The sections below hold each loss's own grid.
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
    label_smoothing: LabelSmoothingGrid = field(default_factory=LabelSmoothingGrid)
    large_margin: LargeMarginGrid = field(default_factory=LargeMarginGrid)
    focal: FocalGrid = field(default_factory=FocalGrid)
    gce: GceGrid = field(default_factory=GceGrid)
    logit_adjusted: LogitAdjustedGrid = field(default_factory=LogitAdjustedGrid)
    sigmoid: SigmoidGrid = field(default_factory=SigmoidGrid)
    mrt: MrtGrid = field(default_factory=MrtGrid)
