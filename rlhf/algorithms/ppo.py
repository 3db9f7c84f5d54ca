"""Proximal policy optimisation on tokens: rewards, advantages and the two losses.

Sources: Schulman et al. 2017 (PPO, arXiv:1707.06347), Schulman et al. 2016 (GAE, arXiv:1506.02438), Ye et al. 2020
(dual clip, arXiv:1912.09729), Yu et al. 2025 (DAPO's higher upper bound, arXiv:2503.14476), Zheng et al. 2025 (GSPO's
ratio of sequences, arXiv:2507.18071), MiniMax 2025 (CISPO, arXiv:2506.13585).

[Note: accumulation] Losses and fractions are sums over counted tokens divided by a denominator. With the default, the
counted tokens of the call, they are means. Given the count of the global batch, the results of all micro-batches and
ranks *add up* to the global mean, and so do the gradients. The actor's loss may take weights of the global batch
instead (`loss_weights.py`), which add up likewise. Two numbers do not add up: `ratio_max` combines by its maximum, and
the explained variance is taken over the whole batch, see `explained_variance`.

Left out: whitening (`masked`), the KL (`kl`), an entropy bonus, which is `masked_mean` of the entropy that `logprobs`
gives, and everything that knows of models or ranks.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.masked import (
    at_least_fp32,
    divide_by_count,
    is_last_counted,
    masked_mean,
    masked_moments,
    weighted_sum,
    zero_masked,
)

_MAX_LOG_RATIO = 20.0


class Advantages(NamedTuple):
    """Generalised advantage estimates, and returns as targets of the critic."""

    advantages: Tensor  # [B, R], not whitened
    returns: Tensor  # [B, R], advantages + values


class PolicyLoss(NamedTuple):
    """The actor's loss and, detached, statistics of the ratios. See [Note: accumulation]."""

    loss: Tensor  # scalar
    clip_fraction: Tensor  # scalar, share of tokens for which clipping changed the loss (cispo: the weight)
    approx_kl: Tensor  # scalar, KL(old || new) by Schulman's k3: mean of (ratio - 1) - log ratio, never negative
    ratio_mean: Tensor  # scalar, 1 at the first update
    ratio_max: Tensor  # scalar, over this call's counted tokens; 0 where there are none


class ValueLoss(NamedTuple):
    """The critic's loss and, detached, two diagnostics. See [Note: accumulation]."""

    loss: Tensor  # scalar
    clip_fraction: Tensor  # scalar, share of tokens for which the clipped term was strictly the larger loss
    explained_variance: Tensor  # scalar, over this call's counted tokens only


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token, `[B, R]`: `-kl_coef * kl`, plus the score on the last counted token.

    That token is the EOS where the response has one. A row that counts nothing gets neither score nor penalty.

    Args:
        scores: `[B]`, of the whole responses.
        kl: `[B, R]`, the KL estimate at each token.
        response_mask: `[B, R]`, True where a token counts.
        kl_coef: price of one nat.
    """
    penalty = -kl_coef * zero_masked(kl, response_mask)
    final = torch.where(is_last_counted(response_mask), at_least_fp32(scores).unsqueeze(-1), 0.0)
    return penalty + final


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation over the counted tokens (arXiv:1506.02438, eq. 16); no gradient flows.

    The value after the last counted token is 0, truncated or not. Where the mask has holes (text that the actor did
    not write), the token before a hole is followed by the token after it, undiscounted, as in verl; a reward inside
    the hole is ignored. Masked positions are 0.

    Args:
        rewards: `[B, R]`.
        values: `[B, R]`, the critic's estimate before each token.
        response_mask: `[B, R]`, True where a token counts.
        gamma: discount per token.
        lam: 0 trusts the critic after one token, 1 takes the rewards to the end (Monte Carlo).
    """
    rewards, values = zero_masked(rewards, response_mask), zero_masked(values, response_mask)
    mask, advantages = response_mask.bool(), torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # delta_t = r_t + gamma V_{t+1} - V_t
        advantage = delta + gamma * lam * next_advantage  # A_t = delta_t + gamma lam A_{t+1}
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return Advantages(advantages=advantages, returns=advantages + values)


