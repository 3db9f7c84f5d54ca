"""A KV cache whose memory is allocated once.

The cache of transformers copies all its content for each new token. Here, layers that attend to all positions get one
buffer of the final length; layers with a window (Mistral, Gemma) and other kinds keep the cache of transformers, which
is bounded by design. Left out: paging, quantisation, several prompts that share a prefix.
"""

from __future__ import annotations

import inspect

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values `[B, heads, up to max_length, width of a head]`, as views of two buffers."""

    keys: Tensor
    values: Tensor

    def __init__(self, max_length: int) -> None:
        """Hold up to `max_length` tokens; memory is allocated when the first ones arrive."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.max_length = max_length
        self._buffers: tuple[Tensor, Tensor]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for the rows, heads and head width of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = (self._buffer(key_states), self._buffer(value_states))
        self._show(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, heads, new, width]` and return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        assert end <= self.max_length, f"{end} tokens in a cache of {self.max_length}"
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in ascending order, at the front of the buffers."""
        if not self.is_initialized:
            return  # a layer that reads another one's keys and values
        length = self.keys.shape[-2]
        for buffer in self._buffers:
            buffer[: len(indices), :, :length] = buffer[indices, :, :length]
        self._buffers = (self._buffers[0][: len(indices)], self._buffers[1][: len(indices)])
        self._show(length)

    def _buffer(self, like: Tensor) -> Tensor:
        rows, heads, _, width = like.shape
        return like.new_empty(rows, heads, self.max_length, width)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def kv_cache(config: PreTrainedConfig, max_length: int) -> DynamicCache:
    """An empty cache for a model of this configuration and sequences of up to `max_length` tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(max_length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the cache argument of `model.forward`: `past_key_values`, or `cache` in newer transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
