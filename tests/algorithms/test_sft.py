import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from rlhf.algorithms.sft import count_targets, sft_loss


def random_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 9, dtype=torch.float64, generator=generator).to(dtype)
    input_ids = torch.randint(9, (4, 6), generator=generator)
    target_mask = torch.rand(4, 6, generator=generator) < 0.6
    return logits.requires_grad_(), input_ids, target_mask


def test_the_loss_by_hand():
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


def test_micro_batches_with_the_global_count_add_up_to_the_whole():
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


def test_shapes_that_do_not_match_are_refused():
    logits, input_ids, target_mask = random_batch()
    with pytest.raises(ValueError, match=r"found logits of shape \(4, 5, 9\)"):
        sft_loss(logits[:, 1:], input_ids, target_mask)
    with pytest.raises(ValueError, match=r"a target_mask of \(4, 5\)"):
        sft_loss(logits, input_ids, target_mask[:, 1:])
