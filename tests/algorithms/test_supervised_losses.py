"""Losses of SFT and reward modelling against numbers worked by hand and torch's own."""

import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from rlhf.algorithms.logprobs import Wanted, statistics_of_logits
from rlhf.algorithms.supervised_losses import count_targets, pairwise_loss
from rlhf.algorithms.supervised_losses import sft_loss as loss_of_statistics


def sft_loss(logits, input_ids, target_mask, **settings):
    found = statistics_of_logits(logits, input_ids[:, 1:], wanted=Wanted(first_choice=True))
    return loss_of_statistics(found, target_mask, **settings)


def random_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 9, dtype=torch.float64, generator=generator).to(dtype)
    input_ids = torch.randint(9, (4, 6), generator=generator)
    target_mask = torch.rand(4, 6, generator=generator) < 0.6
    return logits.requires_grad_(), input_ids, target_mask


def test_the_loss_of_tokens_by_hand():
    # Token 1 follows token 0 with weight 3 of 4, token 0 follows token 1 with weight 1 of 5 (first choice: 1).
    logits = tensor([[[1.0, 3.0], [1.0, 4.0], [7.0, 1.0]]]).log()
    result = sft_loss(logits, tensor([[0, 1, 0]]), tensor([[False, True, True]]))
    assert_close(result.loss, tensor((math.log(4 / 3) + math.log(5)) / 2))
    assert result.num_tokens.item() == 2
    assert_close(result.accuracy, tensor(0.5))


def test_the_first_token_never_counts():
    logits, input_ids, target_mask = random_batch()
    target_mask[:, 0] = False
    without = sft_loss(logits, input_ids, target_mask)
    target_mask[:, 0] = True
    assert_close(sft_loss(logits, input_ids, target_mask), without)
    assert count_targets(target_mask) == without.num_tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_the_cross_entropy_of_the_shifted_labels(dtype):
    logits, input_ids, target_mask = random_batch(dtype)
    labels = torch.where(target_mask, input_ids, -100)
    exact = logits.float() if dtype == torch.bfloat16 else logits
    expected = cross_entropy(exact[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (expected_grad,) = torch.autograd.grad(expected, logits)
    loss = sft_loss(logits, input_ids, target_mask).loss
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, logits)[0], expected_grad)


def test_micro_batches_of_tokens_add_up_to_the_whole():
    logits, input_ids, target_mask = random_batch()
    target_mask[1] = False
    whole = sft_loss(logits, input_ids, target_mask)
    (whole_grad,) = torch.autograd.grad(whole.loss, logits)
    count = count_targets(target_mask)
    parts = [sft_loss(logits[i], input_ids[i], target_mask[i], denominator=count) for i in tensor([[0], [1], [2], [3]])]
    assert_close([sum(field) for field in zip(*parts, strict=True)], list(whole))
    assert_close(torch.autograd.grad(sum(part.loss for part in parts), logits)[0], whole_grad)


def test_no_target_gives_a_loss_of_zero_and_a_gradient_of_zero():
    logits, input_ids, _ = random_batch()
    result = sft_loss(logits, input_ids, torch.zeros(4, 6, dtype=torch.bool))
    result.loss.backward()
    assert [x.item() for x in result] == [0.0, 0, 0.0]
    assert logits.grad.abs().max() == 0


def test_sequences_of_one_token_have_nothing_to_predict():
    result = sft_loss(torch.randn(2, 1, 5), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool))
    assert [x.item() for x in result] == [0.0, 0, 0.0]


def test_padding_changes_nothing():
    logits, input_ids, target_mask = random_batch()
    padded = sft_loss(
        torch.cat([logits, torch.randn(4, 2, 9, dtype=torch.float64)], 1),
        torch.cat([input_ids, torch.zeros(4, 2, dtype=torch.long)], 1),
        torch.cat([target_mask, torch.zeros(4, 2, dtype=torch.bool)], 1),
    )
    assert_close(padded, sft_loss(logits, input_ids, target_mask))


def test_a_mask_of_another_shape_is_refused():
    logits, input_ids, target_mask = random_batch()
    with pytest.raises(ValueError, match=r"a mask of shape \(4, 4\) for values of shape \(4, 5\)"):
        sft_loss(logits, input_ids, target_mask[:, 1:])


