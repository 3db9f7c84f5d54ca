"""The rows that are being decoded, one in each of N slots.

A slot whose row has ended gets the next waiting prompt; once none waits, ended rows are dropped and N shrinks. The
host knows which slots are taken and how long their rows are, so a step needs one answer from the device: who has ended.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.generation.kv_cache import SlotCache, cache_argument, serves
from rlhf.generation.waiting import Prefilled, WaitingPrompts

log = logging.getLogger(__name__)

_DROP_AT = 8  # drop ended rows once they are one in eight: each time, the cache of the remaining rows is copied
_AHEAD = 4  # a forward reads prompts for at least one slot in four, so that an ended row is replaced at once


class Step(NamedTuple):
    """What a forward says of K rows."""

    rows: Tensor  # [K] int64 of the queue; a slot without a row has the number after the last
    counts: Tensor  # [K] int64, tokens of the response so far
    logits: Tensor  # [K, V], of the next


class Slots:
    """N slots and their cache. A turn is `step`, or `idle` if there is nothing to do, then `accept`."""

    _taken: list[bool]  # [N]
    _host_lengths: list[int]  # [N], of taken slots; on the device, free ones have a length, too
    _lengths: Tensor  # [N] int64, tokens that were read
    _starts: Tensor  # [N] int64, tokens of the prompt
    _tokens: Tensor  # [N] int64, drawn and not yet read
    _rows: Tensor  # [N] int64, of the queue

    def __init__(self, model: PreTrainedModel, waiting: WaitingPrompts, *, limit: int, new: int, pad_id: int) -> None:
        """No slot is taken yet.

        Args:
            model: makes the forwards.
            waiting: the queue.
            limit: N, at most.
            new: tokens of the longest response.
            pad_id: fills prompts, and slots without a row.
        """
        self._model, self._cache_argument = model, cache_argument(model)
        self._device, self._pad_id, self._waiting = model.device, pad_id, waiting
        self._limit = min(limit, len(waiting))
        self._no_row = len(waiting)
        self._refills = serves(model.config)
        self._prefilled: Prefilled | None = None
        self._is_reading = False
        self._cache: Any = self._new_cache(max(waiting.lengths) + new)
        self._width = 0  # columns of the cache
        self._clear(self._limit)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to decode."""
        return not (self._waiting or self._prefilled or any(self._taken))

    def step(self) -> Step | None:
        """Make a forward: of prompts if slots wait for some, else of the last token of every row; None if all ended."""
        room = self._room
        self._is_reading = bool(self._waiting and room and not self._prefilled)
        if self._is_reading:
            return self._read_prompts(max(room, -(-self._limit // _AHEAD)) if self._refills else room)
        return self._decode() if any(self._taken) else None

    def idle(self) -> None:
        """A forward for the sake of other ranks."""
        self._model(input_ids=torch.full((1, 1), self._pad_id, device=self._device), use_cache=False)

    def accept(self, tokens: Tensor, ended: Tensor) -> None:
        """Take the tokens `[K]` that were drawn after a step, and which of the rows have `ended` `[K]`.

        These leave. Free slots go to prompts that were read; where none is left, they are dropped.
        """
        # The only wait for the device in a turn (`on_tokens` may add its own), but for those in which a row ends.
        left = ended.tolist() if bool(ended.any()) else [False] * len(ended)
        if self._is_reading:
            assert self._prefilled is not None
            self._prefilled.tokens = tokens
            self._prefilled = self._prefilled.select([at for at, is_over in enumerate(left) if not is_over])
        else:
            self._tokens, self._taken = tokens, [a and not b for a, b in zip(self._taken, left, strict=True)]
            # The lengths of free slots begin anew, or they would go beyond the positions that a model has.
            self._rows = self._rows.masked_fill(ended, self._no_row)
            self._lengths, self._starts = self._lengths.masked_fill(ended, 0), self._starts.masked_fill(ended, 0)
        self._refill()

    def _refill(self) -> None:
        """Give free slots to prompts that were read, or drop them where none is left."""
        if self._prefilled and (count := min(self._room, len(self._prefilled))):
            placed, rest = self._prefilled.split(count)
            self._place(placed, is_last=not rest)
            self._prefilled = rest
        if not (self._refills and (self._waiting or self._prefilled)):
            self._drop_ended()

    def _new_cache(self, longest: int) -> DynamicCache:
        if self._refills:
            refilled = self._limit < len(self._waiting)
            return SlotCache(self._model.config, slots=self._limit, longest=longest, refilled=refilled)
        kinds = sorted({type(layer).__name__ for layer in DynamicCache(config=self._model.config).layers})
        log.info("%s keeps %s: it answers one batch after another", type(self._model).__name__, ", ".join(kinds))
        return DynamicCache()  # the first prompts bring theirs

    @property
    def _room(self) -> int:
        """Rows that could be placed now."""
        if self._refills:
            return self._taken.count(False)
        return 0 if any(self._taken) else self._limit

    def _read_prompts(self, count: int) -> Step:
        rows, sources, prompts = self._waiting.take(count)
        width = len(prompts[0])  # the longest
        filled = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = self._tensor([len(prompt) for prompt in prompts])  # [U]
        mask = self._last_columns(width, lengths)
        cache = DynamicCache(config=self._model.config)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(self._tensor(filled), mask, positions=positions, cache=cache)
        self._prefilled = Prefilled(cache, width, rows, sources)
        numbers = self._tensor(rows)
        if len(prompts) < len(rows):  # equal prompts have equal logits
            logits = logits[self._tensor(sources)]  # [U, V] -> [K, V]
        return Step(numbers, torch.zeros_like(numbers), logits)

    def _decode(self) -> Step | None:
        if isinstance(self._cache, SlotCache):  # columns that are padding in every row are forgotten
            width = max(n for n, taken in zip(self._host_lengths, self._taken, strict=True) if taken)
            self._cache.trim(self._width - width)
            self._width = width
        self._width += 1
        self._lengths = self._lengths + 1
        self._host_lengths = [length + 1 for length in self._host_lengths]
        mask = self._last_columns(self._width, self._lengths)
        positions = self._lengths[:, None] - 1
        logits = self._forward(self._tokens[:, None], mask, positions=positions, cache=self._cache)  # [N, 1] -> [N, V]
        return Step(self._rows, self._lengths - self._starts, logits)

    def _place(self, prompts: Prefilled, *, is_last: bool) -> None:
        lengths = [self._waiting.lengths[row] for row in prompts.rows]
        slots = [slot for slot, taken in enumerate(self._taken) if not taken][: len(prompts)]
        if self._refills:
            self._copy(prompts, lengths, slots=slots, is_last=is_last)
        else:  # the cache of the prompts is that of their rows
            self._cache = prompts.cache
            self._cache.reorder_cache(self._tensor(prompts.sources))
            self._width = prompts.width
            self._clear(len(prompts))
            slots = list(range(len(prompts)))
        for slot, length in zip(slots, lengths, strict=True):
            self._taken[slot], self._host_lengths[slot] = True, length
        where = self._tensor(slots)
        self._rows[where] = self._tensor(prompts.rows)
        self._lengths[where] = self._starts[where] = self._tensor(lengths)
        assert prompts.tokens is not None
        self._tokens[where] = prompts.tokens

    def _copy(self, prompts: Prefilled, lengths: list[int], *, slots: list[int], is_last: bool) -> None:
        """Copy keys and values of prompts of these lengths into `slots`."""
        if not any(self._taken):  # nobody's columns need be kept
            self._width = lengths[0]
            self._cache.start(self._width)
        self._cache.place(prompts.cache, self._tensor(prompts.sources), slots=self._tensor(slots), is_last=is_last)

    def _drop_ended(self) -> None:
        if not 0 < self._taken.count(True) * _DROP_AT <= len(self._taken) * (_DROP_AT - 1):
            return
        slots = [slot for slot, taken in enumerate(self._taken) if taken]
        stay = self._tensor(slots)
        self._cache.reorder_cache(stay)
        self._rows, self._tokens = self._rows[stay], self._tokens[stay]
        self._lengths, self._starts = self._lengths[stay], self._starts[stay]
        self._taken, self._host_lengths = [True] * len(slots), [self._host_lengths[slot] for slot in slots]

    def _clear(self, count: int) -> None:
        """So many slots, all of them free."""
        self._taken = [False] * count
        self._host_lengths = [0] * count
        self._lengths = torch.zeros(count, dtype=torch.long, device=self._device)
        self._starts, self._tokens = torch.zeros_like(self._lengths), torch.zeros_like(self._lengths)
        self._rows = torch.full_like(self._lengths, self._no_row)

    def _forward(self, tokens: Tensor, mask: Tensor, *, positions: Tensor, cache: DynamicCache) -> Tensor:
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        logits: Tensor = output.logits[:, -1]  # [N, 1, V] -> [N, V]
        return logits

    def _last_columns(self, width: int, lengths: Tensor) -> Tensor:
        """A mask `[K, width]`, True in as many of the last columns as each of `lengths` `[K]` says."""
        return torch.arange(width, device=self._device) >= width - lengths[:, None]

    def _tensor(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)
