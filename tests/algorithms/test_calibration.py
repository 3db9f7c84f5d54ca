"""Calibration against closed forms: what a coin of known sides would give."""

import math

import pytest
import torch

from rlhf.algorithms.calibration import expected_calibration_error, fitted_temperature, preference_nll, reliability


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
