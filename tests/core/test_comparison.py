"""Grids, choices and tests of a comparison against scipy and values worked out by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from l2t_core.comparing import statistics
from l2t_core.comparing.statistics import (
    Point,
    at_edge,
    best,
    bootstrap_means,
    compare_paired,
    counted,
    deviation,
    grid_points,
    mean,
    refined,
    untried_sides,
)

OURS = [2.1, 1.9, 2.4, 2.0, 2.2]
THEIRS = [2.3, 2.2, 2.4, 2.5, 2.1]


def test_t_test_is_scipys() -> None:
    assert compare_paired(OURS, THEIRS).t_p == pytest.approx(
        stats.ttest_rel(OURS, THEIRS).pvalue, rel=1e-12
    )
    # By hand: differences -1, 1, 3: mean 1, deviation 2, t = sqrt(3)/2, two degrees of freedom,
    # of which the distribution is 1/2 + t / (2 sqrt(2 + t^2)).
    t = 3**0.5 / 2
    by_hand = 2 * (0.5 - t / (2 * (2 + t * t) ** 0.5))
    assert compare_paired([0.0, 2.0, 4.0], [1.0, 1.0, 1.0]).t_p == pytest.approx(by_hand)


def test_bootstrap_agrees_with_scipys_and_with_all_resamples() -> None:
    found = compare_paired(OURS, THEIRS)
    differences = np.subtract(OURS, THEIRS)
    theirs = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, abs=0.02)
    assert found.high == pytest.approx(theirs.high, abs=0.02)
    grid = np.stack(np.meshgrid(*[differences] * 5), -1).reshape(-1, 5).mean(1)  # all 5^5
    share = min((grid <= 1e-12).mean(), (grid >= -1e-12).mean())
    assert found.bootstrap_p == pytest.approx(2 * share, abs=0.01)
    means = bootstrap_means(differences.tolist())
    assert means.shape == (10_000,) and abs(means.mean() - differences.mean()) < 0.01


def test_rounding_does_not_choose_a_side_of_zero() -> None:
    """Tenths that cancel, as 1.1 - 1.0 and 4.0 - 4.1, do not quite: 2e-15 is left of them."""
    tenths = compare_paired([1.1, 4.0, 7.3, 2.2], [1.0, 4.1, 7.1, 2.1])
    whole = compare_paired([11, 40, 73, 22], [10, 41, 71, 21])
    assert tenths.bootstrap_p == whole.bootstrap_p


def test_differences_in_numbers_and_relative_to_the_reference() -> None:
    found = compare_paired([1.0, 2.0], [2.0, 4.0])
    assert found.difference == -1.5 and found.relative == pytest.approx(-0.5)
    assert compare_paired([1.0], [0.0]).relative is None
    assert compare_paired([1.0], [2.0]).t_p is None


def test_without_a_spread_of_the_differences_there_is_no_p() -> None:
    same = compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.t_p, same.bootstrap_p, same.low, same.high) == (None, None, 0.0, 0.0)
    apart = compare_paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (apart.t_p, apart.bootstrap_p, apart.difference) == (None, None, 1.0)
    # 0.1 each, but for rounding; a spread of a tenth of that is one.
    rounded = compare_paired([3.3, 3.5, 4.1], [3.2, 3.4, 4.0])
    assert rounded.t_p is None and not rounded.told_apart
    assert compare_paired([3.3, 3.51, 4.1], [3.2, 3.4, 4.0]).told_apart


def test_five_per_cent_tell_apart() -> None:
    theirs = [1.0, 2.0, 3.0, 4.0, 5.0]
    for steps, least, most in (([2, 3, 1, 5, 0], 0.05, 0.1), ([2, 3, 1, 5, 1], 0.02, 0.05)):
        found = compare_paired([a + b for a, b in zip(theirs, steps, strict=True)], theirs)
        assert found.t_p is not None and least < found.t_p < most
        assert found.told_apart == (most == 0.05)


def test_no_number_of_resamples_makes_a_p_of_zero() -> None:
    """Of 10,000 none is on the other side of zero; the differences themselves count as one more."""
    found = compare_paired([3.1, 3.2, 3.4, 3.8], [1.0, 1.0, 1.0, 1.0])
    assert found.low > 0.0 and found.bootstrap_p == pytest.approx(2 / 10_001)


def test_a_student_that_diverged_counts_as_the_worst_there_is() -> None:
    assert counted([3.0, None], 100.0, lower_is_better=True) == [3.0, 100.0]
    assert counted([30.0, None], 0.0, lower_is_better=False) == [30.0, 0.0]
    # 1 - TER is below zero where more is wrong than there are words.
    assert counted([30.0, -5.0, None], 0.0, lower_is_better=False) == [30.0, -5.0, -5.0]
    assert counted([130.0, None], 100.0, lower_is_better=True) == [130.0, 130.0]


def test_two_pairs_are_too_few_for_a_p() -> None:
    for ours in ([2.0, 3.0], [2.0, 3.001]):
        two = compare_paired(ours, [1.0, 2.0])
        assert two.t_p is None and two.bootstrap_p is None and not two.told_apart


def test_mean_and_deviation_are_numpys() -> None:
    assert mean(OURS) == pytest.approx(np.mean(OURS))
    assert deviation(OURS) == pytest.approx(np.std(OURS, ddof=1))
    assert deviation([1.0]) is None


def test_refined_grids_halve_the_widest_gap() -> None:
    assert refined([0.4, 0.1], 3) == [0.1, 0.2, 0.4]
    assert refined([0.1, 0.2, 0.8], 4) == [0.1, 0.2, 0.4, 0.8]
    assert refined([0.1, 0.4, 1.6], 5) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])
    assert refined([0.3, 0.1, 0.2, 0.1], 2) == [0.1, 0.2, 0.3]
    assert refined([0.1], 5) == [0.1]
    assert refined([1e-200, 1e-190], 4) == [1e-200, 3.16228e-198, 1e-195, 1e-190]
    grid = refined([0.05, 0.1, 0.2, 0.4], 12)
    assert len(grid) == len(set(grid)) == 12 and (grid[0], grid[-1]) == (0.05, 0.4)


def test_a_large_grid_is_refined_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gap is looked at when it comes about, not all for each new value."""
    looks, gap = [], statistics._gap
    monkeypatch.setattr(statistics, "_gap", lambda *given: looks.append(given) or gap(*given))
    grid = refined([0.05, 0.1, 0.2, 0.4], 10_000)
    assert len(looks) < 2 * len(grid)
    assert len(grid) == 10_000 and grid == sorted(grid)
    ratios = [high / low for low, high in itertools.pairwise(grid)]
    assert max(ratios) < 1.001


