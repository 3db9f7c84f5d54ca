"""Which rows belong to which stage, and which are held out: numbers only, no rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class HoldOut:
    """Row numbers to learn from and to evaluate on."""

    train: Indices
    eval: Indices


def stage_rows(num_rows: int, shares: Sequence[float], *, position: int, seed: int) -> Indices:
    """The rows of the stage at `position`, in the order of DeepSpeed-Chat's `--data_split`.

    The same numbers as its `get_raw_dataset_split_index`: boundaries are running sums of rounded shares, moved together
    until the last one fits, over a permutation by `numpy.random.RandomState(seed)`. One difference: with a handful of
    rows a boundary can become negative there, which gives rows to two stages; here it is 0.

    Args:
        num_rows: Rows of the data set.
        shares: `data.stage_split`, of any sum; empty gives every stage all rows in their own order.
        position: 0, 1 or 2 for sft, reward and ppo.
        seed: `data.split_seed`.
    """
    if not shares:
        return np.arange(num_rows)
    counts = [round(share / sum(shares) * float(num_rows)) for share in shares]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    bounds[1:] -= bounds[-1] - num_rows
    start, end = bounds.clip(min=0)[position : position + 2]
    order = np.arange(num_rows)
    np.random.RandomState(seed).shuffle(order)
    return order[start:end]


def hold_out(rows: Indices, fraction: float, *, seed: int) -> HoldOut:
    """Take `fraction` of `rows` away for evaluation: at least one row, never all; each part keeps its order.

    The choice depends on the number of rows and `seed` alone, so stages that read the same file with the same
    fraction hold out the same rows.
    """
    count = min(max(round(fraction * len(rows)), fraction > 0), max(len(rows) - 1, 0))
    held = np.zeros(len(rows), dtype=bool)
    held[np.random.default_rng(seed).permutation(len(rows))[:count]] = True
    return HoldOut(train=rows[~held], eval=rows[held])
