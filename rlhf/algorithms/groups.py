"""Advantages without a critic: each response is compared with others to the same prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.masked import at_least_fp32


def group_advantages(scores: Tensor, *, groups: Tensor, baseline: str, scale: str = "none", eps: float) -> Tensor:
    """Advantage of each response over its group, `[B]`. Equal scores give exactly 0, and so does a group of one.

    Baselines:

    * "mean": `score - mean of the group`. With scale "group" that is GRPO (Shao et al. 2024, arXiv:2402.03300, section
      4.1.2); with "none" Dr. GRPO, which does not favour prompts whose scores are close (Liu et al. 2025,
      arXiv:2503.20783).
    * "others": `score - mean of the others`, which is leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740).

    Scales:

    * "group": divided by the group's standard deviation + eps; the sample deviation (divided by the group's size - 1)
      that TRL, verl and OpenRLHF all use, with eps 1e-4, 1e-6 and 1e-9.
    * "batch": divided by the sample deviation of all scores + eps, so that a group whose scores nearly agree is not
      amplified (Liu et al. 2025, "Tricks or traps", arXiv:2508.08221).
    * "none": in the units of the scores.

    Args:
        scores: `[B]`, finite.
        groups: `[B]` int64, equal for the responses to one prompt.
        baseline: "mean" or "others".
        scale: "group", "batch" or "none".
        eps: added to a standard deviation.
    """
    scores = at_least_fp32(scores)
    places = _places(groups)
    values, counted = _grid(scores, places), _grid(torch.ones_like(scores, dtype=torch.bool), places)
    sizes = counted.sum(-1, keepdim=True)
    others = (sizes - 1).clamp(min=1)
    offsets = (values - values[:, :1]) * counted  # measured from the group's first score: equal scores are exactly 0
    centered = (offsets - offsets.sum(-1, keepdim=True) / sizes) * counted
    deviation = (centered.square().sum(-1, keepdim=True) / others).sqrt()
    if baseline == "others":
        centered = centered * (sizes / others)  # s_i - sum_{j != i} s_j / (n - 1) = (s_i - mean) n / (n - 1)
    elif baseline != "mean":
        raise ValueError(f'found group baseline "{baseline}", expected "mean" or "others"')
    if scale == "group":
        centered = centered / (deviation + eps)
    elif scale == "batch":
        centered = centered / ((scores - scores[0]).std(correction=min(1, len(scores) - 1)) + eps)
    elif scale != "none":
        raise ValueError(f'found scale "{scale}" of group advantages, expected "group", "batch" or "none"')
    return centered[places.row, places.column]


def groups_that_differ(scores: Tensor, groups: Tensor) -> Tensor:
    """True for the responses whose group has more than one score, `[B]` bool: the others have no advantage.

    Args:
        scores: `[B]`, finite.
        groups: `[B]` int64, equal for the responses to one prompt.
    """
    _, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    lowest, highest = (
        scores.new_zeros(len(sizes)).scatter_reduce(0, group, scores, kind, include_self=False)
        for kind in ("amin", "amax")
    )  # [groups]
    return (highest > lowest)[group]


def normalize_in_groups(scores: Tensor, groups: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Scores of each source less their mean in the group, divided by their sample deviation there + eps, `[B, S]`.

    So no source drowns the others' differences, whatever its units (GDPO; TRL's `normalize_then_sum`). A source counts
    only the responses it applies to; where these agree, or there are fewer than two, it gives 0.

    Args:
        scores: `[B, S]`, NaN where a source does not apply, which stays.
        groups: `[B]` int64, equal for the responses to one prompt.
        eps: added to a deviation.
    """
    places, normalized = _places(groups), []
    for values in at_least_fp32(scores).T:
        grid, counted = _grid(values.nan_to_num(0.0), places), _grid(~values.isnan(), places)
        sizes = counted.sum(-1, keepdim=True)
        first = grid.gather(-1, counted.int().argmax(-1, keepdim=True))  # offsets from it: equal scores are exactly 0
        offsets = (grid - first) * counted
        centered = (offsets - offsets.sum(-1, keepdim=True) / sizes.clamp(min=1)) * counted
        deviation = (centered.square().sum(-1, keepdim=True) / (sizes - 1).clamp(min=1)).sqrt()
        column = (centered / (deviation + eps))[places.row, places.column]
        normalized.append(column.masked_fill(values.isnan(), torch.nan))
    return torch.stack(normalized, dim=1)


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
