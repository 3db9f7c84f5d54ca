"""Positions of padded sequences."""

from __future__ import annotations

from torch import Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position of every token among the real ones, so that left and right padding give equal results.

    Args:
        attention_mask: `[B, T]`, True where a real token is.

    Returns:
        `[B, T]` int64; padding has whatever position is near, and 0 before the first real token.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
