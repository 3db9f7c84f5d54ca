"""Optimizer state and gradient sums in a file: neither is ever in memory as a whole.

Gradients are written as backward makes them. A step reads a tile, updates it and writes it back, while the next tile is
read and the last one written; all of them pass through one fixed pool of buffers. A failing disk is remembered until
all ranks can be told, because a rank that stops between two collectives would leave the others waiting in the second.

A tile has slices of several parameters, and is stored as [gradients | weights | exp_avg | exp_avg_sq], so that one read
brings everything a step needs of it, and one write takes back everything it changed. In each of the four, every slice
starts on a page of the disk, so that it can be read and written by itself.

[Note: narrow gradients] A gradient of two bytes an element fills the second half of its slice's bytes: what a step
reads still ends where the weights begin.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf.engine.adam_kernel import AdamKernel, ParameterSlice
from rlhf.engine.offload.direct_io import DirectFile, PlannedRead, PrefetchQueue
from rlhf.engine.offload.grad_accumulation import BLOCK, GradAccumulator, squared_norm
from rlhf.engine.offload.optimizer_state import STATE_KEYS, OptimizerStateStore, ParameterShard, Update
from rlhf.engine.offload.transfers import CopyEvent, CopyStream
from rlhf.engine.offload.working_weights import ShardedWeights

_Tag = TypeVar("_Tag")
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


@dataclass
class NvmeResources:
    """The file of a store and what moves its bytes; shared with the gradient sums, which are in the same file."""

    file: DirectFile  # each of its buffers at least as large as any tile
    tiles: list[Tile]
    stream: CopyStream  # between the device and the buffers
    reads_ahead: bool
    writes_behind: bool
    failure: RuntimeError | None = None  # the first error of the disk

    @cached_property
    def places(self) -> dict[str, list[tuple[Tile, TileSlice]]]:
        """The slices of each parameter, in order, and their tiles."""
        found: dict[str, list[tuple[Tile, TileSlice]]] = defaultdict(list)
        for tile in self.tiles:
            for part in tile.slices:
                found[part.name].append((tile, part))
        return found

    def read(self, reads: Sequence[PlannedRead[_Tag]]) -> Iterator[tuple[_Tag, Tensor]]:
        """Tag and full buffer of each read; the next is started before this one is used. The caller gives it back."""
        queue = PrefetchQueue[_Tag](self.file, depth=2 if self.reads_ahead and self.file.pool.count > 1 else 1)
        queue.plan(reads)
        return ((read.tag, buffer) for read, buffer in queue.take(len(reads)))

    def write(self, tile: Tile, buffer: Tensor, *, place: slice, after: CopyEvent | None = None) -> None:
        """Write bytes of a tile from its buffer, which is given back, once `after` has filled it."""
        transfer = self.file.write(tile.offset + place.start, buffer[place], after=after)
        self.file.pool.give_back(buffer)  # Lifetime: the pool hands it out again only after the write
        if not self.writes_behind:
            transfer.wait()

    @contextmanager
    def remember_failure(self) -> Iterator[None]:
        """Keep an error of the disk for `failure` instead of raising it in the middle of backward or a step."""
        try:
            yield
        except RuntimeError as error:
            self.failure = self.failure or error


class _Sum(NamedTuple):
    """What is on disk of a parameter's gradient."""

    dtype: torch.dtype
    square: Tensor  # of the sum so far, [] fp64


