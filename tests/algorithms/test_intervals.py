"""Intervals against numbers worked by hand and against closed forms."""

import math
import statistics

import pytest
import torch

from rlhf.algorithms.intervals import Interval, Z, bootstrap_mean, share_change, wilson


def test_z_is_the_quantile_of_the_normal_distribution():
    assert pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-12) == Z


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, count, low, high):
    found = wilson(successes, count)
    assert found.mean == successes / count
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(
    ("after", "before", "low", "high"),
    [
        # Newcombe 1998, "Interval estimation for the difference between independent proportions", table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_the_change_of_a_share_has_the_published_intervals(after, before, low, high):
    found = share_change(wilson(*before), wilson(*after))
    assert found.mean == pytest.approx(after[0] / after[1] - before[0] / before[1])
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_solves_its_own_equation():
    # the bounds are where the normal test of the share is just not significant: (p - x)^2 = z^2 x (1 - x) / n
    found = wilson(6.5, 10)
    for bound in (found.low, found.high):
        assert (0.65 - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / 10)


def test_shares_of_all_and_of_nothing_end_where_shares_end():
    assert (wilson(7, 7).high, wilson(0, 7).low) == (1.0, 0.0)
    assert wilson(7, 7).low < 1
    assert math.isnan(wilson(0, 0).mean)
    assert wilson(0, 0).count == 0


def test_a_bootstrap_of_two_values_has_three_means():
    # both zero, mixed, both one: 1/4, 1/2, 1/4, so that 2.5% and 97.5% are the ends
    found = bootstrap_mean(torch.tensor([0.0, 1.0]), seed=3)
    assert found == Interval(mean=0.5, low=0.0, high=1.0, count=2)


def test_a_bootstrap_of_many_values_is_the_normal_interval():
    values = torch.randn(4_000, dtype=torch.float64) * 3 + 1
    found = bootstrap_mean(values, seed=0)
    half = Z * float(values.std()) / math.sqrt(len(values))
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


def test_a_bootstrap_is_seeded_and_needs_values():
    values = torch.arange(9.0)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    assert math.isnan(bootstrap_mean(values[:0], seed=1).low)


def test_a_weighted_bootstrap_is_the_mean_of_what_it_weighs():
    # 9 and 3 weigh 1 and 3: means of samples are 9, (9 + 9) / 4 and 3
    found = bootstrap_mean(torch.tensor([9.0, 3.0]), seed=3, weights=torch.tensor([1.0, 3.0]))
    assert found == Interval(mean=4.5, low=3.0, high=9.0, count=2)
