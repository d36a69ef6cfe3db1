"""The mathematics of a fair comparison: grids of equal size, the choice on dev, paired tests."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads this module without waiting for numpy
    import numpy as np

Values = Mapping[str, Sequence[float]]
RESAMPLES = 10_000
# Below this a paired t-test's p tells two losses apart.
SIGNIFICANT = 0.05
# One or two pairs say how far apart two losses are, not whether by chance.
FEWEST_PAIRS = 3
# Differences that spread by less than this share of the scores differ by rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Point:
    """One set of values to try: the learning rate and the loss's own settings."""

    lr: float
    settings: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class PairedComparison:
    """Scores a_i against b_i of the same seeds.

    ``difference`` is mean(a - b), ``relative`` the same over \\|mean(b)\\|, None where that is
    zero. ``low`` and ``high`` are the 2.5 and 97.5 % points of the bootstrap's means,
    ``bootstrap_p`` its two-sided p, ``t_p`` the paired t-test's. Both are None for fewer than
    three pairs, and where the differences are all equal but for rounding: neither test has a
    spread to go by then.
    """

    difference: float
    relative: float | None
    low: float
    high: float
    bootstrap_p: float | None
    t_p: float | None

    @property
    def told_apart(self) -> bool:
        """Whether the t-test tells the two apart, at the level of 5 %."""
        return self.t_p is not None and self.t_p < SIGNIFICANT


def refined(values: Sequence[float], count: int) -> list[float]:
    """Return the positive ``values``, sorted, with geometric means between them, ``count`` in all.

    Each new value halves, on a logarithmic scale, the widest gap; of equal gaps the lowest first.
    More values than ``count`` stay as they are, and so does a single one.
    """
    grid = sorted(set(values))
    gaps = [_gap(low, high) for low, high in itertools.pairwise(grid)]
    heapq.heapify(gaps)
    while len(grid) < count and gaps:
        _, low, high = heapq.heappop(gaps)
        # The product of very small rates is zero; that of others has the bits of published grids.
        product = low * high
        tiny = product < sys.float_info.min
        root = math.sqrt(low) * math.sqrt(high) if tiny else math.sqrt(product)
        middle = float(f"{root:.6g}")
        grid.append(middle)
        heapq.heappush(gaps, _gap(low, middle))
        heapq.heappush(gaps, _gap(middle, high))
    return sorted(grid)


def _gap(low: float, high: float) -> tuple[float, float, float]:
    """Return the gap between two values, so that the widest sorts first, of equal ones the lowest.

    It is rounded: equal ratios should be equal gaps.
    """
    return -round(math.log(high / low), 9), low, high


def grid_points(rates: Sequence[float], own: Values, count: int, seed: int = 0) -> list[Point]:
    """Return ``count`` points of the grid rates x own values, so that every loss gets as many.

    A grid that is too small gets rates in between; of one that is too large every combination of
    own values keeps the same number of rates, and every rate the same number of combinations (give
    or take one), drawn by ``seed``.
    """
    combinations = [
        tuple(zip(own, values, strict=True)) for values in itertools.product(*own.values())
    ]
    grid = refined(rates, math.ceil(count / len(combinations)))
    if len(grid) * len(combinations) <= count:
        return [Point(lr, settings) for settings in combinations for lr in grid]
    draw = random.Random(seed)
    draw.shuffle(grid)
    draw.shuffle(combinations)
    # Both go round and round; one place on where they would meet in the same pairs again.
    period = math.lcm(len(grid), len(combinations))
    points = [
        Point(grid[(i + i // period) % len(grid)], combinations[i % len(combinations)])
        for i in range(count)
    ]
    return sorted(points, key=lambda point: (point.settings, point.lr))


def best(scores: Mapping[Point, tuple[float, float] | None]) -> Point | None:
    """Return the point with the highest score, or None where all diverged.

    A score is the pair (what counts, what decides ties), higher is better, None a student that
    diverged. Remaining ties go to the lowest rate.
    """
    sound = {point: score for point, score in scores.items() if score is not None}
    if not sound:
        return None
    return max(sound, key=lambda point: (sound[point], -point.lr))


def at_edge(chosen: float, tried: Sequence[float], ratio: float = 1.0) -> str:
    """Return ``lowest`` or ``highest`` if ``chosen`` is that of several values, else ``""``.

    With a ``ratio`` above 1, for values tried along a range, so near to its end is at it.
    """
    if len(set(tried)) < 2:
        return ""
    if chosen <= min(tried) * ratio:
        return "lowest"
    return "highest" if chosen >= max(tried) / ratio else ""


def untried_sides(chosen: Point, points: Sequence[Point], rates: Sequence[float]) -> list[str]:
    """Return ``below`` and ``above`` where ``rates`` has some on that side, ``points`` none.

    That is none with the settings of ``chosen``. A grid that is too large leaves rates out: the
    best of those tried with some settings may be the last of them though it is within the grid.
    Without points, as of a search, nothing was left out.
    """
    alike = [point.lr for point in points if point.settings == chosen.settings]
    if not alike:
        return []
    below = any(lr < chosen.lr for lr in rates) and not any(lr < chosen.lr for lr in alike)
    above = any(lr > chosen.lr for lr in rates) and not any(lr > chosen.lr for lr in alike)
    return ["below"] * below + ["above"] * above


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample's standard deviation (n - 1), None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def counted(
    scores: Sequence[float | None], worst: float, lower_is_better: bool
) -> list[float]:
    """Return ``scores`` where a student that diverged, None, counts as the worst there can be.

    That is ``worst``, or the worst of the others where that is worse still: 1 - TER has no least
    value.
    """
    alive = [score for score in scores if score is not None]
    floor = max([worst, *alive]) if lower_is_better else min([worst, *alive])
    return [floor if score is None else score for score in scores]


def bootstrap_means(differences: Sequence[float], seed: int = 0) -> np.ndarray:
    """Return the means [10,000] of resamples, with replacement, of ``differences`` [n]."""
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    return np.asarray(values[drawn].mean(1))


def compare_paired(ours: Sequence[float], theirs: Sequence[float]) -> PairedComparison:
    """Compare two lists of scores of the same seeds, in the same order.

    The bootstrap resamples the seeds (Efron & Tibshirani 1993, chapter 13): its p is twice the
    smaller share of means on either side of zero, at most 1. One more counts on that side, so that
    no p is zero (Davison & Hinkley 1997, equation 4.11).
    """
    import numpy as np
    from scipy.stats import ttest_1samp

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    size = max(map(abs, [*ours, *theirs]))
    means = bootstrap_means(differences)
    means[abs(means) <= _ROUNDING * size] = 0.0  # on both sides of zero, as it is without rounding
    low, high = np.percentile(means, [2.5, 97.5])
    smaller = (1 + min(int((means <= 0).sum()), int((means >= 0).sum()))) / (1 + RESAMPLES)
    reference = mean(theirs)
    difference = mean(differences)
    testable = _testable(differences, size)
    return PairedComparison(
        difference=difference,
        relative=difference / abs(reference) if reference else None,
        low=float(low),
        high=float(high),
        bootstrap_p=min(1.0, 2.0 * smaller) if testable else None,
        t_p=float(ttest_1samp(differences, 0.0).pvalue) if testable else None,
    )


def _testable(differences: Sequence[float], size: float) -> bool:
    """Tell whether there are enough differences, of scores up to ``size``, and a spread of them."""
    spread = deviation(differences)
    enough = len(differences) >= FEWEST_PAIRS
    return enough and spread is not None and spread > _ROUNDING * size
