"""What each ZeRO stage holds, and when."""

import pytest

from tests.engine import tiny

TOTAL = sum(parameter.numel() for parameter in tiny.reference().parameters())


@pytest.fixture
def held(on_ranks):
    """`held(stage)`: by rank, (all sharded, none sharded, gradient numbers) at three moments of a step."""
    return lambda stage: [rank["at_rest"][stage] for rank in on_ranks(2)]


def test_stage_zero_holds_everything_always(held):
    for rank in held(0):
        assert rank == [(False, True, TOTAL), (False, True, TOTAL), (False, True, 0)]


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_one_and_two_keep_parameters_gathered_from_one_micro_batch_to_the_next(held, stage):
    for rank in held(stage):
        assert [moment[:2] for moment in rank] == [(False, True), (True, False), (True, False)]


def test_stage_three_frees_parameters_after_every_backward(held):
    for rank in held(3):
        assert [moment[:2] for moment in rank] == [(True, False)] * 3


@pytest.mark.parametrize(("stage", "after_the_first"), [(1, False), (2, True), (3, True)])
def test_gradients_are_reduced_when_the_stage_says_and_then_every_rank_has_a_share(held, stage, after_the_first):
    first, second, after = (sum(rank[moment][2] for rank in held(stage)) for moment in range(3))
    assert first == (TOTAL if after_the_first else 0)
    assert second == TOTAL
    assert after == 0
