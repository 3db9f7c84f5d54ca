"""95% confidence intervals of means, and the calibration of a reward model. See also: `intervals.py`, for shares.

A mean has the percentiles of a seeded bootstrap. Left out: statistics that are no means, such as the share of distinct
words: drawing with replacement repeats texts, and so changes what is measured.

A reward model says that a response beats another with probability sigmoid(difference of their scores). The label of
(chosen, rejected) is always 1, so a table of it could only show how sure the model is. What can be tested is the
response that the model favours: it is right with *confidence* sigmoid(|difference|), from one half up, and it was right
or wrong. To draw by a coin which of the two stands first gives the same table, mirrored about one half, with the coin's
noise on top. Left out: other losses than Bradley-Terry's, and intervals of the calibration error, which is biased
upwards where bins hold few pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algorithms.intervals import Interval

RESAMPLES = 2_000
_AT_ONCE = 1 << 22  # draws that are held in memory


def bootstrap_mean(values: Tensor, *, seed: int, weights: Tensor | None = None, resamples: int = RESAMPLES) -> Interval:
    """The mean of `values` `[N]`, and the 2.5th and 97.5th percentile of the means of samples drawn from them.

    The percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13). The same seed
    and N draw the same rows: intervals of two columns of one table can be compared.

    Args:
        values: `[N]`, independent of each other.
        seed: of the draws.
        weights: `[N]`; the mean is then `sum(weights * values) / sum(weights)`, of every sample too.
        resamples: samples of N that are drawn.
    """
    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    values = values.detach().double().cpu()
    weights = torch.ones_like(values) if weights is None else weights.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _AT_ONCE // count)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    draws = (torch.randint(count, (size, count), generator=generator) for size in sizes)
    means = [(weights * values)[rows].sum(-1) / weights[rows].sum(-1) for rows in draws]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float((weights * values).sum() / weights.sum()), low, high, count)


BINS = 10
_STEPS = 200
_LARGEST = 1e6  # 1 / temperature


@dataclass(frozen=True)
class Bin:
    """Pairs for which a model has about the same confidence."""

    low: float
    """Lower edge of the bin, as a confidence."""
    high: float
    confidence: float
    """Mean confidence."""
    right: float
    """Pairs, out of `count`, in which people chose what the model prefers; equal scores count one half."""
    count: int


def reliability(differences: Tensor, *, bins: int = BINS) -> list[Bin]:
    """The reliability table of pairs, without empty bins.

    Args:
        differences: `[N]`, chosen minus rejected score.
        bins: of equal width, from confidence 0.5 to 1.
    """
    differences = differences.detach().double()
    confidence = differences.abs().sigmoid()
    right = (differences > 0).double() + 0.5 * (differences == 0).double()
    places = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table = []
    for place in sorted(set(places.tolist())):
        here = places == place
        low, high = (0.5 + (place + side) / (2 * bins) for side in (0, 1))
        claimed, found = float(confidence[here].mean()), float(right[here].sum())
        table.append(Bin(low, high, confidence=claimed, right=found, count=int(here.sum())))
    return table


def expected_calibration_error(table: list[Bin]) -> float:
    """`sum over bins of count / N * |right / count - confidence|` (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    total = sum(row.count for row in table)
    return sum(abs(row.right - row.count * row.confidence) for row in table) / total if total else math.nan


def preference_nll(differences: Tensor, *, temperature: float = 1.0) -> float:
    """Mean of `-log sigmoid(difference / temperature)` over pairs `[N]`, in nats."""
    return float(-logsigmoid(differences.detach().double() / temperature).mean())


def fitted_temperature(differences: Tensor) -> float | None:
    """The temperature T > 0 that makes `preference_nll` of these pairs smallest (Guo et al. 2017, section 4.2).

    Above 1 the model is too sure of itself. With b = 1 / T the loss is convex, and its slope

        -mean(difference * sigmoid(-b * difference))

    grows with b, so its root is found by bisection. None where there is none: all pairs are right, and the surer the
    better; or the differences have no positive mean, and no confidence at all is best.

    Args:
        differences: `[N]`, chosen minus rejected score.
    """
    differences = differences.detach().double()
    if len(differences) == 0 or float(differences.mean()) <= 0 or bool((differences >= 0).all()):
        return None

    def slope(inverse: float) -> float:
        return float(-(differences * torch.sigmoid(-inverse * differences)).mean())

    low, high = 0.0, 1.0
    while slope(high) < 0 and high < _LARGEST:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high
