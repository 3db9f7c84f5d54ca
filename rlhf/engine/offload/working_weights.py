"""Working weights as the optimizer writes them: by parameter, this rank's shard, on the device or offloaded.

All take fp32 values and round them to the working type. Offloaded weights are fetched when FSDP2 gathers them, and
dropped when that has read them. Each rank stores its shard of a unit contiguously, padded as FSDP2 wants it, so
fetching a unit is one copy. While a unit computes, the units that followed it last time are prefetched.
See [Note: offload], and the memory and the files of offloaded units (`weight_stores.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.engine.adam_kernel import UpdatedWeights
from rlhf.engine.fsdp_units import ParameterGroup, local_shard, rows_of
from rlhf.engine.offload.transfers import BufferPool, CopyStream
from rlhf.engine.offload.weight_stores import WeightStore

_BUFFERS = 4
_STAGED = 1 << 22  # elements of a staging buffer
STAGING_BYTES = _BUFFERS * 4 * _STAGED
"""Page-locked memory of `StagedWeights`."""
_CACHE_LINE = 64  # bytes: every offloaded parameter begins at a multiple, as tensors of their own do


class ShardedWeights(ABC):
    """This rank's shards of the working weights, flat, by the parameter's name."""

    @abstractmethod
    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Make `values` [n], rounded to the working type, the elements from `start` of a shard."""

    @abstractmethod
    def read(self, name: str, part: slice) -> Tensor:
        """A part of the elements of a shard, in the working type, on any device: the memory itself or a copy."""

    def write_back(self, slices: Sequence[UpdatedWeights]) -> None:
        """Write the updated masters of `slices`."""
        for part in slices:
            self.write(part.name, part.start, values=part.weight)

    def flush(self) -> None:  # noqa: B027 - most have nothing to do
        """Make what is queued or called from now on see all writes so far."""

    def close(self) -> None:  # noqa: B027
        """Free memory and files, other than the model's own."""


class DeviceWeights(ShardedWeights):
    """Weights on the device where the optimizer computes, too."""

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        """Serve the parameters of `groups`."""
        self._parameters = {name: parameter for group in groups for name, parameter in group.items()}

    def shard(self, name: str) -> Tensor:
        """The elements themselves, flat; FSDP2 may move them, so they are looked up each time."""
        return local_shard(self._parameters[name]).view(-1)

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Round `values` into the weights, on the current stream, as the forward that reads them."""
        self.shard(name)[start : start + values.numel()].copy_(values)

    def read(self, name: str, part: slice) -> Tensor:
        """The memory itself."""
        return self.shard(name)[part]

    def write_back(self, slices: Sequence[UpdatedWeights]) -> None:
        """All slices in one call to the device."""
        shards = {name: self.shard(name) for name in {part.name for part in slices}}
        into = [shards[part.name][part.start : part.start + part.weight.numel()] for part in slices]
        torch._foreach_copy_(into, [part.weight for part in slices])


class StagedWeights(ShardedWeights):
    """Weights on a device, written from the host through page-locked buffers on a stream of their own."""

    def __init__(self, groups: Sequence[ParameterGroup], device: torch.device, *, pin: bool) -> None:
        """Serve the parameters of `groups`, on `device`; `pin` page-locks the buffers."""
        self._weights = DeviceWeights(groups)
        self._stream = CopyStream(device)
        self._pool = BufferPool(_BUFFERS, nbytes=4 * _STAGED, pin=pin and device.type == "cuda")

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Round on the host, where `values` are in cache, and send the rounded ones."""
        shard = self._weights.shard(name)
        for part in torch.split(values, _STAGED):
            buffer = self._pool.take()  # waits for the copy that used it last
            staged = buffer.view(shard.dtype)[: part.numel()].copy_(part)
            # Order: the copy follows a forward that is queued and still reads the old weights.
            self._pool.hold(buffer, self._stream.copy(shard[start : start + part.numel()], staged))
            self._pool.give_back(buffer)
            start += part.numel()

    def read(self, name: str, part: slice) -> Tensor:
        """A copy on the host."""
        shard = self._weights.read(name, part)
        found = torch.empty(shard.numel(), dtype=shard.dtype)
        for piece, into in zip(torch.split(shard, _STAGED), torch.split(found, _STAGED), strict=True):
            staged = self._pool.take().view(shard.dtype)[: piece.numel()]
            self._stream.copy(staged, piece).wait()  # on the stream of `write`: what was written before is read
            into.copy_(staged)
            self._pool.give_back(staged)
        return found

    def flush(self) -> None:
        """Make the current stream wait for what was sent: the next forward reads the new weights."""
        self._stream.join()

    def close(self) -> None:
        """Free the buffers, once no copy reads them."""
        self._pool.close()  # waits for every copy that holds one


