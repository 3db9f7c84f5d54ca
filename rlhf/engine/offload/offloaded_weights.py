"""Working weights kept off the device: the shards of an FSDP unit are fetched when FSDP2 gathers it.

Each rank stores its shard of a unit contiguously, padded as FSDP2 wants it, so fetching a unit is one copy. While a
unit computes, the units that followed it last time are prefetched. A fetched shard is dropped as soon as the all-gather
has consumed it. The optimizer hands updated weights back through `write`.
See also: the memory and the files that they are kept in (`weight_stores.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.engine.offload.sharded_weights import ShardedWeights
from rlhf.engine.offload.weight_stores import WeightStore

_CACHE_LINE = 64  # bytes: every parameter begins at a multiple, as tensors of their own do


def param_offload_device(config: EngineConfig, device: torch.device) -> OffloadDevice:
    """Where working weights are kept; on a CPU machine host memory is the device's memory."""
    if config.offload_param == OffloadDevice.cpu and device.type == "cpu":
        return OffloadDevice.none
    return config.offload_param


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
    """Where the shards of `rank` go.

    Args:
        units: for each unit, its parameters' whole shapes by name.
        ranks: how many share a parameter.
        rank: whose shards.
        dtype: type of the working weights.
    """
    slots: dict[str, ShardSlot] = {}
    for unit, shapes in enumerate(units):
        start = 0
        for name, shape in shapes.items():
            share = -(-shape[0] // ranks)
            own = max(0, min(share, shape[0] - rank * share))
            padded = torch.Size((share, *shape[1:]))
            stop = start + -(-padded.numel() * dtype.itemsize // _CACHE_LINE) * _CACHE_LINE
            slots[name] = ShardSlot(unit, start, stop, torch.Size((own, *shape[1:])), padded)
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
            others: the parameters that have no slot.
        """
        self.dtype = dtype
        self._slots, self._stores, self._others = slots, stores, others
        self._distinct = list(dict.fromkeys(stores))
        self._order = PrefetchOrder(len(stores))
        self._fetched: Tensor | None = None  # the unit whose parameters are being handed out, uint8 [bytes]
        self._waiting: dict[str, ShardSlot] = {}  # its parameters that were not handed out yet
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
        del self._waiting[name]
        assert self._fetched is not None
        nbytes = slot.padded.numel() * self.dtype.itemsize
        # bytes -> elements -> [rows of the first rank, ...]
        shard = self._fetched[slot.start : slot.start + nbytes].view(self.dtype).view(slot.padded)
        if not self._waiting:
            self._fetched = None  # Lifetime: the shards share its memory, which goes with the last of them
        return shard

    def drop_prefetched(self) -> None:
        """Drop what was fetched ahead of use: nothing is computed for a while, or weights change."""
        self._retire()
        for store in self._distinct:
            store.drop_prefetched()

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Write to the parameter's store; not while a forward or backward runs."""
        if name not in self._slots:
            self._others.write(name, start, values=values)
            return
        slot, values = self._slots[name], values.detach().to(self.dtype)
        first = slot.start + start * self.dtype.itemsize
        raw = values.contiguous().view(torch.uint8)
        if start + values.numel() == slot.shape.numel():
            # The gap up to the next parameter, too: writes of a whole unit follow each other without a break.
            raw = torch.cat([raw, raw.new_zeros(slot.stop - first - raw.numel())])
        self._retire()  # what was fetched last is used up, or outdated by this
        self._stores[slot.unit].write(slot.unit, first, values=raw)

    def read(self, name: str, start: int, *, count: int) -> Tensor:
        """A copy on the host."""
        if name not in self._slots:
            return self._others.read(name, start, count=count)
        slot, size = self._slots[name], self.dtype.itemsize
        raw = self._stores[slot.unit].read(slot.unit, slot.start + start * size, count=count * size)
        return raw.view(self.dtype).float()

    def shard(self, name: str) -> Tensor:
        """A copy of this rank's shard, in its shape and type, on the host."""
        shape = self._slots[name].shape
        return self.read(name, 0, count=shape.numel()).to(self.dtype).view(shape)

    def flush(self) -> None:
        """Wait until all writes have reached their store."""
        self._others.flush()
        for store in self._distinct:
            store.flush()

    def close(self) -> None:
        """Free memory and files."""
        self.drop_prefetched()
        for store in self._distinct:
            store.close()

    def _fetch(self, unit: int) -> None:
        self._retire()
        self._order.arrive(unit, backward=torch._C._current_graph_task_id() != -1)  # -1 outside of autograd
        store = self._stores[unit]
        following = [other for other in self._order.ahead() if self._stores[other] is store]
        self._fetched, self._used = store.fetch(unit, following), store
        self._waiting = {name: slot for name, slot in self._slots.items() if slot.unit == unit}

    def _retire(self) -> None:
        """Let the store reuse the memory of the last unit: FSDP2 has queued the gather that reads it."""
        self._fetched, self._waiting = None, {}
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