class NvmeGradAccumulator(GradAccumulator):
    """Sums in the file of the state, beside the weights and moments that the step reads with them."""

    def __init__(self, resources: NvmeResources) -> None:
        """Start empty."""
        self._resources, self._places = resources, resources.places
        self.sums: dict[str, _Sum] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Write the gradient, or add it to what was written."""
        if self._resources.failure is None:
            with self._resources.remember_failure():
                self.sums[name] = self._add(name, gradient) if name in self.sums else self._first(name, gradient)

    def squared_norms(self) -> dict[str, Tensor]:
        """Known since the sums were written."""
        return {name: known.square for name, known in self.sums.items()}

    def clear(self) -> None:
        """Drop the sums; their bytes will be overwritten."""
        self.sums = {}

    def _first(self, name: str, gradient: Tensor) -> _Sum:
        for tile, part in self._places[name]:
            buffer = self._resources.file.pool.take()  # waits for the disk when all buffers are on their way there
            place = tile.gradient_bytes(part, gradient.dtype.itemsize)
            into = buffer[place].view(gradient.dtype)[: part.numel]
            copied = self._resources.stream.copy(into, gradient[part.start : part.stop])
            # Backward goes on: the thread that writes waits for the copy from the device.
            self._resources.write(tile, buffer, place=place, after=copied)
        return _Sum(gradient.dtype, squared_norm(gradient))

    def _add(self, name: str, gradient: Tensor) -> _Sum:
        """Read the sum of each slice, add on the host, and write it back in fp32."""
        known, square = self.sums[name].dtype, torch.zeros((), dtype=torch.float64)
        reads = []
        for tile, part in self._places[name]:
            stored = tile.gradient_bytes(part, known.itemsize)
            # A narrow sum is read to the place of a moment: its fp32 version is about to fill its own.
            into = stored if known == torch.float32 else tile.state_bytes("exp_avg", part, itemsize=known.itemsize)
            reads.append(PlannedRead((tile, part, into), tile.offset + stored.start, into))
        for (tile, part, into), buffer in self._resources.read(reads):
            # The place of the weight, which a sum is never read to, holds up to four bytes an element.
            incoming = buffer[tile.state_bytes("weight", part)].view(gradient.dtype)[: part.numel]
            copied = self._resources.stream.copy(incoming, gradient[part.start : part.stop])
            place = tile.gradient_bytes(part, 4)
            total = buffer[place].view(torch.float32)[: part.numel]
            if known != torch.float32:
                total.copy_(buffer[into].view(known)[: part.numel])
            copied.wait()  # the host waits for the device, while the disk reads the next slice
            total += incoming
            square += squared_norm(total)
            self._resources.write(tile, buffer, place=place)
        return _Sum(torch.float32, square)


class NvmeStateStore(OptimizerStateStore):
    """State in a file; a step passes over its tiles."""

    in_memory = False

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        resources: NvmeResources,
        *,
        kernel: AdamKernel,
        weights: ShardedWeights,
    ) -> None:
        """Start at zero moments, which is what a new file holds; `shards` are those of `resources.tiles`."""
        self._accumulator = NvmeGradAccumulator(resources)
        super().__init__(shards, self._accumulator, kernel=kernel, weights=weights)
        self._resources, self._places = resources, resources.places

    @property
    def failure(self) -> RuntimeError | None:
        """The first error of the disk."""
        return self._resources.failure

    def step(self, update: Update) -> None:
        """One pass over the tiles that have a gradient; an error of the disk is remembered, see `failure`."""
        names = self._accumulator.sums.keys() & set(update.touched)
        for name in names:
            self.steps[name] += 1
        with self._resources.remember_failure():
            self._update_tiles(names, update)
        self.gradients.clear()

    def read(self, name: str, key: str) -> Tensor:
        """This rank's shard, as a copy."""
        shard, reads = torch.empty(self.shards[name].numel), []
        for tile, part in self._places[name]:
            place = tile.state_bytes(key, part)
            reads.append(PlannedRead((tile, part), tile.offset + place.start, place))
        for (tile, part), buffer in self._resources.read(reads):
            shard[part.start : part.stop].copy_(tile.state_view(buffer, key, part=part))
            self._resources.file.pool.give_back(buffer)
        return shard.view(self.shards[name].shape)

    def write(self, name: str, key: str, *, shard: Tensor) -> None:
        """Start to write the shard; reads of it wait for that."""
        flat = shard.reshape(-1)
        for tile, part in self._places[name]:
            buffer = self._resources.file.pool.take()
            tile.state_view(buffer, key, part=part).copy_(flat[part.start : part.stop])
            self._resources.write(tile, buffer, place=tile.state_bytes(key, part))

    def close(self) -> None:
        """Free the file and its buffers."""
        # Lifetime: after an error, copies from the device may still be on their way to a buffer that nobody waits for.
        self._resources.stream.synchronize()
        self._resources.file.close()

    def _update_tiles(self, names: Set[str], update: Update) -> None:
        reads = []
        for tile in self._resources.tiles:
            gradients = [self._gradient_bytes(tile, part) for part in tile.slices if part.name in names]
            if gradients:  # read the tile from its first gradient on
                start = min(place.start for place in gradients)
                reads.append(PlannedRead(tile, tile.offset + start, slice(start, tile.nbytes)))
        for tile, buffer in self._resources.read(reads):
            slices = [self._slice(tile, part, buffer=buffer) for part in tile.slices if part.name in names]
            for chunk in self.kernel.update(slices, lr=update.lr, scale=update.scale, betas=update.betas):
                self.weights.write_back(chunk)  # while the chunk is in cache
            # Slices without a gradient go back as they came.
            self._resources.write(tile, buffer, place=slice(tile.state_start, tile.nbytes))

    def _gradient_bytes(self, tile: Tile, part: TileSlice) -> slice:
        return tile.gradient_bytes(part, self._accumulator.sums[part.name].dtype.itemsize)

    def _slice(self, tile: Tile, part: TileSlice, *, buffer: Tensor) -> ParameterSlice:
        dtype = self._accumulator.sums[part.name].dtype
        gradient = buffer[self._gradient_bytes(tile, part)].view(dtype)[: part.numel]
        weight, *moments = (tile.state_view(buffer, key, part=part) for key in STATE_KEYS)
        decays = self.shards[part.name].decays
        return ParameterSlice(part.name, part.start, decays, self.steps[part.name], weight, gradient, *moments)
