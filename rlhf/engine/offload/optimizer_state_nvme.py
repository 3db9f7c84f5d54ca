"""Optimizer states and gradient sums on disk: neither is ever in memory as a whole.

Gradients are written as they arrive. A step reads a record, updates it and writes it back, while the next one is read
and the last one written; all of them pass through one fixed set of buffers. A failing disk is remembered until all
ranks can be told (`failure`), because a rank that stops between collectives leaves the others waiting.
Left out: where in the file what is (`nvme_layout.py`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.engine.adam_kernel import AdamKernel, ParameterSlice
from rlhf.engine.norms import squared_norm
from rlhf.engine.offload.buffer_pool import BufferPool, Transfer
from rlhf.engine.offload.copy_stream import CopyEvent, CopyStream
from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.nvme_layout import Tile, TileSlice
from rlhf.engine.offload.optimizer_state import PARTS, ParameterShard, Update
from rlhf.engine.offload.weights import ShardedWeights
from rlhf.engine.offload.working_rows import write_back


@dataclass(frozen=True)
class NvmeResources:
    """What a home on disk works with."""

    file: DirectFile
    records: list[Tile]
    buffers: BufferPool  # each at least as large as any record
    courier: CopyStream  # between the device and the buffers
    reads_ahead: bool
    writes_behind: bool


class _Sum(NamedTuple):
    """What is on disk of a parameter's gradient."""

    dtype: torch.dtype
    square: Tensor  # of the sum so far, [] fp64


class _Letter(NamedTuple):
    """A gradient on its way from the device to its place on disk."""

    buffer: Tensor
    receipt: CopyEvent
    record: Tile
    place: slice


class _Load(NamedTuple):
    """A buffer that is being filled from disk."""

    record: Tile
    span: TileSlice | None  # None for a whole record
    buffer: Tensor
    pending: Transfer
    receipt: CopyEvent | None = None  # of what else is copied into it


