"""Working weights that rest off the device: which rows are where, and how they get to a gather and back.

A rank's rows of a unit lie side by side, padded as FSDP2 wants them, so that a unit comes in one piece. While one is
used, those that followed it the last time are brought along. Nothing is kept once it has been handed to a gather. The
optimizer hands updated rows back through `write`.

Left out: the memory and the files they rest in (`weights_host.py`, `weights_nvme.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.engine.offload.placeholder import OffloadedShard

_LINE = 64  # bytes: every parameter begins at a multiple, as tensors of their own do


def param_offload_device(config: EngineConfig, device: torch.device) -> OffloadDevice:
    """Where working weights rest; on a CPU machine the memory of the host is that of the device."""
    if config.offload_param == OffloadDevice.cpu and device.type == "cpu":
        return OffloadDevice.none
    return config.offload_param


class ShardedWeights(Protocol):
    """This rank's rows of the working weights, wherever they rest."""

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Make `values` [n], rounded to the working type, the elements from `start` of the rows of `name`, flat."""

    def read(self, name: str, start: int, *, count: int) -> Tensor:
        """A copy of `count` elements from `start` of the rows of `name`, [count] fp32 on the CPU."""

    def flush(self) -> None:
        """Wait until all that was written is where it rests."""

    def close(self) -> None:
        """Let go of memory and files."""


class WeightStore(Protocol):
    """Where units rest; a unit is a number, and bytes."""

    def fetch(self, unit: int, following: Sequence[int]) -> Tensor:
        """A unit's bytes on the device, uint8, ready for the current stream, and a start on the units that follow."""

    def release(self) -> None:
        """What was brought last has been used by all that is queued by now."""

    def drop_prefetched(self) -> None:
        """Drop what was brought ahead of use."""

    def write(self, unit: int, start: int, *, values: Tensor) -> None:
        """Replace bytes from `start` by `values` [n], of any device."""

    def read(self, unit: int, start: int, *, count: int) -> Tensor:
        """A copy of `count` bytes from `start`, uint8 on the CPU."""

    def flush(self) -> None:
        """Wait until all that was written is there."""

    def close(self) -> None:
        """Let go of memory and files."""


@dataclass(frozen=True)
class ShardSlot:
    """Where a parameter's rows lie."""

    unit: int
    start: int  # bytes from the start of the unit
    stop: int  # where the next one begins: what lies between belongs to nobody
    shape: torch.Size  # this rank's rows
    padded: torch.Size  # the first rank's


class PrefetchOrder:
    """Which unit comes after which: as it was last time, and before that in the order of the forward pass and back."""

    def __init__(self, units: int) -> None:
        """Follow a model of so many units."""
        self._at: tuple[int, bool] | None = None
        self._next = {(unit, False): (unit + 1, False) for unit in range(units - 1)}
        self._next |= {(unit, True): (unit - 1, True) for unit in range(1, units)}

    def arrive(self, unit: int, *, backward: bool) -> None:
        """Note that `unit` is used now."""
        here, before = (unit, backward), self._at
        self._at = here
        if before is None or before == here:
            return
        if before[1] and not backward:  # a step may come first, and change what would be brought
            self._next.pop(before, None)
        else:
            self._next[before] = here

    def ahead(self) -> Iterator[int]:
        """The units that follow, as far as one can tell, none of them twice."""
        seen, here = set(), self._at
        while here is not None and here[0] not in seen:
            seen.add(here[0])
            here = self._next.get(here)
            if here is not None and here[0] not in seen:
                yield here[0]