@dataclass(frozen=True)
class ShardSlot:
    """Where a parameter's shard lies in its unit."""

    unit: int
    start: int  # bytes from the start of the unit
    stop: int  # where the next one begins: the gap between belongs to nobody
    shape: torch.Size  # this rank's shard
    padded: torch.Size  # the first rank's, which is the largest


def lay_out_units(
    units: Sequence[Mapping[str, torch.Size]], *, ranks: int, rank: int, dtype: torch.dtype
) -> dict[str, ShardSlot]:
    """Where the shards of `rank` go; `units` has, for each unit, its parameters' whole shapes by name."""
    slots: dict[str, ShardSlot] = {}
    for unit, shapes in enumerate(units):
        start = 0
        for name, shape in shapes.items():
            own, padded = (
                torch.Size((len(rows_of(shape[0], ranks=ranks, rank=holder)), *shape[1:])) for holder in (rank, 0)
            )
            stop = start + -(-padded.numel() * dtype.itemsize // _CACHE_LINE) * _CACHE_LINE
            slots[name] = ShardSlot(unit, start, stop, own, padded)
            start = stop
    return slots


def unit_bytes(slots: Mapping[str, ShardSlot], units: int) -> list[int]:
    """The bytes of each of so many units."""
    sizes = [0] * units
    for slot in slots.values():
        sizes[slot.unit] = max(sizes[slot.unit], slot.stop)
    return sizes


class PrefetchOrder:
    """Which unit follows which: as it was last time, and at first in the order of the forward pass and back."""

    def __init__(self, units: int) -> None:
        """Follow a model of so many units."""
        self._at: tuple[int, bool] | None = None  # unit, and whether in backward
        self._next = {(unit, False): (unit + 1, False) for unit in range(units - 1)}
        self._next |= {(unit, True): (unit - 1, True) for unit in range(1, units)}

    def arrive(self, unit: int, *, backward: bool) -> None:
        """Note that `unit` is used now."""
        here, before = (unit, backward), self._at
        self._at = here
        if before is None or before == here:
            return
        if before[1] and not backward:
            # An optimizer step may come between backward and the next forward, and outdate what would be prefetched.
            self._next.pop(before, None)
        else:
            self._next[before] = here

    def ahead(self) -> Iterator[int]:
        """The units expected next, in order, none of them twice."""
        seen, here = set(), self._at
        while here is not None and here[0] not in seen:
            seen.add(here[0])
            here = self._next.get(here)
            if here is not None and here[0] not in seen:
                yield here[0]


class OffloadedWeights(ShardedWeights):
    """The working weights of a model that are kept off the device, and those few that are not."""

    def __init__(
        self,
        slots: Mapping[str, ShardSlot],
        stores: Sequence[WeightStore],
        *,
        dtype: torch.dtype,
        others: ShardedWeights,
    ) -> None:
        """Fetch units, and cut parameters out of them.

        Args:
            slots: where each parameter lies.
            stores: the store of each unit; units may share one.
            dtype: type of the working weights.
            others: the parameters that have no slot, because they stay on the device.
        """
        self.dtype = dtype
        self._slots, self._stores, self._others = slots, stores, others
        self._distinct = list(dict.fromkeys(stores))
        self._order = PrefetchOrder(len(stores))
        self._fetched: Tensor | None = None  # the unit whose parameters are being handed out, uint8 [bytes]
        self._waiting: set[str] = set()  # its parameters that were not handed out yet
        self._used: WeightStore | None = None  # where it came from

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def placeholder(self, name: str, device: torch.device) -> OffloadedShard:
        """What FSDP2 holds in place of a shard."""
        return OffloadedShard(self._slots[name].shape, dtype=self.dtype, device=device, fetch=partial(self.take, name))

    def take(self, name: str) -> Tensor:
        """This rank's padded shard on the device, for a gather that is queued before the next call."""
        slot = self._slots[name]
        if name not in self._waiting:
            self._fetch(slot.unit)
        self._waiting.remove(name)
        assert self._fetched is not None
        nbytes = slot.padded.numel() * self.dtype.itemsize
        # bytes -> elements -> [rows of the first rank, ...]
        shard = self._fetched[slot.start : slot.start + nbytes].view(self.dtype).view(slot.padded)
        if not self._waiting:
            self._fetched = None  # Lifetime: the shards share its memory, which goes with the last of them
        return shard

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Write to the parameter's store; not while a forward or backward runs."""
        if name not in self._slots:
            self._others.write(name, start, values=values)
            return
        slot, values = self._slots[name], values.detach().to(self.dtype)
        first = slot.start + start * self.dtype.itemsize
        raw = values.contiguous().view(torch.uint8)  # [elements] -> [bytes]
        if start + values.numel() == slot.shape.numel():
            # The gap up to the next parameter, too: writes of a whole unit follow each other without a break.
            raw = torch.cat([raw, raw.new_zeros(slot.stop - first - raw.numel())])
        self._retire()  # what was fetched last is used up, or outdated by this
        self._stores[slot.unit].write(slot.unit, first, values=raw)

    def read(self, name: str, part: slice) -> Tensor:
        """A copy on the host, of what is kept off the device."""
        if name not in self._slots:
            return self._others.read(name, part)
        slot, size = self._slots[name], self.dtype.itemsize
        first, count = slot.start + part.start * size, (part.stop - part.start) * size
        return self._stores[slot.unit].read(slot.unit, first, count=count).view(self.dtype)

    def shard(self, name: str) -> Tensor:
        """A copy of this rank's shard, in its shape and type, on the host."""
        shape = self._slots[name].shape
        return self.read(name, slice(0, shape.numel())).view(shape)

    def flush(self) -> None:
        """Wait until all writes have reached their store."""
        for store in self._distinct:
            store.flush()

    def close(self) -> None:
        """Free memory and files."""
        self._retire()
        for store in self._distinct:
            store.close()

    def _fetch(self, unit: int) -> None:
        self._retire()
        self._order.arrive(unit, backward=torch._C._current_graph_task_id() != -1)  # -1 outside of autograd
        store = self._stores[unit]
        following = [other for other in self._order.ahead() if self._stores[other] is store]
        self._fetched, self._used = store.fetch(unit, following), store
        self._waiting = {name for name, slot in self._slots.items() if slot.unit == unit}

    def _retire(self) -> None:
        """Let the store reuse the memory of the last unit: FSDP2 has queued the gather that reads it."""
        self._fetched, self._waiting = None, set()
        if self._used is not None:
            self._used.release()
            self._used = None


_aten = torch.ops.aten
_SHAPES_ONLY = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.view.default,
    _aten.slice.Tensor,
    _aten.new_zeros.default,
}


