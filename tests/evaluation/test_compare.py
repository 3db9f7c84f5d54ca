"""What an evaluation says, against numbers worked by hand."""

import math

import pytest

from rlhf.algorithms.intervals import wilson
from rlhf.evaluation.compare import (
    MEASURES,
    ModelAnswers,
    PairScores,
    mean_preferences,
    measures,
    reward_model_quality,
    win_rate,
)
from rlhf.evaluation.judges import Judgement

MODEL = ModelAnswers(
    ("a b", "a b", "c d e", "f"),
    {"normalized_score": [2.0, 4.0, 6.0, 8.0], "gold/x": [1.0] * 4, "not_ended": [1.0, 0.0, 0.0, 0.0]},
    losses=[(2 * math.log(8), 2.0), (1 * math.log(2), 1.0), (0.0, 0.0)],
)
BASELINE = ModelAnswers(
    ("a", "b", "c", "d"),
    {"normalized_score": [1.0, 3.0, 5.0, 7.0], "gold/x": [3.0] * 4, "not_ended": [0.0] * 4},
    losses=[(2 * math.log(4), 2.0), (1 * math.log(4), 1.0), (0.0, 0.0)],
)


def named(rows):
    return {row["name"]: row for row in rows}


def test_means_shares_and_differences():
    found = named(measures({"model": MODEL, "baseline": BASELINE}, seed=0))
    assert (found["normalized_score"]["model"]["mean"], found["normalized_score"]["baseline"]["mean"]) == (5.0, 4.0)
    # the same prompts: the answers differ by 1 in every one of them, so there is nothing to doubt
    assert found["normalized_score"]["difference"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 4}
    assert found["normalized_score"]["model"]["low"] < 5 < found["normalized_score"]["model"]["high"]
    share = wilson(1, 4)
    assert (found["not_ended"]["model"]["low"], found["not_ended"]["model"]["high"]) == (share.low, share.high)
    assert found["gold/x"]["meaning"] == MEASURES["gold/*"][1]


def test_a_score_that_is_not_finite_is_left_out_of_means_and_of_differences_and_said(caplog):
    broken = ModelAnswers(
        BASELINE.texts, BASELINE.numbers | {"normalized_score": [1.0, math.nan, math.inf, 9.0]}, BASELINE.losses
    )
    found = named(measures({"model": MODEL, "baseline": broken}, seed=0))["normalized_score"]
    assert (found["model"]["mean"], found["model"]["count"]) == (5.0, 4)
    assert (found["baseline"]["mean"], found["baseline"]["count"]) == (5.0, 2)  # 1 and 9
    assert (found["difference"]["mean"], found["difference"]["count"]) == (0.0, 2)  # 2 - 1 and 8 - 9
    assert "baseline: left out 2 of 4 responses whose normalized_score is not finite" in caplog.text


def test_diversity_is_counted_over_all_responses():
    found = named(measures({"model": MODEL}, seed=0))
    assert found["distinct_1"]["model"] == {"mean": 6 / 8}
    assert found["distinct_2"]["model"] == {"mean": 3 / 4}  # a b twice, c d, d e
    assert found["repeated"]["model"] == {"mean": 2 / 4}
    assert "difference" not in found["normalized_score"]
    assert "baseline" not in found["distinct_1"]


def test_perplexity_is_per_token_and_not_per_demonstration():
    found = named(measures({"model": MODEL, "baseline": BASELINE}, seed=0))["perplexity"]
    assert found["model"]["mean"] == pytest.approx((8 * 8 * 2) ** (1 / 3))
    assert found["baseline"]["mean"] == pytest.approx(4.0)
    assert (found["model"]["low"], found["model"]["high"]) == (pytest.approx(2), pytest.approx(8))
    assert found["model"]["count"] == 2  # a demonstration without a target says nothing


def test_intervals_do_not_depend_on_the_order_in_which_ranks_come():
    losses = [(float(n * n % 13), float(1 + n % 4)) for n in range(20)]
    first, then = (
        ModelAnswers(MODEL.texts, MODEL.numbers, losses=order) for order in (losses, losses[1::2] + losses[::2])
    )
    assert (
        named(measures({"model": first}, seed=0))["perplexity"]
        == named(measures({"model": then}, seed=0))["perplexity"]
    )
    nats, zeros = [nats for nats, _ in losses], [0.0] * 20
    one, two = (
        reward_model_quality(PairScores(scores, zeros, [""] * 20), seed=0) for scores in (nats, nats[1::2] + nats[::2])
    )
    assert one["margin"] == two["margin"]


LENGTHS = [(9, 1), (9, 1), (1, 9), (5, 5), (1, 9)]


