"""Optimizer state and gradient sums in a file: neither is ever in memory as a whole.

Gradients are written as backward makes them. A step reads a tile, updates it and writes it back, while the next tile is
read and the last one written; all of them pass through one fixed pool of buffers. A failing disk is remembered until
all ranks can be told, because a rank that stops between two collectives would leave the others waiting in the second.
See also: where in the file what is (`nvme_layout.py`).
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
from rlhf.engine.norms import squared_norm
from rlhf.engine.offload.copy_stream import CopyEvent, CopyStream
from rlhf.engine.offload.direct_io import DirectFile, PlannedRead, PrefetchQueue
from rlhf.engine.offload.grad_accumulation import GradAccumulator
from rlhf.engine.offload.nvme_layout import Tile, TileSlice
from rlhf.engine.offload.optimizer_state import STATE_KEYS, OptimizerStateStore, ParameterShard, Update
from rlhf.engine.offload.sharded_weights import ShardedWeights

_Tag = TypeVar("_Tag")
_Place = tuple[Tile, TileSlice]


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
    def places(self) -> dict[str, list[_Place]]:
        """The slices of each parameter, in order, and their tiles."""
        found: dict[str, list[_Place]] = defaultdict(list)
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
        self.file.pool.give_back(buffer)  # the pool hands it out again only after the write
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
        self._sums: dict[str, _Sum] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Write the gradient, or add it to what was written."""
        if self._resources.failure is None:
            with self._resources.remember_failure():
                self._sums[name] = self._add(name, gradient) if name in self._sums else self._first(name, gradient)

    def squared_norms(self) -> dict[str, Tensor]:
        """Known since the sums were written."""
        return {name: known.square for name, known in self._sums.items()}

    def clear(self) -> None:
        """Drop the sums; their bytes will be overwritten."""
        self._sums = {}

    def close(self) -> None:
        """Do nothing: the store closes the file and the buffers."""

    def names(self) -> set[str]:
        """The parameters that have a sum."""
        return set(self._sums)

    def bytes_in(self, tile: Tile, part: TileSlice) -> slice:
        """Where the sum of a slice is in its tile."""
        return tile.gradient_bytes(part, self._sums[part.name].dtype.itemsize)

    def view(self, buffer: Tensor, tile: Tile, *, part: TileSlice) -> Tensor:
        """The sum of a slice, [numel], in a buffer that holds the tile."""
        return buffer[self.bytes_in(tile, part)].view(self._sums[part.name].dtype)[: part.numel]

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
        known, square = self._sums[name].dtype, torch.zeros((), dtype=torch.float64)
        reads = [self._read_sum(*place, known=known, gradient=gradient) for place in self._places[name]]
        for (tile, part), buffer in self._resources.read(reads):
            place = tile.gradient_bytes(part, 4)
            total = buffer[place].view(torch.float32)[: part.numel]
            if known != torch.float32:
                total.copy_(buffer[_narrow_sum(tile, part)].view(known)[: part.numel])
            total += buffer[_incoming(tile, part)].view(gradient.dtype)[: part.numel]
            square += squared_norm(total)
            self._resources.write(tile, buffer, place=place)
        return _Sum(torch.float32, square)

    def _read_sum(self, tile: Tile, part: TileSlice, *, known: torch.dtype, gradient: Tensor) -> PlannedRead[_Place]:
        """Read what is known of a slice's sum, and copy what is to be added, side by side into one buffer."""
        place = tile.gradient_bytes(part, known.itemsize)
        # A narrow sum goes beside its own place, which its fp32 version is about to fill.
        into = place if known == torch.float32 else _narrow_sum(tile, part)

        def copy_gradient(buffer: Tensor) -> CopyEvent:
            incoming = buffer[_incoming(tile, part)].view(gradient.dtype)[: part.numel]
            return self._resources.stream.copy(incoming, gradient[part.start : part.stop])

        return PlannedRead((tile, part), tile.offset + place.start, into, beside=copy_gradient)


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
        self._sums = NvmeGradAccumulator(resources)
        super().__init__(shards, self._sums, kernel=kernel, weights=weights)
        self._resources, self._places = resources, resources.places

    @property
    def failure(self) -> RuntimeError | None:
        """The first error of the disk."""
        return self._resources.failure

    def take_gradients(self) -> None:
        """Do nothing: updates of state on disk are never delayed, so no gradient comes before the step ends."""

    def step(self, update: Update) -> None:
        """One pass over the tiles that have a gradient; an error of the disk is remembered, see `failure`."""
        names = self._sums.names().intersection(update.touched)
        for name in names:
            self.steps[name] += 1
        with self._resources.remember_failure():
            self._update_tiles(names, update)
        self._sums.clear()

    def read(self, name: str, key: str) -> Tensor:
        """This rank's shard, as a copy."""
        shard = torch.empty(self._shards[name].numel)
        reads = [self._read_state(tile, part, key=key) for tile, part in self._places[name]]
        for (tile, part), buffer in self._resources.read(reads):
            shard[part.start : part.stop].copy_(tile.state_view(buffer, key, part=part))
            self._resources.file.pool.give_back(buffer)
        return shard.view(self._shards[name].shape)

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
        tiles = [tile for tile in self._resources.tiles if any(part.name in names for part in tile.slices)]
        for tile, buffer in self._resources.read([self._read_tile(tile, names) for tile in tiles]):
            slices = [self._slice(tile, part, buffer=buffer) for part in tile.slices if part.name in names]
            for chunk in self.kernel.update(slices, lr=update.lr, scale=update.scale, betas=update.betas):
                self.weights.write_back(chunk)  # while the chunk is in cache
            # Slices without a gradient go back as they came.
            self._resources.write(tile, buffer, place=slice(tile.state_start, tile.nbytes))

    def _read_tile(self, tile: Tile, names: Set[str]) -> PlannedRead[Tile]:
        """A tile from its first gradient on."""
        start = min(self._sums.bytes_in(tile, part).start for part in tile.slices if part.name in names)
        return PlannedRead(tile, tile.offset + start, slice(start, tile.nbytes))

    def _read_state(self, tile: Tile, part: TileSlice, *, key: str) -> PlannedRead[_Place]:
        place = tile.state_bytes(key, part)
        return PlannedRead((tile, part), tile.offset + place.start, place)

    def _slice(self, tile: Tile, part: TileSlice, *, buffer: Tensor) -> ParameterSlice:
        gradient = self._sums.view(buffer, tile, part=part)
        weight, *moments = (tile.state_view(buffer, key, part=part) for key in STATE_KEYS)
        shard = self._shards[part.name]
        return ParameterSlice(part.name, part.start, shard.decays, self.steps[part.name], weight, gradient, *moments)


def _narrow_sum(tile: Tile, part: TileSlice) -> slice:
    """Bytes of a buffer for a sum of two bytes an element, apart from its fp32 version and from what is added."""
    start = tile.state_bytes("exp_avg", part).start
    return slice(start, start + 2 * part.padded)


def _incoming(tile: Tile, part: TileSlice) -> slice:
    """Bytes of a buffer for a gradient of up to four bytes an element; the sum is not read to there."""
    return tile.state_bytes("weight", part)