def test_every_loss_gets_as_many_points() -> None:
    rates = [0.05, 0.1, 0.2, 0.4]
    plain = grid_points(rates, {}, 12)
    smoothed = grid_points(rates, {"eps": [0.05, 0.1, 0.2]}, 12)
    large = {"margin": [2.0, 3.0, 4.0], "lambda_min": [0.0, 5.0]}
    thinned = grid_points(rates, large, 12)
    assert len(set(plain)) == len(set(smoothed)) == len(set(thinned)) == 12
    assert {p.lr for p in smoothed} == set(rates)
    assert Counter(p.settings for p in thinned).most_common()[-1][1] == 2  # 6 x 2
    assert thinned == grid_points(rates, large, 12) != grid_points(rates, large, 12, seed=1)
    assert grid_points([0.1, 0.2], {"eps": [0.1]}, 2)[0] == Point(0.1, (("eps", 0.1),))


@pytest.mark.parametrize(("rates", "settings"), [(4, 6), (4, 3), (6, 4), (3, 3), (5, 1), (1, 5)])
def test_few_points_are_spread_over_rates_and_settings_alike(rates: int, settings: int) -> None:
    own = {"q": [float(i) for i in range(settings)]}
    for count, seed in itertools.product(range(2, rates * settings), range(3)):
        if count < settings:  # then there is no full round; each has one at most
            continue
        points = grid_points([0.1 * 2**i for i in range(rates)], own, count, seed)
        assert len(set(points)) == len(points) >= count
        for of in (Counter(p.lr for p in points), Counter(p.settings for p in points)):
            assert max(of.values()) - min(of.values()) <= 1
        assert len({p.lr for p in points}) >= min(rates, count)


def test_the_best_point_ties_and_divergence() -> None:
    low, middle, high = (Point(lr) for lr in (0.1, 0.2, 0.4))
    assert best({low: (0.9, -1.0), middle: (0.95, -2.0), high: None}) == middle
    assert best({low: (0.9, -1.0), middle: (0.9, -0.5)}) == middle
    assert best({middle: (0.9, -1.0), low: (0.9, -1.0)}) == low
    assert best({low: None, high: None}) is None


def test_edges() -> None:
    assert at_edge(0.1, [0.2, 0.1]) == "lowest" and at_edge(0.2, [0.2, 0.1]) == "highest"
    assert at_edge(0.2, [0.1, 0.2, 0.4]) == "" and at_edge(0.1, [0.1, 0.1]) == ""
    assert at_edge(0.104, [0.1, 0.4], ratio=1.05) == "lowest"
    assert at_edge(0.39, [0.1, 0.4], ratio=1.05) == "highest"
    assert at_edge(0.11, [0.1, 0.4], ratio=1.05) == ""


def test_rates_that_were_left_out_beside_the_best_are_told() -> None:
    low, high = (("eps", 0.1),), (("eps", 0.2),)
    points = [
        *(Point(lr, low) for lr in (0.1, 0.2)), *(Point(lr, high) for lr in (0.05, 0.1, 0.4))
    ]
    rates = [0.05, 0.1, 0.2, 0.4]
    assert untried_sides(Point(0.2, low), points, rates) == ["above"]
    assert untried_sides(Point(0.1, low), points, rates) == ["below"]
    assert untried_sides(Point(0.1, high), points, rates) == []
    # The end of the grid is told elsewhere.
    assert untried_sides(Point(0.4, high), points, rates) == []
    one = [Point(0.1, low), *points[2:]]
    assert untried_sides(Point(0.1, low), one, rates) == ["below", "above"]
    assert untried_sides(Point(0.1, low), [], rates) == []


def test_a_rate_that_was_tried_with_no_settings_at_all_is_left_out_too() -> None:
    """Of few points none may have the lowest rates."""
    rates, own = [0.02, 0.1, 0.5, 2.5], {"q": [0.05, 0.1, 0.15]}
    points = [Point(2.5, (("q", q),)) for q in own["q"]] + [Point(0.5, (("q", 0.05),))]
    assert untried_sides(points[-1], points, rates) == ["below"]
    # As few as that are drawn with every rate once.
    assert sorted(point.lr for point in grid_points(rates, own, 4)) == rates
