"""Stores of offloaded working weights, by FSDP unit: in page-locked host memory, or in a file.

A unit is a number here, and its shard is bytes. While one unit computes, the next ones are copied or read.
See also: which bytes are which parameter, and which unit follows (`working_weights.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from rlhf.engine.offload.direct_io import DirectFile, PlannedRead, PrefetchQueue
from rlhf.engine.offload.transfers import ALIGNMENT, BufferPool, CopyEvent, CopyStream, round_up


class WeightStore(ABC):
    """Keeps the shards of units, and brings them to the device."""

    def __init__(self, device: torch.device) -> None:
        """Bring units to `device`."""
        self._stream = CopyStream(device)

    @abstractmethod
    def fetch(self, unit: int, following: Sequence[int]) -> Tensor:
        """A unit's bytes on the device, uint8, ready for the current stream; starts to fetch those that follow."""

    def release(self) -> None:
        """Let later copies reuse the device memory fetched last: every use of it is queued by now."""
        self._stream.release()

    @abstractmethod
    def write(self, unit: int, start: int, *, values: Tensor) -> None:
        """Replace bytes from `start` by `values` [n], of any device; what was fetched ahead is dropped."""

    @abstractmethod
    def read(self, unit: int, start: int, *, count: int) -> Tensor:
        """A copy of `count` bytes from `start`, uint8 on the host."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until all writes are complete."""

    @abstractmethod
    def close(self) -> None:
        """Free memory and files, once nothing is under way."""


class HostWeights(WeightStore):
    """Units in host memory, each copied to the device while the one before it computes.

    On a CPU device a unit is handed out as it is: such a store holds what stays in memory when the rest is on disk.
    """

    def __init__(self, sizes: Sequence[int], *, device: torch.device, pin: bool) -> None:
        """Reserve memory for units of these bytes (0 for those that are kept elsewhere); `pin` page-locks it."""
        super().__init__(device)
        self._memory = BufferPool(1, nbytes=max(1, sum(sizes)), pin=pin)
        self._shards: Sequence[Tensor] = torch.split(self._memory.take()[: sum(sizes)], list(sizes))
        self._prefetched: dict[int, tuple[Tensor, CopyEvent]] = {}  # on their way to the device

    def fetch(self, unit: int, following: Sequence[int]) -> Tensor:
        """Copy the unit, unless it was prefetched, and start to copy the next one."""
        if not self._stream.is_async:
            return self._shards[unit]
        shard, copied = self._prefetched.pop(unit) if unit in self._prefetched else self._start(unit)
        # One ahead is enough: a copy takes less time than a unit's compute, or the link is the limit anyway.
        self._prefetched = {other: self._prefetched.get(other) or self._start(other) for other in following[:1]}
        self._stream.hand_over(copied)
        return shard

    def write(self, unit: int, start: int, *, values: Tensor) -> None:
        """Overwrite the memory."""
        self._drop_prefetched()  # no copy may read what changes, nor be used when it is outdated
        self._shards[unit][start : start + values.numel()].copy_(values)

    def read(self, unit: int, start: int, *, count: int) -> Tensor:
        """A copy."""
        return self._shards[unit][start : start + count].clone()

    def flush(self) -> None:
        """Do nothing: writes are complete when they return."""

    def close(self) -> None:
        """Unlock and free the memory."""
        self._drop_prefetched()
        self._shards = ()
        self._memory.close()

    def _drop_prefetched(self) -> None:
        self._stream.synchronize()  # Lifetime: a copy under way still reads the host's memory and fills the device's
        self._prefetched.clear()

    def _start(self, unit: int) -> tuple[Tensor, CopyEvent]:
        shard = self._stream.empty(self._shards[unit].numel())
        return shard, self._stream.prefetch(shard, self._shards[unit])


