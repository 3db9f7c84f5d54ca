"""Scores of several sources become one: against TRL's own numbers and by hand; running scales; None and failures."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from rlhf.algorithms.groups import group_advantages, normalize_in_groups
from rlhf.algorithms.scores import weighted_scores
from rlhf.config.objective_config import MissingEosMode, ScoreConfig
from rlhf.config.reward_config import RewardCombination
from rlhf.rewards import RunningScale, ScoredSource, ScoreScale, ScoreShaping, reward_metrics

GOLDEN = json.loads((Path(__file__).parent / "golden/reward_combination.json").read_text())["cases"]
GROUPS = torch.arange(8) // 4
NAN, INF = math.nan, math.inf


def shaping(*sources, combination="sum", **score):
    return ScoreShaping(
        ScoreConfig(missing_eos_penalty=0.0, **score), sources, limit=10, combination=RewardCombination(combination)
    )


def paid(found, scores, *, ended=None, groups=GROUPS):
    rows = len(scores)
    ended = torch.ones(rows, dtype=torch.bool) if ended is None else ended
    return found.scores(scores, groups, ended=ended, lengths=torch.full((rows,), 3))


def golden(name):
    case = GOLDEN[name]
    rows = torch.tensor([[NAN if score is None else score for score in column] for column in case["scores"]]).T
    sources = [ScoredSource(name, weight) for name, weight in zip("ab", case["weights"], strict=True)]
    return rows, sources, torch.tensor(case["advantages"])


@pytest.mark.parametrize("case", ["whole", "with_none"])
def test_a_weighted_sum_gives_the_advantages_of_trl(case):
    scores, sources, expected = golden(f"{case}/sum_then_normalize")
    found = paid(shaping(*sources), scores)
    scored = ~found.isnan()
    advantages = group_advantages(found[scored], groups=GROUPS[scored], baseline="mean", scale="group", eps=1e-4)
    torch.testing.assert_close(advantages, expected[scored], rtol=0, atol=2e-6)
    assert expected[~scored].tolist() == [0.0] * int((~scored).sum())


@pytest.mark.parametrize("case", ["whole", "with_none"])
def test_sources_normalised_in_their_groups_give_the_advantages_of_trl(case):
    scores, sources, expected = golden(f"{case}/normalize_then_sum")
    found = paid(shaping(*sources, combination="normalized"), scores)
    scored = ~found.isnan()
    kept = found[scored]  # TRL goes on with the mean and the deviation of the batch
    torch.testing.assert_close((kept - kept.mean()) / (kept.std() + 1e-4), expected[scored], rtol=0, atol=2e-6)
    if case == "whole":  # groups then have mean 0, and advantages over a group are those over the batch
        ours = group_advantages(kept, groups=GROUPS, baseline="mean", scale="batch", eps=1e-4)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_a_source_is_normalised_over_those_it_applies_to_by_hand():
    scores = torch.tensor([[1.0, 7.0], [3.0, NAN], [NAN, NAN], [5.0, NAN], [0.1, 2.0], [0.1, 4.0]])
    found = normalize_in_groups(scores, torch.tensor([0, 0, 0, 0, 1, 1]), eps=0.0 + 1e-12)
    # 1, 3, 5: mean 3, sample deviation 2. A single one, and equal ones, give 0. 2, 4: deviation sqrt(2).
    expected = [[-1, 0], [0, NAN], [NAN, NAN], [1, NAN], [0, -(0.5**0.5)], [0, 0.5**0.5]]
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    assert weighted_scores(found, torch.tensor([2.0, -1.0])).isnan().tolist() == [False, False, True] + [False] * 3


def test_held_out_answers_are_not_normalised_over_each_other():
    scores, sources, _ = golden("whole/normalize_then_sum")
    found = shaping(*sources, combination="normalized")
    torch.testing.assert_close(paid(found, scores, groups=None), scores @ torch.tensor([1.0, 0.5]))


def test_each_source_has_its_own_units_and_no_penalty_makes_up_for_a_missing_score():
    model = ScoredSource("model", weight=2.0, scale=ScoreScale(mean=1.0, std=0.5), clamp=3.0)
    function = ScoredSource("function", weight=-1.0, clamp=3.5)  # not normalised
    found = shaping(model, function, missing_eos_mode=MissingEosMode.set)
    scores = torch.tensor([[2.0, 4.0], [9.0, NAN], [NAN, NAN], [1.0, INF], [1.5, 1.0]])
    ended = torch.tensor([True, True, False, False, False])
    result = paid(found, scores, ended=ended, groups=torch.arange(5))
    assert result[:2].tolist() == [2 * 2 - 3.5, 2 * 3]
    assert result[2].isnan()
    assert result[3] == INF
    assert result[4] == 0  # set: the penalty, of 0 here, replaces the score
    assert found.raw_scores(scores)[:2].tolist() == [2 * 2 - 4, 18]
    assert found.clamped_share(scores[:2]) == 1.0
    assert found.clamped_share(scores[[0, 4]]) == 0.5
    assert found.metrics(scores[:1]) == {"objective/clamped": 1.0, "objective/raw_scores": 0.0}
    assert shaping(ScoredSource("alone")).metrics(scores[:1, :1]) == {"objective/clamped": 0.0}


def test_a_failed_row_spoils_no_group():
    scores = torch.tensor([[0.0], [2.0], [INF], [4.0]])
    found = paid(shaping(ScoredSource("a"), combination="normalized"), scores, groups=torch.zeros(4).long())
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, INF, 1.0]), rtol=0, atol=1e-4)


def test_running_scales_are_those_of_all_scores_so_far_and_survive_a_checkpoint():
    batches = [torch.tensor([[0.5], [NAN], [2.0]]), torch.tensor([[100.0], [INF], [101.5]]), torch.tensor([[NAN]] * 3)]
    scale = RunningScale()
    found = shaping(ScoredSource("a", scale=scale))
    assert (scale.mean, scale.std) == (0.0, 1.0)
    for scores in batches:
        found.observe(scores)
    seen = [0.5, 2.0, 100.0, 101.5]
    assert scale.count == 4
    assert scale.mean == pytest.approx(statistics.mean(seen), rel=1e-12)
    assert scale.std == pytest.approx(statistics.stdev(seen), rel=1e-12)
    restored = shaping(ScoredSource("a", scale=RunningScale()), ScoredSource("b"))
    restored.load_state_dict(json.loads(json.dumps(found.state_dict())))
    assert restored.state_dict() == found.state_dict()
    assert restored.sources[0].scale == scale
    torch.testing.assert_close(
        paid(found, torch.tensor([[100.0]]), groups=None)[0],
        torch.tensor((100.0 - statistics.mean(seen)) / statistics.stdev(seen)),
    )


def test_equal_scores_so_far_divide_by_one():
    scale = RunningScale()
    scale.update(torch.tensor([3.0, 3.0]))
    assert (scale.mean, scale.std) == (3.0, 1.0)


def test_metrics_of_each_source_leave_none_and_failures_out():
    scores = torch.tensor([[1.0, NAN], [3.0, NAN], [NAN, NAN], [INF, NAN]])
    assert reward_metrics(["a", "b"], scores) == {
        "reward/a": 2.0,
        "reward/a/std": pytest.approx(2**0.5),
        "reward/a/none": 0.25,
        "reward/b/none": 1.0,
    }
