import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.algorithms.loss_weights import aggregation_weights, mismatch_weights
from rlhf.algorithms.scores import penalize_overlong

MASK = tensor([[True, True, True, False], [True, False, False, False], [False, False, False, False]])


def test_the_three_means_by_hand():
    # Four tokens in two responses, of 3 and 1; a third response counts nothing.
    token, sequence, constant = (
        aggregation_weights(MASK, kind=kind, length=4) for kind in ("token_mean", "sequence_mean", "constant")
    )
    assert_close(token, MASK / 4)
    assert_close(sequence, tensor([[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0], [0, 0, 0, 0]]))
    assert_close(constant, MASK / 12)


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "constant"])
def test_where_nothing_counts_weights_are_zero(kind):
    assert aggregation_weights(torch.zeros(2, 3, dtype=torch.bool), kind=kind, length=3).tolist() == [[0.0] * 3] * 2


def test_an_unknown_mean_is_refused():
    with pytest.raises(ValueError, match='found loss aggregation "sum"'):
        aggregation_weights(MASK, kind="sum", length=4)


LOGPROBS = tensor([[4.0, 1.0, 0.5, math.nan], [0.2, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]]).log()
GENERATED = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("kind", "bounds", "expected"),
    [
        ("token_truncate", (0.0, 2.0), [[2.0, 1.0, 0.5, 0.0], [0.2, 0, 0, 0]]),
        ("token_mask", (0.4, 2.0), [[0.0, 1.0, 0.5, 0.0], [0.0, 0, 0, 0]]),
        ("sequence_mask", (0.5, 2.0), [[2.0, 2.0, 2.0, 0.0], [0.0, 0, 0, 0]]),  # products 2 and 0.2
    ],
)
def test_mismatch_weights_by_hand(kind, bounds, expected):
    found = mismatch_weights(LOGPROBS, GENERATED, MASK, kind=kind, bounds=bounds)
    assert_close(found, tensor([*expected, [0.0] * 4]))


def test_paths_that_agree_need_no_correction():
    for kind in ("token_truncate", "token_mask", "sequence_mask"):
        weights = mismatch_weights(GENERATED, GENERATED, MASK, kind=kind, bounds=(0.5, 2.0))
        assert_close(weights, MASK.float())


def test_an_unknown_correction_is_refused():
    with pytest.raises(ValueError, match='found mismatch correction "auto"'):
        mismatch_weights(LOGPROBS, GENERATED, MASK, kind="auto", bounds=(0.0, 2.0))


def test_the_penalty_for_length_grows_over_the_buffer():
    # Limit 20, buffer 5: nothing up to 15 tokens, then a fifth of the penalty for each token.
    lengths = tensor([3, 15, 16, 18, 20])
    found = penalize_overlong(torch.ones(5), lengths, limit=20, share=0.25, penalty=2.0)
    assert_close(found, tensor([1.0, 1.0, 0.6, -0.2, -1.0]))
    assert penalize_overlong(torch.ones(5), lengths, limit=20, share=0.0, penalty=2.0).tolist() == [1.0] * 5