@dataclass(frozen=True)
class Surrogate:
    """How the ratio of new to old probability enters the actor's loss.

    Attributes:
        clip_range: the ratio is clipped to 1 -+ this, or to `(1 - low, 1 + high)` for a pair.
        kind: "clip" is PPO's minimum of the clipped and the unclipped term (arXiv:1707.06347, eq. 7). "cispo" clips the
            ratio as a constant weight of `-A log p`, so that every token keeps its gradient (arXiv:2506.13585, eq. 4).
        ratio: "token" has a ratio for each token; "sequence" one for each response, the geometric mean of those of its
            tokens (arXiv:2507.18071, eq. 7).
        dual_clip: if given, a number c > 1: where the advantage is negative, a clipped surrogate is at most
            `-c * advantage` (arXiv:1912.09729, eq. 5).
    """

    clip_range: float | tuple[float, float]
    _: KW_ONLY
    kind: str = "clip"
    ratio: str = "token"
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        _clip_bounds(self.clip_range)
        if self.kind not in ("clip", "cispo"):
            raise ValueError(f'found policy loss "{self.kind}", expected "clip" or "cispo"')
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f'found a ratio of "{self.ratio}", expected "token" or "sequence"')
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(
                f"found ppo.dual_clip={self.dual_clip}, expected a number above 1, or null to leave it out"
            )


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    surrogate: Surrogate,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> PolicyLoss:
    """The actor's loss, with the sign to minimise.

    The log-ratio is clamped to +-20, with gradient 0 beyond, so that one token gone astray gives neither inf nor NaN.

    Args:
        logprobs: `[B, R]` under the actor in training.
        old_logprobs: `[B, R]` under the actor that sampled.
        advantages: `[B, R]`.
        mask: `[B, R]`, True where a token counts.
        surrogate: kind of loss, of ratio and of clipping.
        weights: `[B, R]`, what each token counts in the loss, which is their sum; None is the mean.
        denominator: what to divide the sums of the statistics by, and of the loss without weights; the counted tokens
            of this call if None.
    """
    low, high = _clip_bounds(surrogate.clip_range)
    logprobs, advantages = zero_masked(logprobs, mask), zero_masked(advantages, mask)
    log_ratio = logprobs - zero_masked(old_logprobs, mask)
    if surrogate.ratio == "sequence":
        means = log_ratio.sum(-1, keepdim=True) / mask.bool().sum(-1, keepdim=True).clamp(min=1)  # [B, 1]
        log_ratio = zero_masked(means.expand_as(log_ratio), mask)
    log_ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()  # r = p_new / p_old
    within = ratio.clamp(1 - low, 1 + high)
    if surrogate.kind == "cispo":
        losses = -within.detach() * advantages * logprobs  # -sg[clip(r)] A log p
        cut = within != ratio
    else:
        unclipped, clipped = -advantages * ratio, -advantages * within  # -A r, -A clip(r, 1 - low, 1 + high)
        losses, cut = torch.maximum(unclipped, clipped), clipped > unclipped
    if surrogate.kind == "clip" and surrogate.dual_clip is not None:
        # A bad token grown likely cannot dominate the loss: min(loss, -c A) where A < 0.
        losses = torch.where(advantages < 0, torch.minimum(losses, -surrogate.dual_clip * advantages), losses)
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    return PolicyLoss(
        loss=weighted_sum(losses, mask, weights=weights, denominator=denominator),
        clip_fraction=masked_mean(cut, mask, denominator=denominator),
        approx_kl=masked_mean(torch.expm1(log_ratio) - log_ratio, mask, denominator=denominator),
        ratio_mean=masked_mean(ratio, mask, denominator=denominator),
        ratio_max=_largest(zero_masked(ratio, mask)),
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None,
    denominator: Tensor | float | None = None,
) -> ValueLoss:
    """Squared error of the critic, `0.5 * max(unclipped, clipped)`, the clipped value staying near the old one.

    Args:
        values: `[B, R]` of the critic in training.
        old_values: `[B, R]` of the critic before the update.
        returns: `[B, R]`.
        mask: `[B, R]`, True where a token counts.
        clip_range: how far, in units of value, the clipped value may go from the old one; None for no clipping.
        denominator: what to divide the sums by; the counted tokens of this call if None.
    """
    values, old_values, returns = (zero_masked(x, mask) for x in (values, old_values, returns))
    unclipped = clipped = (values - returns).square()  # (V - R)^2
    if clip_range is not None:
        low, high = _clip_bounds(clip_range)
        clipped = (old_values + (values - old_values).clamp(-low, high) - returns).square()
    return ValueLoss(
        loss=0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, denominator=denominator),
        clip_fraction=masked_mean(clipped > unclipped, mask, denominator=denominator),
        explained_variance=explained_variance(values, returns, mask),
    )


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """`1 - Var(returns - values) / Var(returns)` over counted tokens, a scalar; 0 where all returns are equal.

    1 is a perfect critic, 0 one no better than a constant, less than 0 one that is worse. It is a ratio of two
    variances, so micro-batches' values neither add up nor average: call this on the whole batch. Over ranks, add up
    `masked_moments` of the residuals and of the returns and divide their variances.

    Args:
        values: `[B, R]`.
        returns: `[B, R]`.
        mask: `[B, R]`, True where a token counts.
    """
    returns = zero_masked(returns, mask)
    unexplained = _variance(returns - zero_masked(values, mask), mask)
    total = _variance(returns, mask)
    return torch.where(total > 0, 1 - divide_by_count(unexplained, total), 0.0).to(returns.dtype)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_moments(x, mask, origin=masked_moments(x, mask).mean).variance


def _clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    low, high = (clip_range, clip_range) if isinstance(clip_range, (int, float)) else clip_range
    if not (low >= 0 and high >= 0):
        raise ValueError(f"found clip_range {clip_range}, expected a number of at least 0, or two of them (low, high)")
    return low, high


def _largest(x: Tensor) -> Tensor:
    return x.amax() if x.numel() else x.sum()
