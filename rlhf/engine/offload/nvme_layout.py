"""How optimizer state and gradient sums lie in a file: in tiles, each with slices of several parameters.

A tile is stored as [gradients | weights | exp_avg | exp_avg_sq], so that one read brings everything a step needs of it,
and one write takes back everything it changed. In each of the four, every slice starts on a page of the disk, so that
it can be read and written by itself.

[Note: narrow gradients] A gradient of two bytes an element fills the second half of its slice's bytes: what a step
reads still ends where the weights begin.

See also: moving the bytes (`optimizer_state_nvme.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.engine.offload.grad_accumulation import BLOCK
from rlhf.engine.offload.optimizer_state import STATE_KEYS, ParameterShard

PAGE_ELEMENTS = BLOCK  # a page of what has two bytes an element, two pages of fp32; no slice starts between


class TileSlice(NamedTuple):
    """Elements [start, stop) of a parameter's shard, kept in one tile."""

    name: str
    start: int
    stop: int
    at: int  # where they start among the tile's elements

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return self.stop - self.start

    @property
    def padded(self) -> int:
        """Elements that it takes up: whole pages."""
        return -(-self.numel // PAGE_ELEMENTS) * PAGE_ELEMENTS


@dataclass(frozen=True)
class Tile:
    """What is read, updated and written at once: where it is in the file, and what is where in its bytes."""

    offset: int
    size: int  # elements, padding included
    slices: tuple[TileSlice, ...]
    moments: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tile."""
        return self.size * _element_bytes(self.moments)

    @property
    def state_start(self) -> int:
        """Byte where the gradients end and the state begins."""
        return 4 * self.size

    def state_bytes(self, key: str, part: TileSlice, *, itemsize: int = 0) -> slice:
        """Bytes of one of a slice's `STATE_KEYS` in the tile; the first of them, for elements of so many bytes."""
        width = 4 if key == "weight" else self.moments.itemsize
        index = STATE_KEYS.index(key)  # fp32 weights come first, then the moments, which may be narrower
        start = self.state_start + (4 * self.size if index else 0) + max(index - 1, 0) * width * self.size
        first = start + width * part.at
        return slice(first, first + (itemsize or width) * part.padded)

    def gradient_bytes(self, part: TileSlice, itemsize: int) -> slice:
        """Bytes of a slice's gradient; see [Note: narrow gradients]."""
        stop = 4 * (part.at + part.padded)
        return slice(stop - itemsize * part.padded, stop)

    def state_view(self, buffer: Tensor, key: str, *, part: TileSlice) -> Tensor:
        """One of a slice's `STATE_KEYS` in a buffer that holds the tile: [numel] fp32, moments in their type."""
        dtype = torch.float32 if key == "weight" else self.moments
        return buffer[self.state_bytes(key, part)].view(dtype)[: part.numel]


def lay_out_tiles(shards: Sequence[ParameterShard], capacity: int, *, moments: torch.dtype) -> list[Tile]:
    """Tiles of at most `capacity` elements (a multiple of `PAGE_ELEMENTS`) for all parameters, in order.

    A parameter that does not fit into the rest of a tile continues in the next one.
    """
    contents: list[list[TileSlice]] = []
    used = capacity  # of the last tile: there is none yet
    for shard in shards:
        start = 0
        while start < shard.numel:
            if used == capacity:
                contents.append([])
                used = 0
            part = TileSlice(shard.name, start, min(start + capacity - used, shard.numel), used)
            contents[-1].append(part)
            used += part.padded
            start = part.stop
    tiles: list[Tile] = []
    for slices in contents:
        offset = tiles[-1].offset + tiles[-1].nbytes if tiles else 0
        tiles.append(Tile(offset, slices[-1].at + slices[-1].padded, tuple(slices), moments))
    return tiles


def tile_capacity(nbytes: int, limit: int, *, moments: torch.dtype) -> int:
    """Elements of the largest tile that fits into `nbytes` and has at most `limit` elements; 0 when none fits."""
    return min(nbytes // _element_bytes(moments), max(limit, PAGE_ELEMENTS)) // PAGE_ELEMENTS * PAGE_ELEMENTS


def _element_bytes(moments: torch.dtype) -> int:
    """Gradient and weight of four bytes each, and two moments."""
    return 8 + 2 * moments.itemsize
