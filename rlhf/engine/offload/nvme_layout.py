"""How optimizer states and gradients lie in a file: tiles of several parameters, each tile one record.

A record is [gradient | weight | exp_avg | exp_avg_sq], so that one read brings a step all it needs of a tile, and one
write takes back all it changed. Every part of a parameter starts on a page in each of the four, and can be read and
written by itself.

[Note: narrow gradients] A gradient of two bytes an element fills the second half of its room: what a step reads still
ends where the weights begin.

Left out: moving bytes (`optimizer_state_nvme.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.engine.norms import BLOCK
from rlhf.engine.offload.optimizer_state import PARTS, ParameterShard

PAGE_ELEMENTS = BLOCK  # elements: a page of what has two bytes each; nothing starts between


class TileSlice(NamedTuple):
    """Elements [start, stop) of a parameter's rows in a record."""

    name: str
    start: int
    stop: int
    at: int  # where they start among the record's elements

    @property
    def count(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def room(self) -> int:
        """Elements that it takes up."""
        return -(-self.count // PAGE_ELEMENTS) * PAGE_ELEMENTS


@dataclass(frozen=True)
class Tile:
    """One tile: where its bytes are in the file, and what is where in them."""

    offset: int
    size: int  # elements with their gaps
    spans: tuple[TileSlice, ...]
    moments: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the record."""
        return self.size * _bytes_each(self.moments)

    @property
    def weight_at(self) -> int:
        """Byte where the gradients end and the state begins."""
        return 4 * self.size

    def place(self, part: str, span: TileSlice) -> slice:
        """Bytes of a part of a span's state in the record."""
        size = 4 if part == "weight" else self.moments.itemsize
        before = PARTS.index(part)
        at = self.weight_at + (4 * self.size if before else 0) + max(before - 1, 0) * size * self.size
        return slice(at + size * span.at, at + size * (span.at + span.room))

    def gradient_place(self, span: TileSlice, itemsize: int) -> slice:
        """Bytes of its gradient; see [Note: narrow gradients]."""
        end = 4 * (span.at + span.room)
        return slice(end - itemsize * span.room, end)

    def part(self, buffer: Tensor, part: str, *, span: TileSlice) -> Tensor:
        """The elements of a part of a span, [n], in a buffer that holds the record."""
        dtype = torch.float32 if part == "weight" else self.moments
        return buffer[self.place(part, span)].view(dtype)[: span.count]


def lay_out(shapes: Sequence[ParameterShard], capacity: int, *, moments: torch.dtype) -> list[Tile]:
    """Records of at most `capacity` elements (a multiple of `PAGE_ELEMENTS`) for all parameters, in order."""
    records: list[Tile] = []
    spans: list[TileSlice] = []
    offset = used = 0

    def close() -> None:
        nonlocal offset, used
        if spans:
            records.append(Tile(offset, used, tuple(spans), moments))
            offset += records[-1].nbytes
        spans.clear()
        used = 0

    for shape in shapes:
        start = 0
        while start < shape.count:
            if used == capacity:
                close()
            span = TileSlice(shape.name, start, min(start + capacity - used, shape.count), used)
            spans.append(span)
            used += span.room
            start = span.stop
    close()
    return records


def capacity_of(nbytes: int, limit: int, *, moments: torch.dtype) -> int:
    """Elements of a record that fits into `nbytes` and has at most `limit`; 0 when none does."""
    return min(nbytes // _bytes_each(moments), max(limit, PAGE_ELEMENTS)) // PAGE_ELEMENTS * PAGE_ELEMENTS


def _bytes_each(moments: torch.dtype) -> int:
    return 8 + 2 * moments.itemsize
