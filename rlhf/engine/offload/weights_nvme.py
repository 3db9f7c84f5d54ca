"""Working weights at rest on disk: read ahead of use, written behind, through a fixed set of buffers.

A unit larger than a buffer comes in several pieces, so the memory between disk and device is that of the buffers
whatever the model. Updates are collected in a buffer while they go on where the last one ended, and leave it in pieces
that begin and end with a sector of the disk. Left out: the transfers (`direct_io.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.engine.offload.buffer_pool import ALIGNMENT, BufferPool, Transfer, round_up
from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.weights_host import Lane


class _Piece(NamedTuple):
    """A part of the file that fits into a buffer."""

    unit: int
    offset: int  # in the file
    count: int  # bytes, whole sectors


class _Flight(NamedTuple):
    """A piece on its way to memory."""

    piece: _Piece
    buffer: Tensor
    pending: Transfer


class _ReadAhead:
    """Reads pieces in the order they are planned, as many at once as there are buffers."""

    def __init__(self, file: DirectFile, buffers: BufferPool) -> None:
        self._file, self._buffers = file, buffers
        self._planned: deque[_Piece] = deque()
        self._flying: deque[_Flight] = deque()

    @property
    def units(self) -> list[int]:
        """The units whose pieces are planned or under way, in order."""
        return list(dict.fromkeys([flight.piece.unit for flight in self._flying] + [p.unit for p in self._planned]))

    def __len__(self) -> int:
        """How many pieces are planned or under way."""
        return len(self._flying) + len(self._planned)

    def plan(self, pieces: Sequence[_Piece]) -> None:
        """Read these after what is planned."""
        self._planned.extend(pieces)

    def pieces(self, count: int) -> Iterator[tuple[_Piece, Tensor]]:
        """The next `count` pieces and their bytes, each to be used before the next is asked for."""
        for _ in range(count):
            self._start()
            flight = self._flying.popleft()
            try:
                flight.pending.wait()
                yield flight.piece, flight.buffer
            finally:
                self._buffers.give_back(flight.buffer)
        self._start()

    def cancel(self) -> None:
        """Forget all plans."""
        self._planned.clear()
        for flight in self._flying:
            flight.pending.finish()
            self._buffers.give_back(flight.buffer)
        self._flying.clear()

    def _start(self) -> None:
        while self._planned and len(self._flying) < self._buffers.count:
            piece, buffer = self._planned.popleft(), self._buffers.take()
            self._flying.append(_Flight(piece, buffer, self._file.read(piece.offset, buffer[: piece.count])))


class _WriteBehind:
    """Collects bytes that follow each other in a buffer, and writes it when it is full or others come."""

    def __init__(self, file: DirectFile, buffers: BufferPool) -> None:
        self._file, self._buffers = file, buffers
        self._buffer: Tensor | None = None
        self._base = self._end = 0  # in the file: where the buffer begins, and where the next byte goes

    def write(self, offset: int, values: Tensor) -> None:
        """Put `values`, uint8 [n], at `offset` of the file, sooner or later."""
        while values.numel():
            buffer = self._buffer_for(offset)
            room = buffer.numel() - (offset - self._base)
            part, values = values[:room], values[room:]
            buffer[offset - self._base :][: part.numel()].copy_(part)
            offset = self._end = offset + part.numel()
            if part.numel() == room:
                self.finish()

    def finish(self) -> None:
        """Start to write what is collected."""
        if self._buffer is None:
            return
        buffer, used = self._buffer, self._end - self._base
        whole = round_up(used)
        if whole > used:  # the rest of the last sector is somebody else's
            own = buffer[whole - ALIGNMENT : used].clone()
            self._file.read(self._base + whole - ALIGNMENT, buffer[whole - ALIGNMENT : whole]).wait()
            buffer[whole - ALIGNMENT : used] = own
        self._file.write(self._base, buffer[:whole])
        self._buffers.give_back(buffer)
        self._buffer = None

    def _buffer_for(self, offset: int) -> Tensor:
        if self._buffer is not None and offset == self._end:
            return self._buffer
        self.finish()
        self._buffer, self._base = self._buffers.take(), offset - offset % ALIGNMENT
        if offset > self._base:
            self._file.read(self._base, self._buffer[:ALIGNMENT]).wait()
        return self._buffer


class NvmeWeights:
    """Units in a file; see `WeightStore` in `weights.py`."""

    def __init__(self, sizes: Sequence[int], *, file: DirectFile, buffers: BufferPool, device: torch.device) -> None:
        """Use a file that has room for them, and buffers that nobody else uses.

        Args:
            sizes: bytes of each unit; 0 for those that rest elsewhere.
            file: at least `file_bytes(sizes)`.
            buffers: page-locked for a CUDA device.
            device: where units are used.
        """
        self._sizes, self._device = sizes, device
        self._offsets = [0, *accumulate(round_up(size) for size in sizes)]
        self._file, self._buffers = file, buffers
        self._ahead, self._behind = _ReadAhead(file, buffers), _WriteBehind(file, buffers)
        self._lane = Lane(device) if device.type == "cuda" else None
        # On the CPU a gather has copied a unit before the next one comes, so that one piece of memory serves all.
        self._room = torch.empty(0 if self._lane else round_up(max(sizes)), dtype=torch.uint8)

    def fetch(self, unit: int, following: Sequence[int]) -> Tensor:
        """See `WeightStore.fetch`."""
        self._behind.finish()
        expected = [other for other in (unit, *following) if self._sizes[other]]
        known = self._ahead.units
        if known != expected[: len(known)]:
            self._ahead.cancel()
            known = []
        own = self._pieces(unit, count=self._sizes[unit])
        for other in expected[len(known) :]:
            if other == unit or len(self._ahead) < len(own) + self._buffers.count:
                self._ahead.plan(self._pieces(other, count=self._sizes[other]))
        rows = self._empty(self._sizes[unit])
        for piece, buffer in self._ahead.pieces(len(own)):
            start = piece.offset - self._offsets[unit]
            self._copy(rows[start : start + piece.count], buffer)
        return rows

    def release(self) -> None:
        """See `WeightStore.release`."""
        if self._lane is not None:
            self._lane.release()

    def drop_prefetched(self) -> None:
        """See `WeightStore.drop_prefetched`."""
        self._ahead.cancel()

    def write(self, unit: int, start: int, *, values: Tensor) -> None:
        """See `WeightStore.write`."""
        self._ahead.cancel()
        self._behind.write(self._offsets[unit] + start, values)

    def read(self, unit: int, start: int, *, count: int) -> Tensor:
        """See `WeightStore.read`."""
        self._behind.finish()
        self._ahead.cancel()
        pieces = self._pieces(unit, start, count=count)
        self._ahead.plan(pieces)
        first = self._offsets[unit] + start
        values = torch.empty(count, dtype=torch.uint8)
        for piece, buffer in self._ahead.pieces(len(pieces)):
            skipped = max(0, first - piece.offset)
            into = values[max(0, piece.offset - first) :]
            into[: piece.count - skipped] = buffer[skipped : piece.count][: into.numel()]
        return values

    def flush(self) -> None:
        """See `WeightStore.flush`."""
        self._behind.finish()
        self._file.flush()

    def close(self) -> None:
        """See `WeightStore.close`."""
        self._ahead.cancel()
        self._room = torch.empty(0)
        self._file.close()
        self._buffers.close()

    def _pieces(self, unit: int, start: int = 0, *, count: int) -> list[_Piece]:
        """The parts of the file that hold `count` bytes of a unit from `start`."""
        first = self._offsets[unit] + start
        base, stop = first - first % ALIGNMENT, round_up(first + count)
        cuts = range(base, stop, self._buffers.nbytes) if count else ()
        return [_Piece(unit, cut, min(self._buffers.nbytes, stop - cut)) for cut in cuts]

    def _empty(self, nbytes: int) -> Tensor:
        nbytes = round_up(nbytes)
        return self._lane.empty(nbytes) if self._lane else self._room[:nbytes]

    def _copy(self, into: Tensor, buffer: Tensor) -> None:
        if self._lane is None:
            into.copy_(buffer[: into.numel()])
            return
        copied = self._lane.copy(into, buffer[: into.numel()])
        self._lane.hand_over(copied)
        copied.synchronize()  # the buffer is read into again


def file_bytes(sizes: Sequence[int]) -> int:
    """The size of a file for units of these bytes."""
    return sum(round_up(size) for size in sizes)
