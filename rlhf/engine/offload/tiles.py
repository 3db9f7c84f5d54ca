"""How optimizer state and gradient sums lie in a file: in tiles, each of which is read, updated and written at once.

A tile has slices of several parameters, and is stored as [gradients | weights | exp_avg | exp_avg_sq | scales], so that
one read brings everything a step needs of it, and one write takes back everything it changed. In each of the first
four, every slice starts on a page of the disk, so that it can be read and written by itself. The scales of moments in 8
bits are too few for that: these moments are read and written with those of the whole tile.

[Note: narrow gradients] A gradient of fewer bytes than there is room for fills the last of its slice's bytes: what a
step reads still ends where the weights begin.
See also: what is done with them (`optimizer_state_nvme.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.engine.offload.optimizer_state import ParameterShard
from rlhf.engine.offload.transfers import ALIGNMENT, round_up
from rlhf.engine.state_format import BLOCK, SCALE_BYTES, STATE_KEYS, StateFormat, num_blocks


class TileSlice(NamedTuple):
    """Elements [start, stop) of a parameter's shard, kept in one tile."""

    name: str
    start: int
    stop: int
    at: int  # where they start among the tile's elements
    padded: int  # elements that they take up: whole pages

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return self.stop - self.start


@dataclass(frozen=True)
class Tile:
    """What is read, updated and written at once: where it is in the file, and what is where in its bytes."""

    offset: int
    size: int  # elements, padding included
    slices: tuple[TileSlice, ...]
    format: StateFormat

    @property
    def nbytes(self) -> int:
        """Bytes of the tile."""
        return tile_bytes(self.size, self.format)

    @property
    def state_start(self) -> int:
        """Byte where the gradients end and the state begins."""
        return self.format.sums.itemsize * self.size

    @property
    def moments(self) -> slice:
        """Bytes of all moments, with their scales."""
        return slice(self._start(1), self.nbytes)

    def state_bytes(self, key: str, part: TileSlice) -> slice:
        """Bytes of one of a slice's `STATE_KEYS`, without scales."""
        width = self.format.width(key)
        first = self._start(STATE_KEYS.index(key)) + width * part.at
        return slice(first, first + width * part.padded)

    def spare_bytes(self, part: TileSlice, *, itemsize: int, second: bool = False) -> slice:
        """Bytes of the state that may hold a slice's gradient until a step reads the state; a second one if narrow."""
        first = self.state_start + itemsize * (part.at + self.size * second)
        return slice(first, first + itemsize * part.padded)

    def gradient_bytes(self, part: TileSlice, itemsize: int) -> slice:
        """Bytes of a slice's gradient; see [Note: narrow gradients]."""
        stop = self.format.sums.itemsize * (part.at + part.padded)
        return slice(stop - itemsize * part.padded, stop)

    def state_view(self, buffer: Tensor, key: str, *, part: TileSlice) -> tuple[Tensor, Tensor | None]:
        """One of a slice's `STATE_KEYS` in a buffer that holds the tile: values or codes, and scales of codes."""
        stored = buffer[self.state_bytes(key, part)].view(self.format.dtype(key))
        if key == "weight" or not self.format.is_quantised:
            return stored[: part.numel], None
        blocks, each = num_blocks(part.numel), SCALE_BYTES * self.size // BLOCK
        first = self._start(len(STATE_KEYS)) + (STATE_KEYS.index(key) - 1) * each + SCALE_BYTES * (part.at // BLOCK)
        scales = buffer[first : first + SCALE_BYTES * blocks].view(torch.float32)
        return stored[: blocks * BLOCK], scales

    def _start(self, index: int) -> int:
        """Byte where one of `STATE_KEYS` begins, or, after the last, the scales."""
        return self.state_start + self.size * sum(self.format.width(key) for key in STATE_KEYS[:index])


def lay_out_tiles(shards: Sequence[ParameterShard], capacity: int, *, format_: StateFormat) -> list[Tile]:
    """Tiles of at most `capacity` elements (whole pages) for all parameters, in order.

    A parameter that does not fit into the rest of a tile continues in the next one.
    """
    page = page_elements(format_)
    contents: list[list[TileSlice]] = []
    used = capacity  # of the last tile: there is none yet
    for shard in shards:
        start = 0
        while start < shard.numel:
            if used == capacity:
                contents.append([])
                used = 0
            stop = min(start + capacity - used, shard.numel)
            contents[-1].append(TileSlice(shard.name, start, stop, used, -(-(stop - start) // page) * page))
            used += contents[-1][-1].padded
            start = stop
    tiles: list[Tile] = []
    for slices in contents:
        offset = tiles[-1].offset + tiles[-1].nbytes if tiles else 0
        tiles.append(Tile(offset, slices[-1].at + slices[-1].padded, tuple(slices), format_))
    return tiles


def tile_capacity(nbytes: int, limit: int, *, format_: StateFormat) -> int:
    """Elements of the largest tile that fits into `nbytes` and has at most `limit` elements; 0 when none fits."""
    page = page_elements(format_)
    pages = min(nbytes // _element_bytes(format_), max(limit, page)) // page
    while pages and tile_bytes(pages * page, format_) > nbytes:
        pages -= 1
    return pages * page


def page_elements(format_: StateFormat) -> int:
    """The least elements of a slice: no part of it starts within a page of the disk."""
    return ALIGNMENT // min(2, format_.width("exp_avg"))


def tile_bytes(size: int, format_: StateFormat) -> int:
    """Bytes of a tile of so many elements, which are whole pages."""
    scales = 2 * SCALE_BYTES * size // BLOCK if format_.is_quantised else 0
    return size * _element_bytes(format_) + round_up(scales)


def _element_bytes(format_: StateFormat) -> int:
    """Gradient, weight and moments, without scales."""
    return format_.sums.itemsize + sum(map(format_.width, STATE_KEYS))