def test_ties_count_half_and_pairs_that_were_not_judged_not_at_all():
    found = win_rate([Judgement(0, 1.0), Judgement(1, -0.5), Judgement(2, 0.0), Judgement(3, 0.1)], lengths=LENGTHS)
    assert [found[key] for key in ("pairs", "judged", "wins", "ties", "losses")] == [5, 4, 2, 1, 1]
    expected = wilson(2.5, 4)
    assert (found["win_rate"]["mean"], found["win_rate"]["low"]) == (0.625, expected.low)
    assert found["win_rate_when_longer"]["mean"] == 0.5  # pairs 0 and 1
    assert found["win_rate_when_shorter"]["mean"] == 0.5  # pair 2, a tie
    # of pairs 0 and 1 the longer one wins one; 2 is a tie, and 3 has no longer one
    assert (found["longer_wins"]["mean"], found["longer_wins"]["count"]) == (0.5, 2)
    assert "first_wins" not in found


def test_a_judge_who_goes_by_length_is_seen():
    judgements = [
        Judgement(row, float((ours > theirs) - (ours < theirs))) for row, (ours, theirs) in enumerate(LENGTHS)
    ]
    found = win_rate(judgements, lengths=LENGTHS)
    assert found["longer_wins"]["mean"] == 1.0
    assert (found["win_rate_when_longer"]["mean"], found["win_rate_when_shorter"]["mean"]) == (1.0, 0.0)


def test_a_judge_who_prefers_what_comes_first_decides_nothing_and_is_seen():
    judgements = [Judgement(row, 1.0 if first else -1.0, first) for first in (True, False) for row in range(4)]
    found = win_rate(judgements, lengths=LENGTHS[:4])
    assert (found["wins"], found["ties"], found["losses"]) == (0, 4, 0)
    assert found["first_wins"]["mean"] == 1.0
    assert found["inconsistent"]["mean"] == 1.0
    assert mean_preferences(judgements, count=5) == [0.0, 0.0, 0.0, 0.0, None]


def test_a_judge_without_a_bias_for_places_is_consistent():
    judgements = [Judgement(row, 1.0 if row < 3 else -1.0, first) for first in (True, False) for row in range(4)]
    found = win_rate(judgements, lengths=LENGTHS[:4])
    assert (found["wins"], found["losses"]) == (3, 1)
    assert found["first_wins"]["mean"] == 0.5
    assert found["inconsistent"]["mean"] == 0.0


def test_a_tie_in_one_order_and_a_win_in_the_other_is_a_win_and_no_contradiction():
    found = win_rate([Judgement(0, 0.0, True), Judgement(0, 1.0, False)], lengths=LENGTHS[:1])
    assert (found["wins"], found["inconsistent"]["mean"]) == (1, 0.0)


def test_nothing_judged_is_no_win_rate():
    found = win_rate([], lengths=LENGTHS)
    assert found["judged"] == 0
    assert math.isnan(found["win_rate"]["mean"])


def test_a_reward_model_is_examined_by_subset():
    chosen, rejected = [3.0, 1.0, 5.0, 2.0], [1.0, 2.0, 1.0, 2.0]  # differences 2, -1, 4, 0
    found = reward_model_quality(PairScores(chosen, rejected, ["easy", "hard", "easy", ""]), seed=0)
    assert (found["accuracy"]["mean"], found["margin"]["mean"]) == (0.5, 1.25)
    assert list(found["subsets"]) == ["(none)", "easy", "hard"]
    assert found["subsets"]["easy"]["accuracy"]["mean"] == 1.0
    assert found["subsets"]["easy"]["margin"]["mean"] == 3.0
    assert found["subsets"]["(none)"]["accuracy"]["mean"] == 0.0  # a tie is an error


def test_without_subsets_there_are_none_and_calibration_is_there():
    size = math.log(3) * 2
    found = reward_model_quality(PairScores([size] * 3 + [0.0], [0.0] * 3 + [size], [""] * 4), seed=0)
    assert found["subsets"] == {}
    calibration = found["calibration"]
    assert calibration["temperature"] == pytest.approx(2.0)  # right in 3 of 4: sigmoid(log 3)
    assert calibration["error"] == pytest.approx(0.15)  # claims 9 of 10
    assert calibration["error_at_temperature"] == pytest.approx(0.0, abs=1e-9)
    assert calibration["loss_at_temperature"] < calibration["loss"]
    (row,) = calibration["bins"]
    assert (row["confidence"], row["right"]["mean"], row["right"]["count"]) == (pytest.approx(0.9), 0.75, 4)


def test_a_reward_model_that_is_always_right_has_no_temperature():
    calibration = reward_model_quality(PairScores([1.0, 2.0], [0.0, 0.0], ["", ""]), seed=0)["calibration"]
    assert calibration["temperature"] is None
    assert "loss_at_temperature" not in calibration
