"""Intervals and calibration against numbers worked by hand and against closed forms."""

import math
import statistics

import pytest
import torch

from rlhf.algorithms.intervals import Interval, Z, share_change, wilson
from rlhf.algorithms.statistics import (
    bootstrap_mean,
    expected_calibration_error,
    fitted_temperature,
    preference_nll,
    reliability,
)


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


def pairs(size, *, right, wrong):
    """Differences of one size, right in so many pairs and wrong in so many."""
    return torch.tensor([size] * right + [-size] * wrong, dtype=torch.float64)


def test_one_confidence_is_one_bin():
    size = math.log(3)  # sigmoid is 3/4
    (only,) = reliability(pairs(size, right=6, wrong=4))
    assert (only.count, only.right) == (10, 6)
    assert only.confidence == pytest.approx(0.75)
    assert (only.low, only.high) == (pytest.approx(0.75), pytest.approx(0.8))
    assert expected_calibration_error([only]) == pytest.approx(0.15)


def test_errors_of_bins_are_weighed_by_their_pairs():
    sure, unsure = pairs(math.log(9), right=3, wrong=1), pairs(math.log(1.5), right=6, wrong=6)  # 0.9 and 0.6
    found = expected_calibration_error(reliability(torch.cat([sure, unsure])))
    assert found == pytest.approx((4 * 0.15 + 12 * 0.1) / 16)


def test_a_model_that_is_as_sure_as_right_has_no_error():
    table = reliability(torch.cat([pairs(math.log(3), right=3, wrong=1), pairs(math.log(9), right=9, wrong=1)]))
    assert expected_calibration_error(table) == pytest.approx(0.0)


def test_the_table_is_that_of_both_orders_of_every_pair():
    # each pair both ways round, labels 1 and 0, over the whole range of probabilities: no side is the favoured one
    differences = torch.randn(300, dtype=torch.float64) + 0.3
    both = torch.cat([differences, -differences]).sigmoid()
    labels = torch.cat([torch.ones(300), torch.zeros(300)]).double()
    places = (both * 20).long().clamp(max=19)
    error = sum(float((labels - both)[places == place].sum().abs()) for place in range(20)) / 600
    assert expected_calibration_error(reliability(differences)) == pytest.approx(error)


def test_ties_are_half_right_and_the_surest_pair_has_a_bin():
    table = reliability(torch.tensor([0.0, 0.0, 100.0]))
    assert [(row.count, row.right) for row in table] == [(2, 1.0), (1, 1.0)]
    assert table[-1].high == 1.0


@pytest.mark.parametrize(("size", "right", "wrong"), [(2.0, 3, 1), (0.5, 9, 1), (0.01, 3, 2)])
def test_the_temperature_makes_one_confidence_right(size, right, wrong):
    # sigmoid(size / T) = right / all, so T = size / log(right / wrong)
    assert fitted_temperature(pairs(size, right=right, wrong=wrong)) == pytest.approx(size / math.log(right / wrong))


def test_no_other_temperature_is_better():
    differences = torch.randn(200) * 4 + 1
    best = fitted_temperature(differences)
    losses = [preference_nll(differences, temperature=best * factor) for factor in (0.98, 1.0, 1.02)]
    assert losses[1] == min(losses)
    assert best > 1


@pytest.mark.parametrize("differences", [[1.0, 2.0], [-1.0, 0.5], [], [0.0, 0.0]])
def test_where_no_temperature_is_best_there_is_none(differences):
    assert fitted_temperature(torch.tensor(differences)) is None


def test_the_loss_of_a_model_that_knows_nothing_is_a_bit():
    assert preference_nll(torch.zeros(3)) == pytest.approx(math.log(2))
