"""How much of each data set is used."""

from __future__ import annotations

import numpy as np

from data.split import Indices


def weighted(rows: Indices, weight: float, *, seed: int) -> Indices:
    """`rows` as often as `weight` says: 0.5 takes half of them, 2 takes each twice, 1.5 all and half of them again.

    Which half is drawn by `seed`, and a larger fraction contains a smaller one. The order of `rows` is kept.

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
