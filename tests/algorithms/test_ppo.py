import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.algorithms.loss_weights import aggregation_weights
from rlhf.algorithms.ppo import Surrogate, explained_variance, gae, policy_loss, token_rewards, value_loss

NAN = float("nan")


def random_tensors(count, *shape):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()


def random_mask(*shape):
    """A mask with holes, and one row that counts nothing."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[1] = False
    return mask


# ---- token_rewards


def test_rewards_by_hand():
    kl = tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN], [1.0, NAN, 2.0], [NAN, NAN, NAN]])
    mask = tensor([[1, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()
    expected = tensor(
        [
            [-0.1, -0.2, 9.7],  # the score 10 on the last token, less 0.1 * 3
            [19.6, 0.0, 0.0],  # ended at once: the score 20 on the EOS, less 0.1 * 4
            [-0.1, 0.0, 29.8],  # the last counted token, after a hole
            [0.0, 0.0, 0.0],  # nothing counts: no score, though there is one
        ]
    )
    assert_close(token_rewards(tensor([10.0, 20.0, 30.0, 40.0]), kl, mask, kl_coef=0.1), expected)


def test_a_response_of_one_token_gets_everything_there():
    assert_close(token_rewards(tensor([2.0]), tensor([[1.0]]), tensor([[True]]), kl_coef=0.5), tensor([[1.5]]))


def test_a_score_that_is_nan_stays_in_its_row():
    rewards = token_rewards(tensor([NAN, 1.0]), torch.zeros(2, 2), tensor([[0, 0], [1, 1]]).bool(), kl_coef=0.1)
    assert rewards.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_the_rewards_of_a_row_sum_to_the_score_less_the_kl_of_the_sequence():
    (kl,), (scores,) = random_tensors(1, 5, 7), random_tensors(1, 5)
    mask = random_mask(5, 7)
    expected = torch.where(mask.any(-1), scores - 0.3 * (kl * mask).sum(-1), 0.0)
    assert_close(token_rewards(scores, kl, mask, kl_coef=0.3).sum(-1), expected)


def test_bf16_scores_are_added_in_fp32():
    rewards = token_rewards(tensor([256.0]).bfloat16(), tensor([[1.0]]).bfloat16(), tensor([[True]]), kl_coef=0.5)
    assert rewards.dtype == torch.float32
    assert rewards.item() == 255.5  # bf16 would round to 256


# ---- gae


def test_gae_by_hand():
    # gamma 0.9, lam 0.8, gamma lam 0.72
    # t = 2: delta = 1 - 0.3 = 0.7                     A = 0.7
    # t = 1: delta = 0.9 * 0.3 - 0.4 = -0.13           A = -0.13 + 0.72 * 0.7 = 0.374
    # t = 0: delta = 0.9 * 0.4 - 0.5 = -0.14           A = -0.14 + 0.72 * 0.374 = 0.12928
    rewards, values = tensor([[0.0, 0.0, 1.0]]), tensor([[0.5, 0.4, 0.3]])
    found = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.8)
    assert_close(found.advantages, tensor([[0.12928, 0.374, 0.7]]))
    assert_close(found.returns, tensor([[0.62928, 0.774, 1.0]]))


def test_nothing_is_bootstrapped_past_an_eos_before_the_end():
    # The row above, with two masked positions whose rewards and values must not be seen.
    rewards, values = tensor([[0.0, 0.0, 1.0, 50.0, NAN]]), tensor([[0.5, 0.4, 0.3, 70.0, NAN]])
    found = gae(rewards, values, tensor([[1, 1, 1, 0, 0]]).bool(), gamma=0.9, lam=0.8)
    assert_close(found.advantages, tensor([[0.12928, 0.374, 0.7, 0.0, 0.0]]))
    assert_close(found.returns, tensor([[0.62928, 0.774, 1.0, 0.0, 0.0]]))


def test_a_hole_in_the_mask_is_stepped_over():
    rewards, values = tensor([[0.0, 50.0, 0.0, NAN, 1.0]]), tensor([[0.5, 70.0, 0.4, NAN, 0.3]])
    found = gae(rewards, values, tensor([[1, 0, 1, 0, 1]]).bool(), gamma=0.9, lam=0.8)
    assert_close(found.advantages, tensor([[0.12928, 0.0, 0.374, 0.0, 0.7]]))
    assert_close(found.returns, tensor([[0.62928, 0.0, 0.774, 0.0, 1.0]]))


def test_a_row_that_counts_nothing_has_no_advantage():
    found = gae(tensor([[NAN, 1.0]]), tensor([[1.0, NAN]]), tensor([[False, False]]), gamma=1.0, lam=0.95)
    assert found.advantages.tolist() == [[0.0, 0.0]]
    assert found.returns.tolist() == [[0.0, 0.0]]


def test_a_response_of_one_token():
    found = gae(tensor([[2.0]]), tensor([[0.5]]), tensor([[True]]), gamma=1.0, lam=0.95)
    assert found.advantages.item() == 1.5
    assert found.returns.item() == 2.0


def test_gae_is_the_discounted_sum_of_temporal_differences():
    # The definition (eq. 16): A_t = sum_l (gamma lam)^l delta_{t + l}, on unmasked rows.
    rewards, values = random_tensors(2, 4, 9)
    gamma, lam = 0.97, 0.9
    deltas = rewards + gamma * torch.cat([values[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], 1) - values
    expected = torch.stack([sum((gamma * lam) ** (s - t) * deltas[:, s] for s in range(t, 9)) for t in range(9)], dim=1)
    found = gae(rewards, values, torch.ones(4, 9, dtype=torch.bool), gamma=gamma, lam=lam)
    assert_close(found.advantages, expected)


def test_lam_1_returns_are_the_rewards_to_the_end():
    rewards, values = random_tensors(2, 5, 7)
    mask = random_mask(5, 7)
    to_the_end = (rewards * mask).flip(-1).cumsum(-1).flip(-1) * mask
    assert_close(gae(rewards, values, mask, gamma=1.0, lam=1.0).returns, to_the_end)


def test_gamma_0_looks_at_the_reward_of_the_token_only():
    rewards, values = random_tensors(2, 5, 7)
    mask = random_mask(5, 7)
    found = gae(rewards, values, mask, gamma=0.0, lam=0.95)
    assert_close(found.advantages, (rewards - values) * mask)
    assert_close(found.returns, rewards * mask)


def test_masked_rows_equal_their_counted_tokens_alone():
    rewards, values = random_tensors(2, 5, 7)
    mask = random_mask(5, 7)
    found = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for row in range(5):
        alone = rewards[row][mask[row]][None], values[row][mask[row]][None]
        expected = gae(*alone, torch.ones_like(alone[0], dtype=torch.bool), gamma=0.9, lam=0.8)
        assert_close(found.advantages[row][mask[row]], expected.advantages[0])


def test_a_perfect_critic_leaves_no_advantage():
    rewards = random_tensors(1, 3, 6)[0]
    values = rewards.flip(-1).cumsum(-1).flip(-1)
    found = gae(rewards, values, torch.ones(3, 6, dtype=torch.bool), gamma=1.0, lam=0.95)
    assert_close(found.advantages, torch.zeros_like(rewards))


def test_no_gradient_flows_through_advantages():
    values = torch.ones(1, 2, requires_grad=True)
    found = gae(torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert not found.advantages.requires_grad
    assert not found.returns.requires_grad


# ---- policy_loss

RATIOS = tensor([[1.5, 1.5, 0.5, 0.9, 1.1]])
ADVANTAGES = tensor([[1.0, -1.0, -1.0, 2.0, NAN]])
COUNTED = tensor([[True, True, True, True, False]])


def test_policy_loss_by_hand():
    # max(-A r, -A clip(r)): max(-1.5, -1.2), max(1.5, 1.2), max(0.5, 0.8), max(-1.8, -1.8)
    result = policy_loss(RATIOS.log(), torch.zeros(1, 5), ADVANTAGES, COUNTED, surrogate=Surrogate(0.2))
    assert_close(result.loss, tensor((-1.2 + 1.5 + 0.8 - 1.8) / 4))
    assert_close(result.clip_fraction, tensor(0.5))  # the first and the third
    k3 = [r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.9)]
    assert_close(result.approx_kl, tensor(sum(k3) / 4))
    assert_close(result.ratio_mean, tensor(1.1))  # (1.5 + 1.5 + 0.5 + 0.9) / 4
    assert_close(result.ratio_max, tensor(1.5))


def test_the_upper_bound_may_be_higher():
    arguments = tensor([[1.5, 0.5]]).log(), torch.zeros(1, 2), tensor([[1.0, -1.0]]), tensor([[True, True]])
    # The losses are max(-1.5, -1.28) and max(0.5, 0.8).
    assert_close(policy_loss(*arguments, surrogate=Surrogate((0.2, 0.28))).loss, tensor((-1.28 + 0.8) / 2))


def test_dual_clip_bounds_the_loss_of_bad_tokens_only():
    # r = 5: max(5, 1.2) = 5, but at most 3 where A = -1; max(-5, -1.2) = -1.2 where A = 1; r = 2 stays below 3.
    arguments = (
        tensor([[5.0, 5.0, 2.0]]).log(),
        torch.zeros(1, 3),
        tensor([[-1.0, 1.0, -1.0]]),
        torch.ones(1, 3, dtype=torch.bool),
    )
    assert_close(policy_loss(*arguments, surrogate=Surrogate(0.2)).loss, tensor((5 - 1.2 + 2) / 3))
    assert_close(policy_loss(*arguments, surrogate=Surrogate(0.2, dual_clip=3.0)).loss, tensor((3 - 1.2 + 2) / 3))


def test_the_first_update_has_ratio_1_and_the_policy_gradient():
    old, advantages = random_tensors(2, 4, 6)
    mask = random_mask(4, 6)
    logprobs = old.clone().requires_grad_()
    result = policy_loss(logprobs, old, advantages, mask, surrogate=Surrogate(0.2))
    result.loss.backward()
    assert result.ratio_mean.item() == 1.0
    assert result.ratio_max.item() == 1.0
    assert result.approx_kl.item() == 0.0
    assert result.clip_fraction.item() == 0.0
    assert_close(logprobs.grad, -advantages * mask / mask.sum())


def test_clipped_tokens_have_no_gradient_and_the_others_do():
    logprobs = RATIOS.log().requires_grad_()
    policy_loss(logprobs, torch.zeros(1, 5), ADVANTAGES, COUNTED, surrogate=Surrogate(0.2)).loss.backward()
    # d(-A r) / d log r = -A r where not clipped, over 4 tokens; masked tokens 0, though their advantage is NaN.
    assert_close(logprobs.grad, tensor([[0.0, 1.5 / 4, 0.0, -1.8 / 4, 0.0]]))


@pytest.mark.parametrize("log_ratio", [1e4, -1e4, math.inf, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_one_token_gone_astray_gives_neither_inf_nor_nan(log_ratio, advantage):
    logprobs = tensor([[log_ratio, 0.0]], requires_grad=True)
    result = policy_loss(
        logprobs, torch.zeros(1, 2), tensor([[advantage, 1.0]]), tensor([[True, True]]), surrogate=Surrogate(0.2)
    )
    result.loss.backward()
    assert all(field.isfinite() for field in result)
    assert_close(logprobs.grad, tensor([[0.0, -0.5]]))


@pytest.mark.parametrize("denominator", [None, 0, 8])
def test_where_nothing_counts_loss_and_gradient_are_zero(denominator):
    logprobs = torch.full((2, 3), NAN, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    garbage = torch.full((2, 3), math.inf)
    result = policy_loss(
        logprobs, garbage, garbage, mask, surrogate=Surrogate(0.2, dual_clip=3.0), denominator=denominator
    )
    result.loss.backward()
    assert [field.item() for field in result] == [0.0] * 5
    assert logprobs.grad.abs().max() == 0


def test_half_precision_logprobs_are_compared_in_fp32():
    # 0.00390625 = 2^-8: exp of it rounds to 1.0 in bf16
    logprobs = tensor([[0.00390625]], dtype=torch.bfloat16)
    result = policy_loss(logprobs, torch.zeros(1, 1), tensor([[1.0]]), tensor([[True]]), surrogate=Surrogate(0.2))
    assert result.loss.dtype == torch.float32
    assert_close(result.ratio_mean, tensor(math.exp(0.00390625)))


MICRO_BATCHES = (slice(0, 1), slice(1, 2), slice(2, 6))  # the second counts nothing


def test_policy_losses_with_the_global_count_add_up_to_the_whole():
    old, noise, advantages = random_tensors(3, 6, 5)
    mask, logprobs = random_mask(6, 5), (old + noise).requires_grad_()
    whole = policy_loss(logprobs, old, advantages, mask, surrogate=Surrogate(0.2, dual_clip=3.0))
    (whole_grad,) = torch.autograd.grad(whole.loss, logprobs)
    parts = [
        policy_loss(
            *(x[rows] for x in (logprobs, old, advantages, mask)),
            surrogate=Surrogate(0.2, dual_clip=3.0),
            denominator=mask.sum(),
        )
        for rows in MICRO_BATCHES
    ]
    for name in ("loss", "clip_fraction", "approx_kl", "ratio_mean"):
        assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    assert_close(max(part.ratio_max for part in parts), whole.ratio_max)
    assert_close(torch.autograd.grad(sum(part.loss for part in parts), logprobs)[0], whole_grad)


def test_masked_positions_equal_absent_positions():
    old, noise, advantages = random_tensors(3, 6, 5)
    mask = random_mask(6, 5)
    alone = [x[mask][None] for x in (old + noise, old, advantages, mask)]
    assert_close(
        policy_loss(old + noise, old, advantages, mask, surrogate=Surrogate(0.2)),
        policy_loss(*alone, surrogate=Surrogate(0.2)),
    )


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    # sqrt(2 * 1/8) = 1/2 for the first row and, over one token, 1.5 for the second.
    logprobs = tensor([[2.0, 1 / 8], [1.5, 9.0]]).log().requires_grad_()
    mask, advantages = tensor([[True, True], [True, False]]), tensor([[1.0, 1.0], [1.0, NAN]])
    weights = aggregation_weights(mask, kind="sequence_mean", length=2)
    surrogate = Surrogate((0.6, 0.4), ratio="sequence")
    result = policy_loss(logprobs, torch.zeros(2, 2), advantages, mask, surrogate=surrogate, weights=weights)
    assert_close(result.loss, tensor(-(0.5 + 1.4) / 2))
    result.loss.backward()
    # The first: d(-s / 2) / d log p_t = -(s / 2) (1 / 2 tokens) for each; the second is clipped.
    assert_close(logprobs.grad, tensor([[-0.125, -0.125], [0.0, 0.0]]))
    assert_close(result.clip_fraction, tensor(1 / 3))


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    # Weights 1.25 (clipped from 4), 0.5 and 1: -w A log p with A = 1, -2, 1.
    logprobs = tensor([[4.0, 0.5, 1.0]]).log().requires_grad_()
    advantages, mask = tensor([[1.0, -2.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    surrogate = Surrogate((1.0, 0.25), kind="cispo")
    result = policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, surrogate=surrogate)
    assert_close(result.loss, tensor((-1.25 * math.log(4) + 2 * 0.5 * math.log(0.5)) / 3))
    result.loss.backward()
    assert_close(logprobs.grad, tensor([[-1.25, 1.0, -1.0]]) / 3)
    assert_close(result.clip_fraction, tensor(1 / 3))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["clip", "cispo"])
@pytest.mark.parametrize("mean", ["token_mean", "sequence_mean", "constant"])
def test_losses_with_the_weights_of_a_minibatch_add_up_to_the_whole(ratio, kind, mean):
    old, noise, advantages = random_tensors(3, 6, 5)
    mask, logprobs = random_mask(6, 5), (old + noise).requires_grad_()
    weights = aggregation_weights(mask, kind=mean, length=5)
    surrogate = Surrogate(0.2, kind=kind, ratio=ratio)
    whole = policy_loss(logprobs, old, advantages, mask, surrogate=surrogate, weights=weights).loss
    parts = [
        policy_loss(
            *(x[rows] for x in (logprobs, old, advantages, mask)), surrogate=surrogate, weights=weights[rows]
        ).loss
        for rows in MICRO_BATCHES
    ]
    assert_close(sum(parts), whole)
    assert_close(torch.autograd.grad(sum(parts), logprobs)[0], torch.autograd.grad(whole, logprobs)[0])


def test_settings_that_make_no_sense_are_refused():
    arguments = [torch.zeros(1, 1)] * 3 + [torch.ones(1, 1, dtype=torch.bool)]
    with pytest.raises(ValueError, match='policy loss "sapo", expected "clip" or "cispo"'):
        Surrogate(0.2, kind="sapo")
    with pytest.raises(ValueError, match='a ratio of "word", expected "token" or "sequence"'):
        Surrogate(0.2, ratio="word")
    with pytest.raises(ValueError, match="found clip_range -0.1"):
        policy_loss(*arguments, surrogate=Surrogate(-0.1))
    with pytest.raises(ValueError, match=r"found clip_range \(0.2, -0.1\)"):
        policy_loss(*arguments, surrogate=Surrogate((0.2, -0.1)))
    with pytest.raises(ValueError, match="found ppo.dual_clip=1.0, expected a number above 1"):
        policy_loss(*arguments, surrogate=Surrogate(0.2, dual_clip=1.0))


# ---- value_loss and explained_variance


def test_value_loss_by_hand():
    # V = 1.5, old 1, clipped 1.2. R = 0: max(1.5^2, 1.2^2) = 2.25. R = 2: max(0.5^2, 0.8^2) = 0.64, clipped.
    values, old, returns = tensor([[1.5, 1.5, NAN]]), tensor([[1.0, 1.0, NAN]]), tensor([[0.0, 2.0, NAN]])
    result = value_loss(values, old, returns, tensor([[True, True, False]]), clip_range=0.2)
    assert_close(result.loss, tensor(0.5 * (2.25 + 0.64) / 2))
    assert_close(result.clip_fraction, tensor(0.5))


def test_without_a_clip_range_it_is_half_the_squared_error():
    values, old, returns = tensor([[1.5, 3.0]]), tensor([[0.0, 0.0]]), tensor([[0.0, 2.0]])
    result = value_loss(values, old, returns, torch.ones(1, 2, dtype=torch.bool), clip_range=None)
    assert_close(result.loss, tensor(0.5 * (2.25 + 1.0) / 2))
    assert result.clip_fraction.item() == 0.0


def test_the_gradient_of_the_value_loss_by_hand():
    # d 0.5 (V - R)^2 = V - R where not clipped, over 2 tokens; 0 where clipped and where masked.
    values = tensor([[1.5, 1.5, NAN]], requires_grad=True)
    old, returns = tensor([[1.0, 1.0, NAN]]), tensor([[0.0, 2.0, NAN]])
    value_loss(values, old, returns, tensor([[True, True, False]]), clip_range=0.2).loss.backward()
    assert_close(values.grad, tensor([[0.75, 0.0, 0.0]]))


def test_fp16_values_do_not_overflow_when_squared():
    values, zeros = tensor([[300.0]], dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16)
    assert value_loss(values, values, zeros, tensor([[True]]), clip_range=0.2).loss.item() == 45_000  # 300^2 / 2


def test_value_losses_with_the_global_count_add_up_to_the_whole():
    values, old, returns = random_tensors(3, 6, 5)
    mask = random_mask(6, 5)
    values.requires_grad_()
    whole = value_loss(values, old, returns, mask, clip_range=0.2)
    (whole_grad,) = torch.autograd.grad(whole.loss, values)
    parts = [
        value_loss(*(x[rows] for x in (values, old, returns, mask)), clip_range=0.2, denominator=mask.sum())
        for rows in MICRO_BATCHES
    ]
    assert_close(sum(part.loss for part in parts), whole.loss)
    assert_close(sum(part.clip_fraction for part in parts), whole.clip_fraction)
    assert_close(torch.autograd.grad(sum(part.loss for part in parts), values)[0], whole_grad)


@pytest.mark.parametrize("denominator", [None, 0, 8])
def test_a_value_loss_over_nothing_is_zero_with_zero_gradient(denominator):
    values = torch.full((2, 3), NAN, requires_grad=True)
    garbage, mask = torch.full((2, 3), math.inf), torch.zeros(2, 3, dtype=torch.bool)
    result = value_loss(values, garbage, garbage, mask, clip_range=0.2, denominator=denominator)
    result.loss.backward()
    assert [field.item() for field in result] == [0.0, 0.0, 0.0]
    assert values.grad.abs().max() == 0


def test_explained_variance_by_hand():
    # Returns 1, 2, 3 have variance 2/3; residuals 0, 0, 1 have 1/3 - 1/9 = 2/9.
    values, returns = tensor([[1.0, 2.0, 2.0, NAN]]), tensor([[1.0, 2.0, 3.0, NAN]])
    mask = tensor([[True, True, True, False]])
    assert_close(explained_variance(values, returns, mask), tensor(2 / 3))
    assert_close(value_loss(values, values, returns, mask, clip_range=0.2).explained_variance, tensor(2 / 3))


def test_explained_variance_at_its_landmarks():
    returns, mask = random_tensors(1, 4, 6)[0], random_mask(4, 6)
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(returns + 7, returns, mask).item() == pytest.approx(1.0)  # a constant error is no spread
    assert explained_variance(torch.zeros_like(returns), returns, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0)  # 1 - 2^2


def test_equal_returns_leave_no_variance_to_explain():
    returns, mask = torch.full((1, 3), 0.1), torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(tensor([[1.0, 2.0, 3.0]]), returns, mask).item() == 0.0
