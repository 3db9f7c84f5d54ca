"""Advantages without a critic: each response is compared with others to the same prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.masked import at_least_fp32


def group_advantages(
    scores: Tensor, *, kind: str, group_size: int | None = None, groups: Tensor | None = None, eps: float = 1e-4
) -> Tensor:
    """Advantage of each response over its group, `[B]`. Equal scores give exactly 0, and so does a group of one.

    * "grpo": `(score - mean) / (std + eps)` (Shao et al. 2024, arXiv:2402.03300), with the sample standard deviation
      (divided by the group's size - 1) that TRL, verl and OpenRLHF all use; their eps are 1e-4, 1e-6 and 1e-9.
    * "dr_grpo": `score - mean`, which does not favour prompts whose scores are close (Liu et al. 2025,
      arXiv:2503.20783).
    * "rloo": `score - mean of the others` (Ahmadian et al. 2024, arXiv:2402.14740).

    Args:
        scores: `[B]`, finite.
        kind: "grpo", "dr_grpo" or "rloo".
        group_size: responses per prompt, at least 2, where they stand in consecutive rows.
        groups: `[B]` int64, equal for the responses to one prompt, where groups have lost members. Give one of both.
        eps: added to the standard deviation.
    """
    places = _places(_numbers(scores, group_size) if groups is None else groups)
    values = _grid(at_least_fp32(scores), places)
    counted = _grid(torch.ones_like(scores, dtype=torch.bool), places)
    sizes = counted.sum(-1, keepdim=True)
    offsets = (values - values[:, :1]) * counted  # measured from the group's first score: equal scores are exactly 0
    centered = (offsets - offsets.sum(-1, keepdim=True) / sizes) * counted
    others = (sizes - 1).clamp(min=1)
    if kind == "grpo":
        deviation = (centered.square().sum(-1, keepdim=True) / others).sqrt()
        centered = centered / (deviation + eps)
    elif kind == "rloo":
        centered = centered * (sizes / others)  # s_i - sum_{j != i} s_j / (n - 1) = (s_i - mean) n / (n - 1)
    elif kind != "dr_grpo":
        raise ValueError(f'found group advantage "{kind}", expected "grpo", "dr_grpo" or "rloo"')
    return centered[places.row, places.column]


class _Places(NamedTuple):
    """Position of each response in a grid with one row per group."""

    row: Tensor  # [B] int64
    column: Tensor  # [B] int64


def _places(groups: Tensor) -> _Places:
    _, row, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    first = sizes.cumsum(0) - sizes  # of each group, in that order
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - first[row[order]]
    return _Places(row, column)


def _grid(values: Tensor, places: _Places) -> Tensor:
    """`[B]` as `[groups, size of the largest]`, 0 where a group has no more members."""
    grid = values.new_zeros(int(places.row.max()) + 1, int(places.column.max()) + 1)
    return grid.index_put((places.row, places.column), values)


def _numbers(scores: Tensor, group_size: int | None) -> Tensor:
    """The number of each row's group, `[B]`, where consecutive rows form one."""
    if group_size is None or group_size < 2:
        raise ValueError(f"found groups of {group_size}, expected at least 2 responses per prompt to compare")
    if scores.dim() != 1 or scores.shape[0] % group_size:
        raise ValueError(
            f"found scores of shape {tuple(scores.shape)}, expected [B] with B a multiple of {group_size}, "
            "the number of responses per prompt"
        )
    return torch.arange(len(scores), device=scores.device) // group_size
