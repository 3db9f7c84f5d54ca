"""A KV cache of fixed shapes and addresses, for decode steps that are captured as CUDA graphs.

Every row begins in column 0, and the token at position p lies in column p mod C: C is the capacity or, in a layer with
a window, the window, whose oldest token the newest replaces. So rows never move, the next column of each is a number on
the device, and a row sees its first `length` columns in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from rlhf.generation.kv_cache import replace_layers


class FixedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values `[N, heads, C, width of a head]`; the model sees the first rows and columns."""

    is_compileable = True  # transformers then makes every mask without looking at its values

    def __init__(self, slots: int, capacity: int, *, window: int | None) -> None:
        """Memory for N slots is allocated when the first rows arrive."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self.columns = min(capacity, window or capacity)
        self._slots = slots
        self._rows = self._where = torch.empty(0)
        self._shown = 0
        self._buffers: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for the heads and the head width of these `[*, heads, *, width]`; zero, and so finite."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = tuple(
            like.new_zeros(self._slots, like.shape[1], self.columns, like.shape[3])
            for like in (key_states, value_states)
        )
        self.is_initialized = True

    def show(self, rows: Tensor, where: Tensor, *, columns: int) -> None:
        """The next token of each of the first n rows `[n]` goes to column `where` `[n]`; they see so many columns."""
        self._rows, self._where, self._shown = rows, where, min(columns, self.columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a token of each row `[n, heads, 1, width]`, and return what is shown."""
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[self._rows, :, self._where] = new[:, :, 0]
        self.keys, self.values = (buffer[: len(self._rows), :, : self._shown] for buffer in self._buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns before the last one, in which a token would see all that are shown."""
        return self._shown - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns are seen, and which is the first."""
        return self._shown, 0

    def place(self, source: DynamicLayer, rows: Tensor, *, slots: Tensor, lengths: Tensor) -> None:
        """Copy `rows` `[K]` of so many tokens, from a cache in whose last column they end, into `slots` `[K]`."""
        if source.keys is None or source.values is None:
            return  # a layer that reads another one's keys and values
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        columns = torch.arange(self.columns, device=rows.device)
        # The last position that lies in each column, below 0 where there is none yet; `[K, C]`.
        positions = columns + (lengths[:, None] - 1 - columns).div(self.columns, rounding_mode="floor") * self.columns
        found = positions - lengths[:, None] + source.keys.shape[2]
        # A window's source may lack the token that the next one replaces. Zero also replaces NaN of a row before.
        is_there = ((positions >= 0) & (found >= 0))[:, :, None, None]
        for buffer, given in zip(self._buffers, (source.keys, source.values), strict=True):
            tokens = given[rows[:, None], :, found.clamp(min=0)]  # [K, C, heads, width]
            buffer[slots] = tokens.where(is_there, 0).transpose(1, 2)

    def select(self, slots: Tensor) -> None:
        """Copy `slots`, in ascending order, to the front."""
        for buffer in self._buffers:
            buffer[: len(slots)] = buffer[slots]


class FixedCache(DynamicCache):
    """The fixed layers of a model."""

    def __init__(self, config: PreTrainedConfig, *, slots: int, capacity: int) -> None:
        """An empty cache for N slots of so many tokens, for a model of this configuration, which `serves` knows."""
        super().__init__(config=config)
        self.capacity = capacity
        self._fixed = replace_layers(self, lambda window: FixedLayer(slots, capacity, window=window))

    def show(self, positions: Tensor, *, columns: int) -> None:
        """The next token of each of the first n rows has one of `positions` `[n]`; rows see so many columns."""
        rows = torch.arange(len(positions), device=positions.device)
        where = {count: positions % count for count in {layer.columns for _, layer in self._fixed}}
        for _, layer in self._fixed:
            layer.show(rows, where[layer.columns], columns=columns)

    def place(self, source: DynamicCache, rows: Tensor, *, slots: Tensor, lengths: Tensor, is_last: bool) -> None:
        """Copy rows of a cache of prompts into slots, and with `is_last` free it, layer by layer."""
        for index, layer in self._fixed:
            found: Any = source.layers[index]
            layer.place(found, rows, slots=slots, lengths=lengths)
            if is_last:
                found.keys = found.values = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move these slots, in ascending order, to the front."""
        for _, layer in self._fixed:
            layer.select(beam_idx)
