"""Optimizer state and gradient sums in a file: neither is ever in memory as a whole.

Gradients are written as backward makes them. A step reads a tile, updates it and writes it back, while the next tile is
read and the last one written; all of them pass through one fixed pool of buffers. A failing disk is remembered until
all ranks can be told, because a rank that stops between two collectives would leave the others waiting in the second.

See also: what is where in a tile (`tiles.py`).
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
from rlhf.engine.offload.grad_accumulation import GradAccumulator, squared_norm
from rlhf.engine.offload.optimizer_state import OptimizerStateStore, ParameterShard, Update
from rlhf.engine.offload.tiles import Tile, TileSlice
from rlhf.engine.offload.transfers import CopyEvent, CopyStream
from rlhf.engine.offload.working_weights import ShardedWeights
from rlhf.engine.state_format import STATE_KEYS, SplitMaster, StateFormat, Stored, pack, unpack

_Tag = TypeVar("_Tag")


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

    def __init__(self, resources: NvmeResources, *, dtype: torch.dtype) -> None:
        """Start empty; sums of several gradients are of `dtype`."""
        super().__init__(dtype)
        self._resources, self._places = resources, resources.places
        self.sums: dict[str, _Sum] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Write the gradient, or add it to what was written."""
        gradient = self.rounded(gradient)
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
        """Read the sum of each slice, add on the host, and write it back."""
        known, square = self.sums[name].dtype, torch.zeros((), dtype=torch.float64)
        widens, incoming_size = known != self.dtype, gradient.dtype.itemsize
        assert not widens or incoming_size == known.itemsize, "gradients of a parameter are of one type"
        reads = []
        for tile, part in self._places[name]:
            stored = tile.gradient_bytes(part, known.itemsize)
            # A narrow sum is read to where the state will be: its wide version is about to fill its own place.
            into = tile.spare_bytes(part, itemsize=known.itemsize, second=True) if widens else stored
            reads.append(PlannedRead((tile, part, into), tile.offset + stored.start, into))
        for (tile, part, into), buffer in self._resources.read(reads):
            place = tile.spare_bytes(part, itemsize=incoming_size)
            incoming = buffer[place].view(gradient.dtype)[: part.numel]
            copied = self._resources.stream.copy(incoming, gradient[part.start : part.stop])
            place = tile.gradient_bytes(part, self.dtype.itemsize)
            total = buffer[place].view(self.dtype)[: part.numel]
            if widens:
                total.copy_(buffer[into].view(known)[: part.numel])
            copied.wait()  # the host waits for the device, while the disk reads the next slice
            total += incoming
            square += squared_norm(total)
            self._resources.write(tile, buffer, place=place)
        return _Sum(self.dtype, square)


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
        format_: StateFormat,
    ) -> None:
        """Start at zero moments, which is what a new file holds; `shards` are those of `resources.tiles`."""
        self._accumulator = NvmeGradAccumulator(resources, dtype=format_.sums)
        super().__init__(shards, self._accumulator, kernel=kernel, weights=weights, format_=format_)
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
        shard = torch.empty(self.shards[name].numel)
        for (tile, part, _), buffer in self._resources.read(self._reads(name, key)):
            shard[part.start : part.stop].copy_(
                unpack(self._stored(tile, part, buffer=buffer, key=key), self.kernel.device)
            )
            self._resources.file.pool.give_back(buffer)
        return shard.view(self.shards[name].shape)

    def write(self, name: str, key: str, *, shard: Tensor) -> None:
        """Start to write the shard; reads of it wait for that."""
        flat, reads = shard.reshape(-1), self._reads(name, key)
        shares_pages = self.format.is_quantised and key != "weight"  # with scales of others, which are read before
        new = ((read.tag, self._resources.file.pool.take()) for read in reads)
        for (tile, part, place), buffer in self._resources.read(reads) if shares_pages else new:
            stored = self._stored(tile, part, buffer=buffer, key=key)
            rounded = pack(stored, flat[part.start : part.stop].to(self.kernel.device), step=self.steps[name])
            if isinstance(stored, SplitMaster):
                self.weights.write(name, part.start, values=rounded)
            self._resources.write(tile, buffer, place=place)

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
            for chunk in update.run(self.kernel, slices):
                self.weights.write_back(chunk)  # while the chunk is in cache
            # Slices without a gradient go back as they came.
            self._resources.write(tile, buffer, place=slice(tile.state_start, tile.nbytes))

    def _gradient_bytes(self, tile: Tile, part: TileSlice) -> slice:
        return tile.gradient_bytes(part, self._accumulator.sums[part.name].dtype.itemsize)

    def _slice(self, tile: Tile, part: TileSlice, *, buffer: Tensor) -> ParameterSlice:
        dtype = self._accumulator.sums[part.name].dtype
        gradient = buffer[self._gradient_bytes(tile, part)].view(dtype)[: part.numel]
        weight, *moments = (self._stored(tile, part, buffer=buffer, key=key) for key in STATE_KEYS)
        decays = self.shards[part.name].decays
        return ParameterSlice(part.name, part.start, decays, self.steps[part.name], weight, gradient, *moments)

    def _stored(self, tile: Tile, part: TileSlice, *, buffer: Tensor, key: str) -> Stored:
        """One of a slice's `STATE_KEYS`, in a buffer that holds its tile."""
        codes, scales = tile.state_view(buffer, key, part=part)
        return self.packed(part.name, key, codes=codes, scales=scales, start=part.start)

    def _reads(self, name: str, key: str) -> list[PlannedRead[tuple[Tile, TileSlice, slice]]]:
        """One of a parameter's `STATE_KEYS`: tile, slice, and the bytes of the tile that it is in."""
        reads = []
        for tile, part in self._places[name]:
            place = tile.moments if self.format.is_quantised and key != "weight" else tile.state_bytes(key, part)
            reads.append(PlannedRead((tile, part, place), tile.offset + place.start, place))
        return reads
