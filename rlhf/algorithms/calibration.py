"""Calibration of a reward model: does it rank as many pairs right as its confidence claims, and what would correct it.

A reward model says that a response beats another with probability sigmoid(difference of their scores). Of a pair it is
known which one people chose, so the label of (chosen, rejected) would always be 1, and a table of it could only show
how sure the model is. What can be tested is the claim about the response that the model favours, whichever it is: it is
right with *confidence* sigmoid(|difference|), from one half up, and it was right or wrong. To draw by a coin which of
the two stands first gives the same table, mirrored about one half, with half of the pairs in each bin and the coin's
noise on top.

Left out: other losses than Bradley-Terry's, and intervals of the calibration error, which is biased upwards where bins
hold few pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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