class NvmeStateStore:
    """A home in a file."""

    in_memory = False
    has_masters = True

    def __init__(
        self, shapes: Sequence[ParameterShard], room: NvmeResources, *, kernel: AdamKernel, rows: ShardedWeights
    ) -> None:
        """Start at zero moments, which is what a new file holds.

        Args:
            shapes: the parameters, all of `room.records`.
            room: file and buffers.
            kernel: of the CPU.
            rows: their working weights.
        """
        self.shapes, self._room, self.kernel, self.rows = shapes, room, kernel, rows
        self._shapes = {shape.name: shape for shape in shapes}
        self.steps = {shape.name: torch.zeros(()) for shape in shapes}
        self.failure: RuntimeError | None = None
        self._sums: dict[str, _Sum] = {}
        self._outbox: deque[_Letter] = deque()
        self._places: dict[str, list[tuple[Tile, TileSlice]]] = defaultdict(list)
        for record in room.records:
            for span in record.spans:
                self._places[span.name].append((record, span))

    def add(self, name: str, gradient: Tensor) -> None:
        """Write a flat gradient, or add it to what was written."""
        if self.failure is None:
            with self._remembering():
                self._sums[name] = self._add(name, gradient) if name in self._sums else self._first(name, gradient)

    def squares(self) -> dict[str, Tensor]:
        """Squared norms of the sums, known since they were written."""
        return {name: known.square for name, known in self._sums.items()}

    def clear(self) -> None:
        """Forget them; their bytes will be overwritten."""
        with self._remembering():
            self._send(keep=0)
        self._sums = {}

    def elements(self) -> int:
        """None are kept."""
        return 0

    def begin(self) -> None:
        """Nothing to fix: updates of a home on disk are never delayed."""

    def step(self, update: Update) -> None:
        """One pass over the records that have a gradient."""
        names = self._sums.keys() & update.touched
        for name in names:
            self.steps[name] += 1
        with self._remembering():
            self._send(keep=0)
            self._pass(names, update)
        self._sums = {}

    def write_back(self) -> None:
        """Read the weights and hand them to the working weights."""
        for shape in self.shapes:
            self.rows.write(shape.name, 0, values=self.read(shape.name, "weight").view(-1))

    def read(self, name: str, part: str) -> Tensor:
        """This rank's rows, as a copy."""
        rows = torch.empty(self._shapes[name].count)
        for load in self._ahead([partial(self._load, *place, part=part) for place in self._places[name]]):
            assert load.span is not None
            rows[load.span.start : load.span.stop].copy_(load.record.part(load.buffer, part, span=load.span))
            self._room.buffers.give_back(load.buffer)
        return rows.view(self._shapes[name].sizes)

    def write(self, name: str, part: str, *, rows: Tensor) -> None:
        """Set them."""
        flat = rows.reshape(-1)
        for record, span in self._places[name]:
            buffer = self._room.buffers.take()
            record.part(buffer, part, span=span).copy_(flat[span.start : span.stop])
            self._store(record, buffer, place=record.place(part, span))

    def close(self) -> None:
        """Remove the file, and unlock the buffers, once no copy from the device is on its way to one."""
        self._room.courier.finish()
        self._room.file.close()
        self._room.buffers.close()

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.failure = self.failure or error

    def _first(self, name: str, gradient: Tensor) -> _Sum:
        keep = self._room.buffers.count - 1 if self._room.courier.is_behind else 0
        for record, span in self._places[name]:
            buffer = self._room.buffers.take()
            place = record.gradient_place(span, gradient.dtype.itemsize)
            into = buffer[place].view(gradient.dtype)[: span.count]
            receipt = self._room.courier.copy(into, gradient[span.start : span.stop])
            self._outbox.append(_Letter(buffer, receipt, record, place))
            self._send(keep=keep)
        return _Sum(gradient.dtype, squared_norm(gradient))

    def _send(self, *, keep: int) -> None:
        """Write the gradients that have reached their buffers, waiting for all but the last `keep`."""
        while len(self._outbox) > keep:
            letter = self._outbox.popleft()
            letter.receipt.wait()
            self._store(letter.record, letter.buffer, place=letter.place)

    def _add(self, name: str, gradient: Tensor) -> _Sum:
        self._send(keep=0)
        known, square = self._sums[name].dtype, torch.zeros((), dtype=torch.float64)
        starts = [partial(self._load_sum, *place, known=known, gradient=gradient) for place in self._places[name]]
        for record, span, buffer, _, receipt in self._ahead(starts):
            assert span is not None
            assert receipt is not None
            receipt.wait()
            place = record.gradient_place(span, 4)
            total = buffer[place].view(torch.float32)[: span.count]
            if known != torch.float32:
                total.copy_(_narrow(record, buffer, span=span).view(known)[: span.count])
            total += _incoming(record, buffer, span=span).view(gradient.dtype)[: span.count]
            square += squared_norm(total)
            self._store(record, buffer, place=place)
        return _Sum(torch.float32, square)

    def _load_sum(self, record: Tile, span: TileSlice, *, known: torch.dtype, gradient: Tensor) -> _Load:
        """Bring what is known of a span's sum, and what is to be added, into one buffer, side by side."""
        buffer, place = self._room.buffers.take(), record.gradient_place(span, known.itemsize)
        into = buffer[place] if known == torch.float32 else _narrow(record, buffer, span=span)
        pending = self._room.file.read(record.offset + place.start, into)
        incoming = _incoming(record, buffer, span=span).view(gradient.dtype)[: span.count]
        receipt = self._room.courier.copy(incoming, gradient[span.start : span.stop])
        return _Load(record, span, buffer, pending, receipt)

    def _pass(self, names: Set[str], update: Update) -> None:
        records = [record for record in self._room.records if any(span.name in names for span in record.spans)]
        for load in self._ahead([partial(self._load_record, record, names) for record in records]):
            record, buffer = load.record, load.buffer
            pieces = [self._piece(record, span, buffer=buffer) for span in record.spans if span.name in names]
            for tile in self.kernel.update(pieces, lr=update.lr, scale=update.scale, betas=update.betas):
                write_back(self.rows, tile)
            self._store(record, buffer, place=slice(record.weight_at, record.nbytes))

    def _load_record(self, record: Tile, names: Set[str]) -> _Load:
        """Bring a record, from its first gradient on."""
        gradients = [self._gradient_place(record, span) for span in record.spans if span.name in names]
        place = slice(min(gradient.start for gradient in gradients), record.nbytes)
        buffer = self._room.buffers.take()
        return _Load(record, None, buffer, self._room.file.read(record.offset + place.start, buffer[place]))

    def _load(self, record: Tile, span: TileSlice, *, part: str) -> _Load:
        buffer, place = self._room.buffers.take(), record.place(part, span)
        return _Load(record, span, buffer, self._room.file.read(record.offset + place.start, buffer[place]))

    def _store(self, record: Tile, buffer: Tensor, *, place: slice) -> None:
        pending = self._room.file.write(record.offset + place.start, buffer[place])
        self._room.buffers.give_back(buffer)
        if not self._room.writes_behind:
            pending.wait()

    def _piece(self, record: Tile, span: TileSlice, *, buffer: Tensor) -> ParameterSlice:
        gradient = buffer[self._gradient_place(record, span)].view(self._sums[span.name].dtype)[: span.count]
        weight, *moments = (record.part(buffer, part, span=span) for part in PARTS)
        shape = self._shapes[span.name]
        return ParameterSlice(span.name, span.start, shape.decays, self.steps[span.name], weight, gradient, *moments)

    def _gradient_place(self, record: Tile, span: TileSlice) -> slice:
        return record.gradient_place(span, self._sums[span.name].dtype.itemsize)

    def _ahead(self, starts: Sequence[Callable[[], _Load]]) -> Iterator[_Load]:
        """Loads that have come from disk, each started while the one before it is in use."""
        depth = 1 if self._room.reads_ahead and self._room.buffers.count > 1 else 0
        loads: deque[_Load] = deque()
        for start in starts:
            loads.append(start())
            if len(loads) > depth:
                loads[0].pending.wait()
                yield loads.popleft()
        for load in loads:
            load.pending.wait()
            yield load


def _narrow(record: Tile, buffer: Tensor, *, span: TileSlice) -> Tensor:
    """Room in a buffer for a span of two bytes an element, beside its gradient and its weights."""
    at = record.place("exp_avg", span).start
    return buffer[at : at + 2 * span.room]


def _incoming(record: Tile, buffer: Tensor, *, span: TileSlice) -> Tensor:
    """Room for four bytes an element."""
    return buffer[record.place("weight", span)]
