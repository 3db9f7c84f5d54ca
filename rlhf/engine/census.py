"""How gradients and weights are distributed, counted as the update passes over them, wherever they rest.

Left out: when to count (`session.py`), where the counts go, and a loss scale that changes while a delayed update
is on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from rlhf.engine.adam_kernel import Piece
from rlhf.engine.loss_scale import LossScale
from rlhf.runtime.dist import sum_over_ranks
from rlhf.tracking.histogram import BINS, Histogram, count, histogram


class Census:
    """Counts of one or several steps."""

    def __init__(self, names: Sequence[str], *, loss_scale: LossScale, left_out: Collection[str]) -> None:
        """Count from now on.

        Args:
            names: the parameters that learn, the same on every rank.
            loss_scale: by which the gradients of a step are too large; it may change from step to step.
            left_out: parameters that another rank counts.
        """
        self._places = {name: place for place, name in enumerate(names)}
        self._counts = torch.zeros(len(names), 2, BINS, dtype=torch.int64)
        self._loss_scale = loss_scale
        self._left_out = left_out

    def note(self, piece: Piece) -> None:
        """Count a gradient before clipping, and the weights before their update."""
        if piece.name in self._left_out:
            return
        own = self._counts[self._places[piece.name]]
        own[0] += count(piece.gradient / self._loss_scale.value).cpu()
        own[1] += count(piece.weight).cpu()

    def over_ranks(self) -> dict[str, Histogram]:
        """Of all ranks, `gradients/NAME` and `weights/NAME`, without parameters that had no update; all must call."""
        totals = sum_over_ranks(self._counts)
        counted = {name: totals[place] for name, place in self._places.items() if totals[place].any()}
        return {
            f"{family}/{name}": histogram(counts[row])
            for row, family in enumerate(("gradients", "weights"))
            for name, counts in counted.items()
        }
