import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.algorithms.masked import (
    Moments,
    divide_by_count,
    is_last_counted,
    masked_mean,
    masked_moments,
    masked_whiten,
    whiten_with,
    zero_masked,
)

NAN = float("nan")


def test_zero_masked_replaces_what_does_not_count_even_nan():
    x = tensor([[1.0, NAN, 3.0]], requires_grad=True)
    kept = zero_masked(x, tensor([[True, False, True]]))
    assert kept.tolist() == [[1.0, 0.0, 3.0]]
    (kept * 2).sum().backward()
    assert x.grad.tolist() == [[2.0, 0.0, 2.0]]


def test_a_mask_of_another_shape_is_refused_rather_than_broadcast():
    with pytest.raises(ValueError, match=r"found a mask of shape \(3,\) for values of shape \(2, 3\)"):
        masked_mean(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))


def test_masked_mean_by_hand():
    x, mask = tensor([1.0, 2.0, 3.0, 4.0]), tensor([True, False, True, True])
    assert_close(masked_mean(x, mask), tensor(8 / 3))  # (1 + 3 + 4) / 3
    assert_close(masked_mean(x, mask, denominator=4), tensor(2.0))  # (1 + 3 + 4) / 4
    assert_close(masked_mean(x, mask, denominator=tensor(16)), tensor(0.5))  # 8 / 16


def test_masked_mean_of_a_share_of_ranks_may_be_below_one():
    # 1 counted token over 4 ranks, as an engine that averages over ranks would ask: 3 / 0.25
    assert_close(masked_mean(tensor([3.0]), tensor([True]), denominator=0.25), tensor(12.0))


@pytest.mark.parametrize("denominator", [None, 0, 0.0, tensor(0)])
def test_masked_mean_over_nothing_is_zero_with_zero_gradient(denominator):
    x = tensor([1.0, NAN], requires_grad=True)
    mean = masked_mean(x, tensor([False, False]), denominator=denominator)
    mean.backward()
    assert mean.item() == 0.0
    assert x.grad.tolist() == [0.0, 0.0]


def test_masked_mean_of_an_empty_tensor_is_zero():
    assert masked_mean(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_mean_sums_half_precision_in_fp32(dtype):
    # 4096 ones and a half: a bf16 sum would stop at 256, an fp16 sum at 2048.
    x = torch.ones(4097, dtype=dtype)
    x[0] = 0.5
    mean = masked_mean(x, torch.ones(4097, dtype=torch.bool))
    assert mean.dtype == torch.float32
    assert_close(mean, tensor(4096.5 / 4097))


def test_a_mask_of_zeros_and_ones_is_read_as_bool():
    assert masked_mean(tensor([1.0, 5.0]), tensor([0.0, 1.0])).item() == 5.0
    assert masked_mean(tensor([1.0, 5.0]), tensor([1, 0])).item() == 1.0


def test_micro_batch_means_with_the_global_count_add_up_to_the_global_mean():
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    parts = [masked_mean(x[i : i + 2], mask[i : i + 2], denominator=mask.sum()) for i in (0, 2, 4)]
    assert_close(sum(parts), masked_mean(x, mask))


def test_divide_by_count_reads_zero_as_one():
    assert divide_by_count(tensor(6.0), 3).item() == 2.0
    assert divide_by_count(tensor(6.0), tensor(4)).item() == 1.5
    assert divide_by_count(tensor(0.0), 0).item() == 0.0
    assert divide_by_count(tensor(0.0), tensor(0)).item() == 0.0


def test_is_last_counted_finds_one_token_per_row_that_counts_any():
    mask = tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    expected = tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).bool()
    assert_close(is_last_counted(mask), expected)


def test_moments_by_hand():
    moments = masked_moments(tensor([1.0, 3.0, 100.0]), tensor([True, True, False]))
    assert [moment.item() for moment in moments] == [2.0, 4.0, 10.0]  # 1 + 1; 1 + 3; 1 + 9
    assert moments.mean.item() == 2.0  # 4 / 2
    assert moments.variance.item() == 1.0  # 10 / 2 - 2^2


