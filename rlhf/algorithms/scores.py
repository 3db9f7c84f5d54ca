"""Normalises scores, joins those of several sources, and penalises a missing EOS and overlong responses.

`[B]` out, in at least fp32. Scores of S sources are `[B, S]`, with NaN where a source does not apply to a response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.masked import at_least_fp32


def normalize_scores(scores: Tensor, *, mean: float, std: float, clamp: float | None) -> Tensor:
    """`(scores - mean) / std`, then clamped to +-`clamp`, `[B]`.

    Args:
        scores: `[B]`, in the reward model's own units.
        mean: of the reward model's scores on held-out data.
        std: of the same; positive.
        clamp: bound in units of `std`; 0 or None for no bound.
    """
    if not std > 0:
        raise ValueError(
            f"found a reward model whose scores have std {std}, expected a positive number; a model that scores all "
            "responses alike cannot be normalised, nor trained on"
        )
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"found ppo.score.clamp={clamp}, expected a positive number, or 0 for no bound")
    normalized = (at_least_fp32(scores) - mean) / std
    return normalized.clamp(-clamp, clamp) if clamp else normalized


def penalize_unended(scores: Tensor, ended: Tensor, *, penalty: float, kind: str) -> Tensor:
    """Lower the score of the responses that hit the length limit before a stop token, `[B]`.

    * "set": such a response scores `-penalty`, whatever it says (Huang et al. 2024, arXiv:2403.17031, with 1).
    * "subtract": such a response loses `penalty` (TRL's `missing_eos_penalty`).

    Args:
        scores: `[B]`, normalised.
        ended: `[B]` bool, True where the response ends with a stop token.
        penalty: at least 0, in the units of `scores`.
        kind: "set" or "subtract".
    """
    if not penalty >= 0:
        raise ValueError(
            f"found ppo.score.missing_eos_penalty={penalty}, expected at least 0: it is taken away, not added"
        )
    scores = at_least_fp32(scores)
    if kind == "set":
        return torch.where(ended.bool(), scores, -float(penalty))
    if kind == "subtract":
        return torch.where(ended.bool(), scores, scores - penalty)
    raise ValueError(f'found ppo.score.missing_eos_mode="{kind}", expected "set" or "subtract"')


def penalize_overlong(scores: Tensor, lengths: Tensor, *, limit: int, share: float, penalty: float) -> Tensor:
    """Lower the score of responses near the length limit, `[B]` (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 13).

    The last `share` of `limit` tokens is the buffer: over it the loss grows linearly from 0 to `penalty`.

    Args:
        scores: `[B]`.
        lengths: `[B]`, tokens of each response, at most `limit`.
        limit: most tokens that a response may have.
        share: length of the buffer as a share of `limit`, 0 to 1; 0 changes nothing.
        penalty: what a response of `limit` tokens loses, at least 0, in the units of `scores`.
    """
    buffer = share * limit
    if not buffer:
        return at_least_fp32(scores)
    beyond = (lengths - (limit - buffer)).clamp(min=0)  # tokens inside the buffer
    return at_least_fp32(scores) - penalty * beyond / buffer


def weighted_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the sources that apply to a response, `[B]`; NaN where none does.

    Args:
        scores: `[B, S]`, NaN where a source does not apply.
        weights: `[S]`.
    """
    scores = at_least_fp32(scores)
    total = (scores * weights.to(scores)).nansum(-1)
    return total.masked_fill(scores.isnan().all(-1), torch.nan)
