"""The losses of supervised fine-tuning and reward modelling: of tokens to learn, and of pairs of responses.

The pairwise loss is -log P(chosen beats rejected) with P = sigmoid(chosen - rejected) (Bradley and Terry 1952), as in
Stiennon et al. 2020 (arXiv:2009.01325); its margin is that of Touvron et al. 2023 (arXiv:2307.09288, eq. 2), its
centring that of Eisenstein et al. 2023 (arXiv:2312.09244).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algorithms.logprobs import TokenStatistics
from rlhf.algorithms.masked import at_least_fp32, divide_by_count, masked_mean


class SFTLoss(NamedTuple):
    """The loss and, detached, two diagnostics; all three add up over micro-batches given a global denominator."""

    loss: Tensor  # scalar, nats per token
    num_tokens: Tensor  # scalar int64, the target tokens of this call
    accuracy: Tensor  # scalar, share of target tokens that are the model's first choice


def count_targets(target_mask: Tensor) -> Tensor:
    """The number of tokens that `sft_loss` averages over, a scalar int64: sum it over the batch for the denominator.

    Args:
        target_mask: `[B, T]`, True where a token is to be learnt; the first token has nothing before it and never
            counts.
    """
    return target_mask[:, 1:].bool().sum()


def sft_loss(statistics: TokenStatistics, target_mask: Tensor, *, denominator: Tensor | float | None = None) -> SFTLoss:
    """`-sum(log p(token | tokens before it)) / denominator` over the target tokens; 0 where there are none.

    Args:
        statistics: of every token but the first, `[B, T - 1]` each; what those say that are no target does not matter.
        target_mask: `[B, T]`, True where a token is to be learnt, predicted from those before it.
        denominator: target tokens to divide by, the global count where batches are cut (see `count_targets`); those
            of this call if None.
    """
    mask = target_mask[:, 1:]
    return SFTLoss(
        loss=masked_mean(-statistics.logprobs, mask, denominator=denominator),
        num_tokens=count_targets(target_mask),
        accuracy=masked_mean(statistics.first_choice, mask, denominator=denominator),
    )


class PreferenceLoss(NamedTuple):
    """The loss and, detached, two diagnostics; all three add up over micro-batches given a global denominator."""

    loss: Tensor  # scalar
    accuracy: Tensor  # scalar, share of pairs whose chosen score is strictly larger; a tie is an error
    margin: Tensor  # scalar, mean of chosen - rejected


def pairwise_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_coef: float = 0.0,
    denominator: Tensor | float | None = None,
) -> PreferenceLoss:
    """`mean(-log sigmoid(c - r - margin)) + center_coef * mean((c + r)^2)`, computed in at least fp32.

    Args:
        chosen_scores: `[B]`, c.
        rejected_scores: `[B]`, r.
        margin: `[B]` or a number, by how much the chosen score should win; none if None.
        center_coef: pulls the two scores of a pair towards opposite values, which the first term leaves open.
        denominator: pairs to divide by, the global count where batches are cut; B if None.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(chosen_scores, rejected_scores, margin)
    chosen, rejected = at_least_fp32(chosen_scores), at_least_fp32(rejected_scores)
    difference = chosen - rejected
    losses = -logsigmoid(difference if margin is None else difference - margin)
    if center_coef:
        losses = losses + center_coef * (chosen + rejected).square()
    count = chosen.numel() if denominator is None else denominator
    return PreferenceLoss(
        loss=divide_by_count(losses.sum(), count),
        accuracy=divide_by_count((difference > 0).to(losses.dtype).sum(), count),
        margin=divide_by_count(difference.detach().sum(), count),
    )


def _check_shapes(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | float | None) -> None:
    expected = chosen_scores.shape
    allowed_margins = (expected, ())
    if rejected_scores.shape != expected or (isinstance(margin, Tensor) and margin.shape not in allowed_margins):
        margin_shape = tuple(margin.shape) if isinstance(margin, Tensor) else "a number"
        raise ValueError(
            f"found chosen scores of shape {tuple(expected)}, rejected scores of shape {tuple(rejected_scores.shape)} "
            f"and a margin of {margin_shape}, expected the same [B] for all"
        )