class OffloadedWeights:
    """The working weights of a model that rest off the device; a `ShardedWeights`."""

    def __init__(
        self,
        slots: Mapping[str, ShardSlot],
        stores: Sequence[WeightStore],
        *,
        dtype: torch.dtype,
        others: ShardedWeights,
    ) -> None:
        """Bring units and cut parameters out of them.

        Args:
            slots: where each parameter lies.
            stores: of each unit; units may share one.
            dtype: of the working weights.
            others: of the parameters that have no slot.
        """
        self.dtype = dtype
        self._slots, self._homes, self._others = slots, stores, others
        self._route = PrefetchOrder(len(stores))
        self._open: Tensor | None = None  # the unit that is being handed out
        self._waiting: dict[str, ShardSlot] = {}  # what has not been handed out of it
        self._brought: WeightStore | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def stand_in(self, name: str, device: torch.device) -> OffloadedShard:
        """What stands for the rows of `name` in the model."""
        shape = self._slots[name].shape
        return OffloadedShard(shape, dtype=self.dtype, device=device, source=partial(self.take, name))

    def take(self, name: str) -> Tensor:
        """This rank's padded rows of `name` on the device, for a gather that is queued before the next call."""
        slot = self._slots[name]
        if name not in self._waiting:
            self._bring(slot.unit)
        del self._waiting[name]
        assert self._open is not None
        nbytes = slot.padded.numel() * self.dtype.itemsize
        rows = self._open[slot.start : slot.start + nbytes].view(self.dtype).view(slot.padded)
        if not self._waiting:
            self._open = None
        return rows

    def drop_prefetched(self) -> None:
        """Drop what was brought ahead of use: nothing is computed for a while, or weights change."""
        self._retire()
        for home in self._distinct:
            home.drop_prefetched()

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """See `ShardedWeights.write`; not while a forward or backward runs."""
        if name not in self._slots:
            self._others.write(name, start, values=values)
            return
        slot, values = self._slots[name], values.detach().to(self.dtype)
        first = slot.start + start * self.dtype.itemsize
        raw = values.contiguous().view(torch.uint8)
        if start + values.numel() == slot.shape.numel():  # the gap up to the next one too: writes stay in one piece
            raw = torch.cat([raw, raw.new_zeros(slot.stop - first - raw.numel())])
        self._retire()
        self._homes[slot.unit].write(slot.unit, first, values=raw)

    def read(self, name: str, start: int, *, count: int) -> Tensor:
        """See `ShardedWeights.read`."""
        if name not in self._slots:
            return self._others.read(name, start, count=count)
        slot, size = self._slots[name], self.dtype.itemsize
        raw = self._homes[slot.unit].read(slot.unit, slot.start + start * size, count=count * size)
        return raw.view(self.dtype).float()

    def rows(self, name: str) -> Tensor:
        """A copy of this rank's rows of `name`, in their shape and type, on the CPU."""
        shape = self._slots[name].shape
        return self.read(name, 0, count=shape.numel()).to(self.dtype).view(shape)

    def flush(self) -> None:
        """See `ShardedWeights.flush`."""
        self._others.flush()
        for home in self._distinct:
            home.flush()

    def close(self) -> None:
        """See `ShardedWeights.close`."""
        self.drop_prefetched()
        for home in self._distinct:
            home.close()

    def _bring(self, unit: int) -> None:
        self._retire()
        self._route.arrive(unit, backward=torch._C._current_graph_task_id() != -1)
        home = self._homes[unit]
        following = [other for other in self._route.ahead() if self._homes[other] is home]
        self._open, self._brought = home.fetch(unit, following), home
        self._waiting = {name: slot for name, slot in self._slots.items() if slot.unit == unit}

    def _retire(self) -> None:
        """By now the gather of what was handed out is queued."""
        self._open, self._waiting = None, {}
        if self._brought is not None:
            self._brought.release()
            self._brought = None

    @property
    def _distinct(self) -> list[WeightStore]:
        return list({id(home): home for home in self._homes}.values())


def lay_out(
    units: Sequence[Mapping[str, torch.Size]], *, ranks: int, rank: int, dtype: torch.dtype
) -> dict[str, ShardSlot]:
    """Where the rows that `rank` holds of each parameter go.

    Args:
        units: for each unit, its parameters' whole shapes by name.
        ranks: how many share the rows.
        rank: whose rows.
        dtype: of the working weights.
    """
    slots: dict[str, ShardSlot] = {}
    for unit, shapes in enumerate(units):
        start = 0
        for name, shape in shapes.items():
            share = -(-shape[0] // ranks)
            own = max(0, min(share, shape[0] - rank * share))
            padded = torch.Size((share, *shape[1:]))
            stop = start + -(-padded.numel() * dtype.itemsize // _LINE) * _LINE
            slots[name] = ShardSlot(unit, start, stop, torch.Size((own, *shape[1:])), padded)
            start = stop
    return slots


def unit_bytes(slots: Mapping[str, ShardSlot], units: int) -> list[int]:
    """The bytes of each of so many units."""
    sizes = [0] * units
    for slot in slots.values():
        sizes[slot.unit] = max(sizes[slot.unit], slot.stop)
    return sizes