class OffloadedShard(Tensor):
    """Stands for a shard that is kept elsewhere: shape, type and device, and no memory.

    FSDP2 asks a local shard for its contribution to an all-gather if it has `fsdp_pre_all_gather` (PyTorch's protocol
    for tensors that are not gathered as they are). The answer is fetched from the store, copied into the gather and
    dropped.
    """

    fetch: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[OffloadedShard],
        shape: torch.Size,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fetch: Callable[[], Tensor],
    ) -> OffloadedShard:
        """Stand for a shard of `shape`; `fetch` brings it, padded to the first rank's as FSDP2 wants it."""
        made: OffloadedShard = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.fetch = fetch
        return made

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """This rank's contribution to an all-gather."""
        return (self.fetch(),), None

    def fsdp_post_all_gather(self, outputs: Any, *_: Any, out: Tensor | None = None) -> Any:
        """What was gathered is the parameter itself; the second time it is already in its place."""
        return None if out is not None else (outputs[0], ())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch wants a class method and declares none
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do what concerns shapes only; an operation that needs values raises."""
        this = args[0]
        if func is _aten.copy_.default:  # FSDP2 pads the shards of the last ranks: `fetch` has done it
            return this
        if func is _aten.zeros_like.default:
            options = {key: (kwargs or {}).get(key) or getattr(this, key) for key in ("dtype", "device")}
            return torch.zeros(this.shape, **options)
        if func not in _SHAPES_ONLY:
            raise RuntimeError(f"{func}: these weights are off the device; read them through `Sharding.offloaded`.")
        outline = func(torch.empty(this.shape, dtype=this.dtype, device="meta"), *args[1:])
        return cls(outline.shape, dtype=this.dtype, device=this.device, fetch=this.fetch)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Without values."""
        return f"OffloadedShard({tuple(self.shape)}, {self.dtype}, {self.device})"
