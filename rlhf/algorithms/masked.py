"""Sums, means and whitening over the tokens that count.

A mask is bool and True where a position counts; a mask of zeros and ones is read the same way. What stands at a masked
position, NaN included, changes no result, and the gradient of a result with respect to it is exactly 0: every input
passes through `zero_masked` first. That is no promise for the model that computed it: if the model's own derivative is
not finite there, its backward multiplies 0 by that, which is NaN. So rows with such numbers are taken out of a batch
before its forward (`rlhf/rollout.py`), not masked.

Left out: reductions over ranks. `masked_moments` returns three sums for the caller to add up (see `Moments`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it is fp64 already; bf16, fp16, integers and bools are promoted. Same shape.

    All arithmetic here is done in that precision, whatever type the models compute in.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in at least fp32 with 0 at masked positions, `[...]`; its gradient there is exactly 0.

    Args:
        x: values of any shape `[...]` and dtype.
        mask: `[...]`, True where a value counts.

    Raises:
        ValueError: if the shapes differ; broadcasting a mask would count values more than once.
    """
    if x.shape != mask.shape:
        raise ValueError(
            f"found a mask of shape {tuple(mask.shape)} for values of shape {tuple(x.shape)}, expected equal shapes; "
            "expand the mask to the values it speaks of"
        )
    return torch.where(mask.bool(), at_least_fp32(x), 0.0)


def divide_by_count(total: Tensor, count: Tensor | float) -> Tensor:
    """`total / count`, where a count of 0 is read as 1: a sum over nothing is 0, and so is its gradient.

    A tensor count is never read by the host, so this does not wait for the GPU.
    """
    if isinstance(count, Tensor):
        return total / torch.where(count == 0, 1, count)
    return total / (count or 1)


def masked_mean(x: Tensor, mask: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """`sum(x[mask]) / denominator`, a scalar in at least fp32; 0 with gradient 0 where nothing counts.

    Args:
        x: `[...]`.
        mask: `[...]`, True where a value counts.
        denominator: the number to divide by; `mask.sum()` if None. Give every micro-batch of every rank the *global*
            count, and the results add up to the global mean, however the batch was cut.
    """
    return divide_by_count(zero_masked(x, mask).sum(), mask.bool().sum() if denominator is None else denominator)


def weighted_sum(
    x: Tensor, mask: Tensor, *, weights: Tensor | None, denominator: Tensor | float | None = None
) -> Tensor:
    """Sum of the counted values times their weights, a scalar in at least fp32; without weights the `masked_mean`.

    Args:
        x: `[...]`.
        mask: `[...]`, True where a value counts.
        weights: `[...]` of a whole minibatch, such as `aggregation_weights`; None divides by `denominator` instead.
        denominator: as for `masked_mean`.
    """
    if weights is None:
        return masked_mean(x, mask, denominator=denominator)
    return (zero_masked(x, mask) * zero_masked(weights, mask)).sum()


def is_last_counted(mask: Tensor) -> Tensor:
    """True at the last counted position of each row, `[B, R]` bool; a row that counts nothing has none.

    Args:
        mask: `[B, R]`, True where a token counts; the counted tokens need not be adjacent.
    """
    counted_from_here_on = mask.bool().flip(-1).cumsum(-1).flip(-1)
    return mask.bool() & (counted_from_here_on == 1)


class Moments(NamedTuple):
    """Three sums over counted values, measured from an origin: all that whitening needs to know of the other ranks.

    They are fp64 scalars and add up over micro-batches and ranks:
    `Moments(*sum_over_ranks(torch.stack(masked_moments(x, mask))))`.
    """

    num_counted: Tensor  # how many values count
    total: Tensor  # sum of x - origin
    total_of_squares: Tensor  # sum of (x - origin)^2

    @property
    def mean(self) -> Tensor:
        """E[x - origin], 0 where nothing counts."""
        return divide_by_count(self.total, self.num_counted)

    @property
    def variance(self) -> Tensor:
        """Biased variance E[(x - origin)^2] - E[x - origin]^2, whatever the origin; 0 where nothing counts."""
        return (divide_by_count(self.total_of_squares, self.num_counted) - self.mean**2).clamp(min=0)


def masked_moments(x: Tensor, mask: Tensor, *, origin: Tensor | float = 0.0) -> Moments:
    """The sums of the counted values and of their squares, measured from `origin`.

    The sums are fp64, in which the square of an fp32 number is exact, so for fp32 values one pass from origin 0 loses
    nothing that the values themselves still had. Two passes are exact for fp64 values too: reduce the moments, take
    their mean, and reduce the moments about that mean, as `masked_whiten` does.

    Args:
        x: `[...]`.
        mask: `[...]`, True where a value counts.
        origin: the point to measure from; the same on every rank whose moments are added.
    """
    offsets = zero_masked(zero_masked(x, mask).double() - origin, mask)
    return Moments(mask.bool().sum().double(), offsets.sum(), offsets.square().sum())


def whiten_with(
    x: Tensor, mask: Tensor, *, mean: Tensor | float, variance: Tensor | float, center: bool = True, eps: float = 1e-8
) -> Tensor:
    """Whiten with a mean and a variance taken elsewhere, such as over all ranks; masked positions are 0, `[...]`.

    Args:
        x: `[...]`.
        mask: `[...]`, True where a value counts.
        mean: of the population that `x` is a part of.
        variance: of that population, biased.
        center: if False the mean is added back, so that only the spread changes (as for rewards).
        eps: added to the variance.
    """
    values = zero_masked(x, mask)
    whitened = (values.double() - mean) * (variance + eps) ** -0.5  # (x - mean) / sqrt(variance + eps)
    if not center:
        whitened = whitened + mean
    return zero_masked(whitened, mask).to(values.dtype)


def masked_whiten(x: Tensor, mask: Tensor, *, center: bool = True, eps: float = 1e-8) -> Tensor:
    """Give the counted values mean 0 and variance 1; masked positions are 0, `[...]` in at least fp32.

    The variance is biased (divided by the count), as in the OpenAI 2019 code and OpenRLHF; TRL and verl divide by
    count - 1. Two passes over the data. Equal values, a single value and no value at all give 0.

    Args:
        x: `[...]`.
        mask: `[...]`, True where a value counts.
        center: if False the mean is added back after scaling.
        eps: added to the variance.
    """
    mean = masked_moments(x, mask).mean
    variance = masked_moments(x, mask, origin=mean).variance
    return whiten_with(x, mask, mean=mean, variance=variance, center=center, eps=eps)
