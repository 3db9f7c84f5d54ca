"""How much each response token counts in the actor's loss: the mean that a paper writes, and two kinds of correction.

An objective over G responses is written as a mean of means, a mean over tokens or a sum over a constant. All three are
`(weights * loss).sum()` with weights `[B, R]` that depend on the masks alone. Weights of a whole minibatch stay right
however it is cut into micro-batches and dealt to ranks, since the parts add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.masked import zero_masked


def aggregation_weights(mask: Tensor, *, kind: str, length: int) -> Tensor:
    """Weight of each token in the loss of a minibatch, `[B, R]` fp32; 0 where it does not count.

    * "token_mean": every token of the minibatch weighs the same, so long responses weigh more. PPO, and DAPO (Yu et
      al. 2025, arXiv:2503.14476, section 3.3).
    * "sequence_mean": the mean over sequences of the mean over their tokens. GRPO (Shao et al. 2024,
      arXiv:2402.03300, eq. 3) and GSPO (Zheng et al. 2025, arXiv:2507.18071, eq. 5).
    * "constant": the sum over tokens, divided by B x `length`, so that a response's length changes nothing for its
      tokens. Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section 3.2).

    A response without a counted token is no part of a mean; "constant" divides by all B.

    Args:
        mask: `[B, R]`, True where a token counts, for the whole minibatch of all ranks.
        kind: "token_mean", "sequence_mean" or "constant".
        length: most tokens that a response may have; read by "constant" alone.
    """
    counted = mask.float()
    lengths = counted.sum(-1, keepdim=True)  # [B, 1]
    if kind == "token_mean":
        return counted / lengths.sum().clamp(min=1)
    if kind == "sequence_mean":
        return counted / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)
    if kind == "constant":
        return counted / (len(mask) * length)
    raise ValueError(f'found loss aggregation "{kind}", expected "token_mean", "sequence_mean" or "constant"')


@torch.no_grad()
def mismatch_weights(
    logprobs: Tensor, generation_logprobs: Tensor, mask: Tensor, *, kind: str, bounds: tuple[float, float]
) -> Tensor:
    """Importance weights of tokens that one path generated and another trains on, `[B, R]` fp32; 0 where masked.

    Both paths have the same weights, but other kernels, shapes or precisions, so the tokens are samples of slightly
    other probabilities than those that training divides by. The ratio is w = p_training / p_generation.

    * "token_truncate": min(w, high) of each token (truncated importance sampling, Yao et al. 2025, "Your efficient RL
      framework secretly brings you off-policy RL training").
    * "token_mask": w where low <= w <= high, else 0 (IcePop, Ling team 2025).
    * "sequence_mask": for a whole response, w of the product of its ratios where that is within the bounds, else 0
      (masked importance sampling, Liu et al. 2025, "When speed kills stability").

    Args:
        logprobs: `[B, R]` by the path that trains, of the actor that sampled.
        generation_logprobs: `[B, R]` by the path that generated.
        mask: `[B, R]`, True where a token counts.
        kind: one of the three.
        bounds: low and high; low is read by the masks alone.
    """
    log_ratio = zero_masked(logprobs, mask) - zero_masked(generation_logprobs, mask)
    if kind == "sequence_mask":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)  # [B, R], the same in a row
    ratio, (low, high) = log_ratio.exp(), bounds
    if kind == "token_truncate":
        weights = ratio.clamp(max=high)
    elif kind in ("token_mask", "sequence_mask"):
        weights = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    else:
        raise ValueError(
            f'found mismatch correction "{kind}", expected "token_truncate", "token_mask" or "sequence_mask"'
        )
    return zero_masked(weights, mask)
