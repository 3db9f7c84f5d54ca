"""An exponential moving average of the weights that a model learns, kept shard by shard beside its optimizer state.

After each optimizer step, average <- decay * average + (1 - decay) * weight, in fp32. It costs 4 bytes per trained
parameter and one pass over the masters. `exchanged` puts the average into the model for an evaluation or an export, one
parameter at a time, so that no second copy of the weights is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf.engine.adamw import AdamW


class WeightAverage:
    """The average of the masters of one optimizer, each where that master is."""

    def __init__(self, optimizer: AdamW, *, decay: float) -> None:
        """Start at the present weights; `decay` from 0 (the last weights) to below 1."""
        self._optimizer, self._decay = optimizer, decay
        self.shards: dict[str, Tensor] = {
            name: self._master(name).clone() for group in optimizer.groups for name in group
        }

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after a step; on a CUDA device nothing waits."""
        for name, average in self.shards.items():
            average.lerp_(self._master(name), 1 - self._decay)  # a + (w - a) (1 - decay)

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside, the model has the average for its weights, and the average is where the weights were.

        Moments and counters stay, so nothing may be trained inside. Afterwards every bit is as before.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.shards.items():
            weight = self._master(name).clone()  # before it is overwritten: `read_shard` may return the memory itself
            self._optimizer.write_shard(name, average, key="weight")  # the working weights follow, rounded
            average.copy_(weight)

    def read(self, name: str) -> Tensor:
        """This rank's shard of a parameter's average."""
        return self.shards[name]

    def write(self, name: str, shard: Tensor) -> None:
        """Set it."""
        self.shards[name].copy_(shard)

    def _master(self, name: str) -> Tensor:
        return self._optimizer.read_shard(name, "weight")
