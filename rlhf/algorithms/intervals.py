"""95% confidence intervals of shares, without torch: a report is written by a process that need not wait for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% confidence interval."""

    mean: float
    low: float
    high: float
    count: int
    """Number of observations; with none, everything else is NaN."""


def wilson(successes: float, count: int) -> Interval:
    """The score interval of a share (E. B. Wilson 1927, "Probable inference, the law of succession").

        centre = (p + z^2 / 2n) / (1 + z^2 / n)
        half   = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)

    It stays within 0 and 1 and is right for few observations, where p +- z sqrt(p (1 - p) / n) is not (Brown, Cai and
    DasGupta 2001, "Interval estimation for a binomial proportion"). Observations between 0 and 1, such as a tie that
    counts one half, make it wider than it need be, never narrower: of all distributions on [0, 1] with mean p, that of
    zeros and ones has the largest variance, p (1 - p) (Bhatia and Davis 2000).

    Args:
        successes: sum of the observations, each from 0 to 1.
        count: their number.
    """
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    share, square = successes / count, Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    # Rounding alone would leave 1e-17 beside a share of 0 or 1.
    low = 0.0 if successes == 0 else max(centre - half, 0.0)
    high = 1.0 if successes == count else min(centre + half, 1.0)
    return Interval(share, low, high, count)


def share_change(before: Interval, after: Interval) -> Interval:
    """The difference of two shares, from their Wilson intervals; too wide if both have the same observations.

    Method 10 of Newcombe 1998, "Interval estimation for the difference between independent proportions".
    """
    down = math.hypot(after.mean - after.low, before.high - before.mean)
    up = math.hypot(after.high - after.mean, before.mean - before.low)
    mean = after.mean - before.mean
    return Interval(mean, mean - down, mean + up, min(before.count, after.count))
