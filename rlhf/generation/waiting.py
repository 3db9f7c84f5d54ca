"""Prompts that wait for a slot, and those that were read ahead of one.

The longest go first, so that no prompt is ever longer than the rows that are being decoded. Equal prompts, such as
several samples of one, lie side by side and are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class Prefilled:
    """Prompts that the model has read: U different ones, left padded, for K rows that have yet to be placed."""

    cache: DynamicCache  # keys and values of U prompts, which end in its last column
    width: int  # its columns
    rows: list[int]  # [K] of the queue, longest prompts first
    sources: list[int]  # [K] below U, the prompt of each
    tokens: Tensor | None = None  # [K] int64, the first token of each response, once it is drawn

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, count: int) -> tuple[Prefilled, Prefilled]:
        """The first `count` rows, and the others, on the same cache."""
        assert self.tokens is not None
        head = Prefilled(self.cache, self.width, self.rows[:count], self.sources[:count], self.tokens[:count])
        return head, Prefilled(self.cache, self.width, self.rows[count:], self.sources[count:], self.tokens[count:])

    def select(self, keep: list[int]) -> Prefilled:
        """The rows at those places."""
        assert self.tokens is not None
        tokens = self.tokens[torch.tensor(keep, dtype=torch.long, device=self.tokens.device)]
        return Prefilled(
            self.cache, self.width, [self.rows[at] for at in keep], [self.sources[at] for at in keep], tokens
        )


class Taken(NamedTuple):
    """K rows that are next, and their U different prompts."""

    rows: list[int]  # [K] of the queue
    sources: list[int]  # [K] below U, the prompt of each
    prompts: list[tuple[int, ...]]  # [U]


class WaitingPrompts:
    """The queue of one rank, from which prompts are taken in groups."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        """All of `prompts` wait, each a list of token ids."""
        self._prompts = [tuple(prompt) for prompt in prompts]
        self.lengths = list(map(len, self._prompts))
        """Tokens of every prompt `[B]`, in the order in which they were given."""
        self._order = sorted(range(len(prompts)), key=lambda row: (-len(self._prompts[row]), self._prompts[row], row))

    def __len__(self) -> int:
        return len(self._order)

    def take(self, count: int) -> Taken:
        """Remove the next `count` rows from the queue."""
        rows, self._order = self._order[:count], self._order[count:]
        numbers: dict[tuple[int, ...], int] = {}
        sources = [numbers.setdefault(self._prompts[row], len(numbers)) for row in rows]
        return Taken(rows, sources, list(numbers))
