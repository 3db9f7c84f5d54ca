import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.algorithms.groups import group_advantages, groups_that_differ

KINDS = {
    "grpo": {"baseline": "mean", "scale": "group"},
    "dr_grpo": {"baseline": "mean", "scale": "none"},
    "batch": {"baseline": "mean", "scale": "batch"},
    "rloo": {"baseline": "others", "scale": "none"},
}


def advantages(scores, *, kind, group_size=3, groups=None, eps=1e-4):
    """Advantages where consecutive rows form a group, unless `groups` says otherwise."""
    groups = torch.arange(len(scores)) // group_size if groups is None else groups
    return group_advantages(scores, groups=groups, **KINDS[kind], eps=eps)


SCORES = tensor([1.0, 2.0, 6.0, 5.0, 5.0, 8.0])  # two groups of three with means 3 and 6


def test_grpo_by_hand():
    # Sample std: sqrt((4 + 1 + 9) / 2) = sqrt 7 and sqrt((1 + 1 + 4) / 2) = sqrt 3.
    expected = tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-4), tensor([-1.0, -1.0, 2.0]) / (3**0.5 + 1e-4)
    assert_close(advantages(SCORES, group_size=3, kind="grpo"), torch.cat(expected), rtol=1e-6, atol=0)


def test_grpo_adds_eps_to_the_std():
    # Scores 0 and 2: mean 1, sample std sqrt 2.
    found = advantages(tensor([0.0, 2.0]), group_size=2, kind="grpo", eps=1.0)
    assert_close(found, tensor([-1.0, 1.0]) / (math.sqrt(2) + 1))


def test_dr_grpo_by_hand():
    found = advantages(SCORES, group_size=3, kind="dr_grpo")
    assert_close(found, tensor([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]))


def test_rloo_by_hand():
    # Minus the mean of the others: 1 - 4, 2 - 3.5, 6 - 1.5; 5 - 6.5, 5 - 6.5, 8 - 5.
    found = advantages(SCORES, group_size=3, kind="rloo")
    assert_close(found, tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", [0.1, -7.3, 1e4])
def test_equal_scores_give_exactly_zero(kind, dtype, score):
    scores = torch.full((6,), score, dtype=dtype, requires_grad=True)
    found = advantages(scores, group_size=3, kind=kind)
    assert found.tolist() == [0.0] * 6
    assert found.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_sum_to_zero_in_each_group_and_ignore_a_shift(kind):
    scores = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = advantages(scores, group_size=4, kind=kind)
    assert_close(found.view(3, 4).sum(-1), torch.zeros(3, dtype=torch.float64))
    assert_close(advantages(scores + 9, group_size=4, kind=kind), found)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_groups_do_not_see_each_other(kind):
    found = advantages(SCORES, group_size=3, kind=kind)
    assert_close(found[3:], advantages(SCORES[3:], group_size=3, kind=kind))


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_that_has_lost_members_is_compared_without_them(kind):
    # 3, 3 and 3 are left of one group, 1, 2 and 6 of another, and one response is alone; in no particular order.
    scores = tensor([3.0, 1.0, 3.0, 9.0, 2.0, 3.0, 6.0])
    groups = tensor([7, 40, 7, 2, 40, 7, 40])
    found = advantages(scores, groups=groups, kind=kind)
    whole = advantages(tensor([1.0, 2.0, 6.0]), group_size=3, kind=kind)
    assert found[[0, 2, 5, 3]].tolist() == [0.0] * 4
    assert_close(found[[1, 4, 6]], whole)


def test_scores_that_differ_by_rounding_alone_hardly_count():
    # Two bf16 passes of other shapes may differ by 1e-4; with eps 1e-6 that would be as much as any real difference.
    found = advantages(tensor([1.0, 1.0 + 1e-5, 1.0, 1.0]), group_size=4, kind="grpo")
    assert found.abs().max() < 0.1


def test_a_deviation_of_the_batch_by_hand():
    # Deviations from the group means -2 -1 3, -1 -1 2; all scores: mean 4.5, squares 12.25 6.25 2.25 .25 .25 12.25.
    expected = tensor([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]) / ((33.5 / 5) ** 0.5 + 1e-4)
    assert_close(advantages(SCORES, kind="batch"), expected)


def test_groups_that_agree_are_found():
    scores = tensor([1.0, 1.0, 0.0, 1.0, 0.5, 0.5, 7.0])
    groups = tensor([5, 5, 9, 9, 3, 3, 1])
    assert groups_that_differ(scores, groups).tolist() == [False, False, True, True, False, False, False]


def test_kinds_that_do_not_exist_are_refused():
    groups = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match='found group baseline "gae"'):
        group_advantages(SCORES, groups=groups, baseline="gae", eps=1e-4)
    with pytest.raises(ValueError, match='found scale "whiten"'):
        group_advantages(SCORES, groups=groups, baseline="mean", scale="whiten", eps=1e-4)
