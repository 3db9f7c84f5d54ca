"""A KV cache of slots: memory that is allocated once, in which rows come and go.

The cache of transformers copies all its content for each new token, and its rows begin and end together. Here, every
slot has room for one row, and all rows are aligned on the right: the next token of each goes into one shared column, so
that keys and values are views of a buffer, and a window of attention (Mistral, Gemma) is the same columns in every row.
What lies in a slot before its row is masked by the caller, and always finite, since a masked value is multiplied by 0.
Left out: paging, quantisation, and layers whose state is no list of keys and values (linear attention).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

L = TypeVar("L", bound=DynamicLayer)

_SPARE = 32
"""Columns beyond the longest sequence: content moves to the front once in so many tokens, at most."""


class SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values `[N, heads, capacity, width of a head]`, of which the model sees a view."""

    keys: Tensor
    values: Tensor

    def __init__(self, slots: int, capacity: int, *, window: int | None = None) -> None:
        """Memory for N slots is allocated when the first rows arrive.

        Args:
            slots: N.
            capacity: columns of the buffer; with a window no more than are needed.
            window: tokens that a token sees, itself among them; None is all.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self._slots = slots
        self._window = window or capacity + 1
        self._capacity = min(capacity, self._window + max(self._window, _SPARE))
        self._length = 0  # columns so far, as the model counts them
        self._base = 0  # column c lies at c - base in the buffers
        self._buffers: tuple[Tensor, Tensor]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for the heads and the head width of these `[*, heads, *, width]`; zero, and so finite."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = (self._buffer(key_states), self._buffer(value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append a column `[N, heads, 1, width]`, and return all that its tokens see."""
        if self._end == self._capacity:
            self._move_to_front()
        here = self._end
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, here : here + 1] = new
        self._length += 1
        first = max(self._length - self._window, 0) - self._base
        self.keys, self.values = (buffer[:, :, first : self._end] for buffer in self._buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns so far; the next token goes into the one after them."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns the next tokens see, and which of them is the first."""
        return self._kept + query_length, self._length - self._kept

    def start(self, length: int) -> None:
        """Forget everything, and begin after `length` columns."""
        self._length = length
        self._base = length - self._kept

    def trim(self, columns: int) -> None:
        """Forget the first columns, which are padding in every row; nothing is copied."""
        self._length -= columns
        self._base -= columns

    def place(self, source: DynamicLayer, rows: Tensor, *, slots: Tensor) -> None:
        """Copy `rows` `[K]` of a cache whose rows end in its last column into `slots` `[K]`, so that they end here."""
        if source.keys is None or source.values is None:
            return  # a layer that reads another one's keys and values
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        count = min(source.keys.shape[2], self._kept)
        for buffer, found in zip(self._buffers, (source.keys, source.values), strict=True):
            buffer[slots, :, : self._end - count] = 0  # a row that had diverged may have left NaN here
            buffer[slots, :, self._end - count : self._end] = found[rows, :, found.shape[2] - count :]

    def select(self, slots: Tensor) -> None:
        """Keep `slots`, in ascending order, at the front of the buffers."""
        if not self.is_initialized:
            return
        seen = slice(self._end - self._kept, self._end)
        for buffer in self._buffers:
            buffer[: len(slots), :, seen] = buffer[slots, :, seen]
        self._buffers = (self._buffers[0][: len(slots)], self._buffers[1][: len(slots)])

    @property
    def _kept(self) -> int:
        """Columns that the next token sees besides its own."""
        return min(self._length, self._window - 1)

    @property
    def _end(self) -> int:
        """Where the next column lies in the buffers."""
        return self._length - self._base

    def _move_to_front(self) -> None:
        kept, end = self._kept, self._end
        assert kept < self._capacity, f"{kept + 1} tokens in a cache of {self._capacity}"
        for buffer in self._buffers:
            buffer[:, :, :kept] = buffer[:, :, end - kept : end].clone()  # the two overlap
        self._base = self._length - kept

    def _buffer(self, like: Tensor) -> Tensor:
        _, heads, _, width = like.shape
        return like.new_zeros(self._slots, heads, self._capacity, width)


class SlotCache(DynamicCache):
    """The slots of all layers."""

    def __init__(self, config: PreTrainedConfig, *, slots: int, longest: int, refilled: bool) -> None:
        """An empty cache of N slots for a model of this configuration.

        Args:
            config: the model's; `serves` is True of it.
            slots: N.
            longest: tokens of the longest sequence.
            refilled: whether slots get new rows while others go on.
        """
        super().__init__(config=config)
        capacity = longest + (_SPARE if refilled else 0)
        self._served = replace_layers(self, lambda window: SlotLayer(slots, capacity, window=window))

    def place(self, source: DynamicCache, rows: Tensor, *, slots: Tensor, is_last: bool) -> None:
        """Copy rows of a cache of prompts into slots, and with `is_last` free it, layer by layer."""
        for index, layer in self._served:
            found: Any = source.layers[index]
            layer.place(found, rows, slots=slots)
            if is_last:
                found.keys = found.values = None

    def start(self, length: int) -> None:
        """As in `SlotLayer`, for every layer."""
        for _, layer in self._served:
            layer.start(length)

    def trim(self, columns: int) -> None:
        """As in `SlotLayer`, for every layer."""
        for _, layer in self._served:
            layer.trim(columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these slots, in ascending order."""
        for _, layer in self._served:
            layer.select(beam_idx)


def replace_layers(cache: DynamicCache, make: Callable[[int | None], L]) -> list[tuple[int, L]]:
    """Replace every layer that keeps keys and values by `make(window)`; these, with their numbers."""
    made = list[tuple[int, L]]()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer):
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            cache.layers[index] = own = make(window)
            made.append((index, own))
    return made


def serves(config: PreTrainedConfig) -> bool:
    """Whether every layer that a model has keeps keys and values of all tokens, or of a window."""
    # Older transformers have no layer in the cache where a model's layer keeps nothing; newer ones have a dummy.
    served = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))
    return all(type(layer) in served for layer in DynamicCache(config=config).layers)


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the cache argument of `model.forward`: `past_key_values`, or `cache` in newer transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
