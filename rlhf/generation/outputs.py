"""What a queue of prompts has been answered so far, in memory that is allocated once.

See also: which rows speak (`slots.py`), and how a token is drawn (`sampling.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation.sampling import sample, uniforms
from rlhf.generation.slots import Step


class Outputs:
    """The tokens drawn so far, one column per position; a row after the last belongs to slots without a row."""

    def __init__(
        self,
        count: int,
        *,
        length: int,
        pad_id: int,
        stops: Sequence[int],
        sampling: SamplingConfig,
        device: torch.device,
    ) -> None:
        """Memory for `count` rows of `length` tokens, which `restart` fills."""
        self.count, self.length, self.pad_id = count, length, pad_id
        self.settings = (count, length, pad_id, tuple(stops), sampling)
        """Outputs with equal ones do the same to the same logits."""
        shape = (count + 1, length)
        self.responses = torch.empty(shape, dtype=torch.long, device=device)
        self.mask = torch.empty(shape, dtype=torch.bool, device=device)
        self.logprobs = torch.empty(shape, dtype=torch.float32, device=device)
        self.ended = torch.empty(shape[0], dtype=torch.bool, device=device)
        self._draws = torch.empty(shape, dtype=torch.float32, device=device)
        self._stops = torch.tensor(list(stops), dtype=torch.long, device=device)
        self._sampling = sampling

    def restart(self, sample_ids: Tensor, *, seed: int) -> None:
        """Forget everything; `sample_ids` `[B]` and the seed determine what will be drawn."""
        self._draws.copy_(uniforms(seed, pad(sample_ids.to(self.ended.device), (0, 1)), length=self.length))
        self.responses.fill_(self.pad_id)
        for kept in (self.mask, self.logprobs, self.ended):
            kept.zero_()

    def draw(self, step: Step, *, is_static: bool = False) -> tuple[Tensor, Tensor]:
        """Draw and keep the next token of K rows; returns them, and whether each row ends with it, `[K]`.

        With `is_static`, no shape depends on what is drawn, and the host waits for nothing.
        """
        last = self.length - 1
        where = step.rows, step.counts.clamp(max=last)  # a slot without a row may count on
        drawn = sample(
            step.logits,
            self._draws[where],
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
            is_static=is_static,
        )
        self.responses[where], self.logprobs[where], self.mask[where] = drawn.tokens, drawn.logprobs, True
        stopped = (drawn.tokens[:, None] == self._stops).any(-1)
        self.ended[step.rows] = stopped
        return drawn.tokens, stopped | (step.counts >= last)

    def spoken(self, step: Step, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that are there and their tokens."""
        there = step.rows < self.count
        return step.rows[there], tokens[there]
