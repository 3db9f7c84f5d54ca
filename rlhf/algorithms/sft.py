"""The loss of supervised fine-tuning: the mean negative log-probability of the tokens to learn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.logprobs import token_logprobs
from rlhf.algorithms.masked import masked_mean


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


def sft_loss(
    logits: Tensor,
    input_ids: Tensor,
    target_mask: Tensor,
    *,
    denominator: Tensor | float | None = None,
    chunk_elements: int | None = None,
) -> SFTLoss:
    """`-sum(log p(token | tokens before it)) / denominator` over the target tokens; 0 where there are none.

    Args:
        logits: `[B, T, V]` of the whole sequences, of any floating dtype; no fp32 copy of them is made.
        input_ids: `[B, T]`; padding holds any valid id.
        target_mask: `[B, T]`, True where a token is to be learnt, predicted from those before it.
        denominator: target tokens to divide by, the global count where batches are cut (see `count_targets`); those
            of this call if None.
        chunk_elements: as in `token_logprobs`.
    """
    if logits.shape[:-1] != input_ids.shape or input_ids.shape != target_mask.shape:
        raise ValueError(
            f"found logits of shape {tuple(logits.shape)}, input_ids of {tuple(input_ids.shape)} and a target_mask of "
            f"{tuple(target_mask.shape)}, expected [B, T, V], [B, T] and [B, T]"
        )
    targets, mask = input_ids[:, 1:], target_mask[:, 1:]
    with torch.no_grad():
        is_first_choice = logits[:, :-1].argmax(-1) == targets
    logprobs = token_logprobs(logits, targets, chunk_elements=chunk_elements)
    return SFTLoss(
        loss=masked_mean(-logprobs, mask, denominator=denominator),
        num_tokens=count_targets(target_mask),
        accuracy=masked_mean(is_first_choice, mask, denominator=denominator),
    )