class NvmeWeights(WeightStore):
    """Units in a file, read ahead of use and written behind through a fixed pool of buffers.

    A unit larger than a buffer is read in several pieces, so the memory between disk and device is that of the buffers,
    whatever the model's size.
    """

    def __init__(self, sizes: Sequence[int], *, file: DirectFile, device: torch.device) -> None:
        """Keep units of these bytes (0 for those that are kept elsewhere) in a file of `file_bytes(sizes)`."""
        super().__init__(device)
        self._sizes, self._file = sizes, file
        self._offsets = [0, *accumulate(round_up(size) for size in sizes)]
        self._queue = PrefetchQueue[int](file, depth=file.pool.count)
        self._writer = _ContiguousWriter(file)
        # On the CPU the gather has copied a unit before the next one is fetched, so one piece of memory serves all.
        self._unit = torch.empty(0 if self._stream.is_async else round_up(max(sizes)), dtype=torch.uint8)

    def fetch(self, unit: int, following: Sequence[int]) -> Tensor:
        """Copy the unit's pieces to the device as they arrive from disk; read on as far as there are buffers."""
        self._writer.finish()
        expected = [other for other in (unit, *following) if self._sizes[other]]
        known = list(dict.fromkeys(self._queue.tags))
        if known != expected[: len(known)]:  # another order than last time
            self._queue.cancel()
            known = []
        own = self._pieces(unit, count=self._sizes[unit])
        for other in expected[len(known) :]:
            if other == unit or len(self._queue.tags) < len(own) + self._file.pool.count:
                self._queue.plan(self._pieces(other, count=self._sizes[other]))
        nbytes = round_up(self._sizes[unit])
        shard = self._stream.empty(nbytes) if self._stream.is_async else self._unit[:nbytes]
        for piece, buffer in self._queue.take(len(own)):
            start, count = piece.offset - self._offsets[unit], piece.place.stop
            copied = self._stream.prefetch(shard[start : start + count], buffer[:count])
            self._stream.hand_over(copied)
            self._file.pool.hold(buffer, copied)  # Lifetime: it is read into again only when the device has its bytes
            self._file.pool.give_back(buffer)
        return shard

    def write(self, unit: int, start: int, *, values: Tensor) -> None:
        """Collect the bytes in a buffer, which is written when it is full or the bytes no longer follow each other."""
        self._queue.cancel()  # it may hold bytes that change
        self._writer.write(self._offsets[unit] + start, values)

    def read(self, unit: int, start: int, *, count: int) -> Tensor:
        """Read the sectors that hold the bytes, and cut them out."""
        self._writer.finish()
        self._queue.cancel()
        pieces = self._pieces(unit, start, count=count)
        self._queue.plan(pieces)
        skipped = (self._offsets[unit] + start) % ALIGNMENT  # the start of the first sector
        sectors = torch.empty(round_up(skipped + count), dtype=torch.uint8)
        for piece, buffer in self._queue.take(len(pieces)):
            at = piece.offset - pieces[0].offset
            sectors[at : at + piece.place.stop] = buffer[piece.place]
            self._file.pool.give_back(buffer)
        return sectors[skipped : skipped + count]

    def flush(self) -> None:
        """Write what is collected, and wait for the disk."""
        self._writer.finish()
        self._file.flush()

    def close(self) -> None:
        """Free the file and the buffers."""
        self._queue.cancel()
        self._unit = torch.empty(0)
        self._file.close()

    def _pieces(self, unit: int, start: int = 0, *, count: int) -> list[PlannedRead[int]]:
        """The parts of the file that hold `count` bytes of a unit from `start`: whole sectors, as a buffer holds."""
        first, step = self._offsets[unit] + start, self._file.pool.nbytes
        base, stop = first - first % ALIGNMENT, round_up(first + count)
        cuts = range(base, stop, step) if count else ()
        return [PlannedRead(unit, cut, slice(0, min(step, stop - cut))) for cut in cuts]


class _ContiguousWriter:
    """Collects bytes that follow each other in a buffer, and writes them in whole sectors."""

    def __init__(self, file: DirectFile) -> None:
        self._file, self._pool = file, file.pool
        self._buffer: Tensor | None = None
        self._base = self._end = 0  # in the file: where the buffer begins, and where the next byte goes

    def write(self, offset: int, values: Tensor) -> None:
        """Put `values`, uint8 [n], at `offset` of the file, sooner or later."""
        while values.numel():
            buffer = self._buffer_for(offset)
            free = buffer.numel() - (offset - self._base)
            part, values = values[:free], values[free:]
            buffer[offset - self._base :][: part.numel()].copy_(part)  # waits for the device, if `part` is there
            offset = self._end = offset + part.numel()
            if part.numel() == free:
                self.finish()

    def finish(self) -> None:
        """Start to write what is collected."""
        if self._buffer is None:
            return
        buffer, used = self._buffer, self._end - self._base
        whole = round_up(used)
        if whole > used:  # the rest of the last sector belongs to what follows: keep it
            own = buffer[whole - ALIGNMENT : used].clone()
            self._file.read(self._base + whole - ALIGNMENT, buffer[whole - ALIGNMENT : whole]).wait()
            buffer[whole - ALIGNMENT : used] = own
        self._file.write(self._base, buffer[:whole])
        self._pool.give_back(buffer)
        self._buffer = None

    def _buffer_for(self, offset: int) -> Tensor:
        if self._buffer is not None and offset == self._end:
            return self._buffer
        self.finish()
        self._buffer, self._base = self._pool.take(), offset - offset % ALIGNMENT
        if offset > self._base:  # the start of the first sector belongs to what comes before: keep it
            self._file.read(self._base, self._buffer[:ALIGNMENT]).wait()
        return self._buffer


def file_bytes(sizes: Sequence[int]) -> int:
    """The size of a file for units of these bytes."""
    return sum(round_up(size) for size in sizes)