def test_moments_about_an_origin_have_the_same_variance():
    moments = masked_moments(tensor([1.0, 3.0]), tensor([True, True]), origin=5.0)
    assert [moment.item() for moment in moments] == [2.0, -6.0, 20.0]  # -4 - 2; 16 + 4
    assert moments.mean.item() == -3.0  # 2 - 5
    assert moments.variance.item() == 1.0  # 20 / 2 - 9


def test_moments_of_nothing_are_zero():
    moments = masked_moments(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    assert moments.mean.item() == 0.0
    assert moments.variance.item() == 0.0


def test_one_pass_moments_keep_the_variance_of_fp32_values_far_from_zero():
    x = 10_000 + torch.randn(1000, generator=torch.Generator().manual_seed(0))
    moments = masked_moments(x, torch.ones(1000, dtype=torch.bool))
    assert_close(moments.variance, x.double().var(correction=0), rtol=1e-6, atol=0)


# The textbook example: 2 4 4 4 5 5 7 9 has mean 5 and biased variance (9 + 1 + 1 + 1 + 0 + 0 + 4 + 16) / 8 = 4.
TEXTBOOK = tensor([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
WHITE = tensor([-1.5, -0.5, -0.5, -0.5, 0.0, 0.0, 1.0, 2.0])  # (x - 5) / 2


def test_masked_whiten_by_hand():
    assert_close(masked_whiten(TEXTBOOK, torch.ones(8, dtype=torch.bool)), WHITE)


def test_masked_whiten_without_centering_keeps_the_mean():
    assert_close(masked_whiten(TEXTBOOK, torch.ones(8, dtype=torch.bool), center=False), WHITE + 5)


def test_masked_whiten_adds_eps_to_the_variance():
    # sqrt(4 + 5) = 3
    assert_close(masked_whiten(TEXTBOOK, torch.ones(8, dtype=torch.bool), eps=5.0), (TEXTBOOK - 5) / 3)


@pytest.mark.parametrize("center", [True, False])
def test_masked_whiten_sees_counted_tokens_only_and_zeroes_the_rest(center):
    x = tensor([[2.0, NAN, 4.0, 4.0, 4.0], [5.0, 5.0, 7.0, 9.0, 1e30]])
    mask = tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    whitened = masked_whiten(x, mask, center=center)
    assert_close(whitened[mask], WHITE if center else WHITE + 5)
    assert whitened[~mask].tolist() == [0.0, 0.0]


def test_masked_whiten_ignores_shift_and_scale():
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    assert_close(masked_whiten(3 * x + 2, mask), masked_whiten(x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [[False, False, False], [False, True, False], [True, True, True]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_without_spread_whiten_to_exactly_zero(mask, dtype):
    whitened = masked_whiten(torch.full((3,), 0.1, dtype=dtype), tensor(mask))
    assert whitened.tolist() == [0.0, 0.0, 0.0]
    assert whitened.dtype == torch.float32


def test_masked_whiten_is_exact_for_values_far_from_zero():
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1000, dtype=torch.bool)
    assert_close(masked_whiten(1e8 + x, mask), masked_whiten(x, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("center", [True, False])
def test_whitening_by_the_moments_of_all_ranks_equals_whitening_the_concatenation(center):
    x = 5 + 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[4:] = False  # one rank has nothing that counts
    ranks = [(x[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    moments = Moments(*sum(torch.stack(masked_moments(*rank)) for rank in ranks))
    parts = [whiten_with(*rank, mean=moments.mean, variance=moments.variance, center=center) for rank in ranks]
    assert_close(torch.cat(parts), masked_whiten(x, mask, center=center))


def test_whiten_with_takes_plain_numbers():
    # Two above the mean, with a standard deviation of 2.
    assert_close(whiten_with(tensor([7.0]), tensor([True]), mean=5.0, variance=4.0), tensor([1.0]))