LOG3 = math.log(3)


def test_the_loss_of_pairs_by_hand():
    # sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4, so the losses are log 4/3 and log 4.
    result = pairwise_loss(tensor([LOG3 + 1, 2.0]), tensor([1.0, 2.0 + LOG3]))
    assert_close(result.loss, tensor((math.log(4 / 3) + math.log(4)) / 2))
    assert_close(result.accuracy, tensor(0.5))
    assert_close(result.margin, tensor(0.0))  # (log 3 - log 3) / 2


@pytest.mark.parametrize("margin", [1.0, tensor(1.0), tensor([1.0])])
def test_the_margin_raises_the_bar_but_not_the_accuracy(margin):
    # c - r - margin = log 3 - 1 + ... : 1 + log 3 - 1 = log 3, so the loss is log 4/3; c > r whatever the margin.
    result = pairwise_loss(tensor([1 + LOG3]), tensor([0.0]), margin=margin)
    assert_close(result.loss, tensor(math.log(4 / 3)))
    assert_close(result.margin, tensor(1 + LOG3))
    assert result.accuracy.item() == 1.0
    assert pairwise_loss(tensor([0.5]), tensor([0.0]), margin=1.0).accuracy.item() == 1.0


def test_centring_by_hand():
    # c = 2, r = 1: log(1 + exp(-1)) + 0.1 * (2 + 1)^2
    result = pairwise_loss(tensor([2.0]), tensor([1.0]), center_coef=0.1)
    assert_close(result.loss, tensor(math.log(1 + math.exp(-1)) + 0.9))


def test_a_tie_is_not_accurate():
    assert pairwise_loss(tensor([1.0, 1.0]), tensor([1.0, 0.0])).accuracy.item() == 0.5


def test_a_shift_of_both_scores_changes_only_the_centring():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    assert_close(pairwise_loss(chosen + 5, rejected + 5), pairwise_loss(chosen, rejected))
    assert pairwise_loss(chosen + 5, rejected + 5, center_coef=0.1).loss > pairwise_loss(chosen, rejected).loss + 1


def test_half_precision_scores_are_compared_in_fp32():
    chosen, rejected = tensor([100.0], dtype=torch.bfloat16), tensor([0.33203125], dtype=torch.bfloat16)
    result = pairwise_loss(chosen, rejected, center_coef=0.01)
    assert result.loss.dtype == torch.float32
    assert_close(result.margin, tensor(99.66796875))  # bf16 would give 99.5
    assert_close(result.loss, tensor(0.01 * 100.33203125**2))


def test_very_wrong_scores_stay_finite():
    chosen = tensor([-1e4], requires_grad=True)
    result = pairwise_loss(chosen, tensor([1e4]))
    result.loss.backward()
    assert result.loss.item() == 2e4  # -log sigmoid(-x) = x for large x
    assert chosen.grad.item() == -1.0


def test_no_pairs_give_a_loss_of_zero():
    chosen = torch.empty(0, requires_grad=True)
    result = pairwise_loss(chosen, torch.empty(0))
    result.loss.backward()
    assert [x.item() for x in result] == [0.0, 0.0, 0.0]


def test_micro_batches_of_pairs_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    chosen.requires_grad_()
    whole = pairwise_loss(chosen, rejected, margin=margin, center_coef=0.1)
    (whole_grad,) = torch.autograd.grad(whole.loss, chosen)
    cuts = [slice(0, 1), slice(1, 5), slice(5, 7)]
    parts = [
        pairwise_loss(chosen[cut], rejected[cut], margin=margin[cut], center_coef=0.1, denominator=7) for cut in cuts
    ]
    assert_close([sum(field) for field in zip(*parts, strict=True)], list(whole))
    assert_close(torch.autograd.grad(sum(part.loss for part in parts), chosen)[0], whole_grad)


@pytest.mark.parametrize(
    ("rejected", "margin"), [(torch.zeros(2, 1), None), (torch.zeros(3), None), (torch.zeros(2), torch.zeros(2, 1))]
)
def test_shapes_that_would_broadcast_are_refused(rejected, margin):
    with pytest.raises(ValueError, match=r"found chosen scores of shape \(2,\)"):
        pairwise_loss(torch.zeros(2), rejected, margin=margin)
