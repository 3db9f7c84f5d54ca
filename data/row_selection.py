"""Which rows of a data set a stage learns from, which are held out, and how often each is used: numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RowNumbers = NDArray[np.int64]


def rows_of_stage(num_rows: int, shares: Sequence[float], *, position: int, seed: int) -> RowNumbers:
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


def hold_out(rows: RowNumbers, fraction: float, *, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """Split `rows` into those to train on and `fraction` of them to evaluate on: at least one, never all.

    Each part keeps its order. The choice depends on the number of rows and `seed` alone, so stages that read the same
    file with the same fraction hold out the same rows.
    """
    count = min(max(round(fraction * len(rows)), fraction > 0), max(len(rows) - 1, 0))
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[np.random.default_rng(seed).permutation(len(rows))[:count]] = True
    return rows[~held_out], rows[held_out]


def weighted(rows: RowNumbers, weight: float, *, seed: int) -> RowNumbers:
    """`rows` as often as `weight` says: 0.5 takes half of them, 2 takes each twice, 1.5 all and half of them again.

    `seed` decides which half, and a larger fraction contains a smaller one. The order of `rows` is kept.

    Raises:
        ValueError: `weight` is not positive, or so small that no row is left.
    """
    if not weight > 0:
        raise ValueError(f"weight={weight}: expected a positive number; leave the data set out to use none of it.")
    whole = int(weight)
    extra = round((weight - whole) * len(rows))
    if len(rows) > 0 and whole == 0 and extra == 0:
        raise ValueError(f"weight={weight}: less than one of {len(rows)} rows; expected at least {1 / len(rows):.2g}.")
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:extra])
    return np.concatenate([rows] * whole + [rows[drawn]])
