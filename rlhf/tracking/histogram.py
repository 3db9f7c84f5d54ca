"""How the numbers of a tensor are distributed, counted where they are: ranks add up their counts, not their numbers.

Bins are powers of two of the magnitude, one set for each sign, because gradients and weights spread over many orders.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST, HIGHEST = -40, 8  # powers of two: what is smaller counts as zero, what is larger as the largest
_POWERS = HIGHEST - LOWEST
BINS = 2 * _POWERS + 1
"""Negative numbers, from the largest magnitude down; zero; positive numbers."""


class Histogram(NamedTuple):
    """Counts between edges."""

    counts: list[int]
    edges: list[float]  # one more than counts, rising


def count(values: Tensor) -> Tensor:
    """How many of `values` fall into each bin, `[BINS]` int64 on their device; what is not finite is not counted."""
    numbers = values.detach().reshape(-1).float()
    numbers = numbers[numbers.isfinite()]
    _, exponents = torch.frexp(numbers)  # magnitude in [2 ** (exponent - 1), 2 ** exponent)
    powers = (exponents.long() - 1 - LOWEST).clamp(max=_POWERS - 1)
    is_zero = (numbers == 0) | (powers < 0)
    sides = torch.where(numbers < 0, _POWERS - 1 - powers, _POWERS + 1 + powers)
    return torch.bincount(torch.where(is_zero, _POWERS, sides), minlength=BINS)


def histogram(counts: Tensor) -> Histogram:
    """The counts of `count`, with the edges of their bins, without the empty bins at both ends."""
    edges = [2.0**power for power in range(LOWEST, HIGHEST + 1)]
    borders = [*(-edge for edge in reversed(edges)), *edges]
    found = counts.tolist()
    used = [index for index, number in enumerate(found) if number] or [_POWERS]
    first, last = used[0], used[-1] + 1
    return Histogram(found[first:last], borders[first : last + 1])
