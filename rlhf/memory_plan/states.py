"""Bytes that a model takes whatever it computes: arithmetic on shapes, through the engine's code that lays tensors out.

With N elements on each of R ranks, one rank's share of a trainable model at ZeRO 3 is `(2 + 2 + K) N / R` bytes in the
terms of the ZeRO paper (Rajbhandari et al. 2020, section 3.1: bf16 weights and gradients, K = 12 for fp32 master
weights and two moments). Here rows are counted, so what does not divide is padded as the engine pads it.
See [Note: offload] for the kinds of tensor. Left out: what a forward or backward allocates (`trace.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.engine.adam_kernel import CUDA_CHUNK
from rlhf.engine.fsdp_units import FSDPUnit, find_units, persistent_parameters, prefetched_units
from rlhf.engine.offload import grad_accumulation, working_weights
from rlhf.engine.offload.optimizer_state import ParameterShard
from rlhf.engine.offload.placement import num_offloaded, offload_device, units_in_host_memory
from rlhf.engine.offload.tiles import Tile, lay_out_tiles, page_elements, tile_capacity
from rlhf.engine.offload.transfers import HUGE_PAGE
from rlhf.engine.offload.weight_stores import file_bytes
from rlhf.engine.offload.working_weights import lay_out_units, unit_bytes
from rlhf.engine.sharding import reduction_dtype
from rlhf.engine.state_format import STATE_KEYS, StateFormat
from rlhf.memory_plan.plan import Item, Place
from rlhf.models.lora import is_adapter
from rlhf.models.model_spec import ModelSpec

WORKING, GRADIENTS, MASTERS, MOMENTS = "working parameters", "gradients", "master weights", "moments"
AVERAGE = "average of weights"
GATHERED, BUFFERS, HIDDEN, GRAPHS = "gathered weights", "buffers", "hidden states", "CUDA graphs"


@dataclass(frozen=True, kw_only=True)
class States:
    """The bytes of a model on the first rank, which holds the largest shards."""

    role: str
    spec: ModelSpec
    """On meta, not sharded; `requires_grad` says what learns."""
    engine: EngineConfig
    ranks: int
    """Over which it is sharded: those that share a copy."""
    copies: int = 1
    """Groups of that many ranks, which share the writing of checkpoints."""
    device: torch.device
    """Only its type counts; the device need not be there."""
    dtype: torch.dtype
    """Type of the working weights."""
    micro_batches: int
    """Micro-batches of an optimizer step on one rank; 0 for a frozen model."""
    has_average: bool = False
    """Whether a moving average of the weights is kept, each where its master is."""

    def at_rest(self) -> list[Item]:
        """Everything that is there between steps."""
        items = [*self._weights(), *self._optimizer_state(), *self._staging()]
        return [item for item in items if item.bytes]

    def gradients(self, share: float = 1.0) -> list[Item]:
        """The gradient sums of a step once `share` of them is complete."""
        here, away = self._split
        each = self._sum_bytes
        items = [self.item(GRADIENTS, Place.device, count=int(share * each * here))]
        if self.offload_optimizer == OffloadDevice.cpu:  # kept from step to step
            items.append(self.item(GRADIENTS, Place.host, count=each * away))
        return [item for item in items if item.bytes]

    def share_of_gradients(self, place: str, *, backward: bool) -> float:
        """How much of the gradient sums is complete at a `TracePoint` of a step; in a later micro-batch all."""
        if self.micro_batches > 1:
            return 1.0
        module, blocks = self.spec.module, self.spec.blocks
        uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        in_blocks = {id(p) for block in blocks for p in block.parameters()}
        head = inside = total = 0
        for name, count in ((name, count) for group in self._groups for name, count in group.items()):
            total += count
            parameter, owner = self._parameters[name], module.get_submodule(name.rpartition(".")[0])
            if id(parameter) in in_blocks:
                inside += count
            # The head and norm behind the blocks come first; an embedding, and what is tied to it, comes last.
            elif uses[id(parameter)] == 1 and not isinstance(owner, nn.Embedding):
                head += count
        if not backward:
            return head / total if place == "between" else 0.0
        finished = {"last": 1, "inner": min(2, len(blocks))}.get(place, len(blocks))
        return (head + inside / len(blocks) * finished) / total

    def in_reduction(self) -> int:
        """Device bytes of gradients on their way to their sums: those of a unit, and what is sent of them.

        ZeRO 1 also keeps whole sums, in the type in which they are sent, until the last micro-batch is reduced.
        """
        if self.ranks == 1:
            return 0
        trainable = [sum(shapes.values()) for shapes in self._whole_groups]
        sent = reduction_dtype(self.engine).itemsize
        waiting = sent * sum(trainable) if self.engine.zero_stage == 1 and self.micro_batches > 1 else 0
        # Whole gradients, and the copy that is sent: FSDP2 waits for one reduction before the next.
        return waiting + max(trainable, default=0) * (self.dtype.itemsize + sent if self.is_sharded else sent)

    def whole(self) -> int:
        """Device bytes beside this rank's shards while all units are gathered."""
        return sum(unit.numel for unit in self.units) * self.dtype.itemsize if self.is_sharded else 0

    def gathered(self) -> int:
        """Device bytes beside this rank's shards while the model computes: gathered units, and fetched shards."""
        if not self.is_sharded or self.engine.zero_stage < 3:
            return self.whole()
        size, units = self.dtype.itemsize, self.units
        live = self._in_flight(units[1:])
        if self.micro_batches:  # the last unit stays from forward to backward
            live = max(live, units[-1].numel + self._in_flight(units[-2:0:-1]))
        # A fetched shard waits for its gather; from host memory the next one is fetched meanwhile.
        fetched = {OffloadDevice.none: 0, OffloadDevice.nvme: 1, OffloadDevice.cpu: 2}[self.offload_param]
        shards = fetched * max(self._offloaded_units) // size if fetched else 0
        return (units[0].numel + live + shards) * size

    def copied_for_a_checkpoint(self) -> int:
        """Host bytes of a copy of what learns, while a thread writes it; state on disk is not copied."""
        here, away = self._split
        elements = here if self.offload_optimizer == OffloadDevice.nvme else here + away
        return -(-elements * self._checkpoint_bytes // self.copies)

    def in_a_checkpoint(self) -> int:
        """Disk bytes of this rank's share of a checkpoint."""
        return -(-sum(self._split) * self._checkpoint_bytes // self.copies)

    def working_weights(self) -> int:
        """Bytes of this rank's shards of the working weights, wherever they are."""
        return sum(map(self._local, self._parameters)) * self.dtype.itemsize

    def exported(self) -> int:
        """Disk bytes of the model's folder, all of which the first rank writes.

        Merged adapters are in fp32 where the working type would lose too much of them, which is not known before.
        """
        return sum(self._exported) * (2 if self.has_average else 1)

    def in_export(self) -> int:
        """Host bytes while the largest tensor is written: as it is stored, and a copy of it from where it was."""
        is_here = self.ranks == 1 and self.device.type == "cpu"
        copied = 0 if is_here else max(p.numel() for p in self._parameters.values()) * self.dtype.itemsize
        return max(self._exported) + copied

    @property
    def _exported(self) -> list[int]:
        """Bytes of each tensor in the model's folder."""
        plain = [p.numel() for name, p in self._parameters.items() if not is_adapter(name)]
        each = 4 if len(plain) < len(self._parameters) else self.dtype.itemsize
        return [each * count for count in plain]

    def hidden_states(self, tokens: int) -> Item:
        """What the frozen layers gave for so many tokens (`ppo.reuse_frozen_layers`)."""
        return self.item(HIDDEN, Place.host, count=tokens * self.spec.config.hidden_size * self.dtype.itemsize)

    def item(self, part: str, place: Place, *, count: int) -> Item:
        """Bytes of the model."""
        return Item(self.role, part, place, count)

    @cached_property
    def units(self) -> list[FSDPUnit]:
        """Parameters that are gathered together."""
        return find_units(self.spec, config=self.engine)

    @property
    def offload_param(self) -> OffloadDevice:
        """Where working weights are kept."""
        return offload_device(self.engine.offload_param, self.device)

    @property
    def offload_optimizer(self) -> OffloadDevice:
        """Where the optimizer state goes that leaves the device."""
        return offload_device(self.engine.offload_optimizer, self.device)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds the model."""
        alone = self.ranks == 1 and self.offload_param == OffloadDevice.none
        return self.engine.zero_stage > 0 and not alone

    @property
    def _sum_bytes(self) -> int:
        """Bytes of an element of a step's gradient sums."""
        if self.micro_batches > 1:
            return self.format.sums.itemsize
        if self.ranks == 1:  # the gradient itself
            return self.dtype.itemsize
        # The one sum over ranks is kept as it comes, but not wider than sums are; FSDP2 casts it for fp32 weights.
        cast = self.dtype.itemsize if self.is_sharded else 0
        return max(cast, min(reduction_dtype(self.engine).itemsize, self.format.sums.itemsize))

    @property
    def _checkpoint_bytes(self) -> int:
        """Bytes of an element in a checkpoint: master, two moments and the average."""
        return 16 if self.has_average else 12

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.spec.module.named_parameters())

    @cached_property
    def _persistent(self) -> set[str]:
        return set(persistent_parameters(self.spec.module, self.engine))

    def _local(self, name: str) -> int:
        """Elements of the first rank's shard of a parameter, which is padded to whole rows."""
        parameter = self._parameters[name]
        if not self.is_sharded or name in self._persistent or not parameter.ndim:
            return parameter.numel()
        return -(-parameter.shape[0] // self.ranks) * (parameter.numel() // parameter.shape[0])

    @cached_property
    def _whole_groups(self) -> list[dict[str, int]]:
        """Elements of each parameter that learns, by unit; without units of which nothing does."""
        groups = [unit.group(self.spec.module) for unit in self.units] if self.micro_batches else []
        return [{name: p.numel() for name, p in group.items()} for group in groups if group]

    @property
    def _groups(self) -> list[dict[str, int]]:
        """The same of this rank's shards."""
        return [{name: self._local(name) for name in group} for group in self._whole_groups]

    @cached_property
    def _num_away(self) -> int:
        """How many of the groups leave the device, as `Placement` cuts them."""
        sizes = [sum(group.values()) for group in self._whole_groups]
        return num_offloaded(sizes, self.engine.optimizer_share) if self.offload_optimizer != OffloadDevice.none else 0

    @cached_property
    def _split(self) -> tuple[int, int]:
        """Elements of this rank's shards whose state stays on the device, and of those whose state leaves it."""
        sizes = [sum(group.values()) for group in self._groups]
        return sum(sizes[self._num_away :]), sum(sizes[: self._num_away])

    def _in_flight(self, units: list[FSDPUnit]) -> int:
        """Elements of a unit that computes and of those gathered meanwhile, or of its two copies before."""
        ahead = prefetched_units(units, config=self.engine)
        return max(
            unit.numel + max(unit.numel, sum(other.numel for other in following))
            for unit, following in zip(units, ahead, strict=True)
        )

    @cached_property
    def _offloaded_units(self) -> list[int]:
        """Bytes of this rank's shard of each unit, where working weights are offloaded."""
        shapes = {name: p.shape for name, p in self._parameters.items() if name not in self._persistent}
        units = [{name: shapes[name] for name in unit.names if name in shapes} for unit in self.units]
        return unit_bytes(lay_out_units(units, ranks=self.ranks, rank=0, dtype=self.dtype), len(units))

    @property
    def format(self) -> StateFormat:
        """How optimizer state is stored."""
        return StateFormat.of(self.engine, self.dtype)

    @cached_property
    def _bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes of masters and of moments, for what stays on the device and for what leaves it."""
        here, away = (
            [numel for group in groups for numel in group.values()]
            for groups in (self._groups[self._num_away :], self._groups[: self._num_away])
        )

        def total(keys: Sequence[str], numels: list[int]) -> int:
            return sum(self.format.nbytes(key, numel) for key in keys for numel in numels)

        keys = {MASTERS: STATE_KEYS[:1], MOMENTS: STATE_KEYS[1:]}
        return {part: (total(keys[part], here), total(keys[part], away)) for part in keys}

    def _weights(self) -> Iterator[Item]:
        buffers = sum(buffer.nbytes for buffer in self.spec.module.buffers())
        offloaded = self.offload_param != OffloadDevice.none
        resident = sum(self._local(name) for name in self._parameters if not offloaded or name in self._persistent)
        yield self.item(WORKING, Place.device, count=resident * self.dtype.itemsize + buffers)
        if not offloaded:
            return
        sizes = self._offloaded_units
        in_memory = units_in_host_memory(sizes, config=self.engine, dtype=self.dtype)
        on_disk = file_bytes([0 if index in in_memory else size for index, size in enumerate(sizes)])
        yield self.item(WORKING, Place.host, count=sum(sizes[index] for index in in_memory))
        yield self.item(WORKING, Place.disk, count=on_disk)
        if len(in_memory) < len(sizes):  # weights that are written run on from unit to unit
            yield self.item(BUFFERS, Place.host, count=self._pool_bytes(on_disk))

    def _optimizer_state(self) -> Iterator[Item]:
        here, away = self._split
        (masters, masters_away), (moments, moments_away) = self._bytes[MASTERS], self._bytes[MOMENTS]
        # Without masters AdamW updates the working weights themselves.
        if self.dtype is not torch.float32 or self.offload_param != OffloadDevice.none:
            yield self.item(MASTERS, Place.device, count=masters)
        yield self.item(MOMENTS, Place.device, count=moments)
        if self.has_average:
            yield self.item(AVERAGE, Place.device, count=4 * here)
            yield self.item(AVERAGE, Place.host, count=4 * away)
        if self.offload_optimizer == OffloadDevice.cpu:
            yield self.item(MASTERS, Place.host, count=masters_away)
            yield self.item(MOMENTS, Place.host, count=moments_away)
        if self.offload_optimizer == OffloadDevice.nvme and away:
            tiles, width = self._tiles(), self.format.width("weight")
            elements = sum(tile.size for tile in tiles)
            yield self.item(GRADIENTS, Place.disk, count=sum(tile.state_start for tile in tiles))
            yield self.item(MASTERS, Place.disk, count=width * elements)
            yield self.item(MOMENTS, Place.disk, count=sum(tile.moments.stop - tile.moments.start for tile in tiles))
            yield self.item(BUFFERS, Place.host, count=self._pool_bytes(max(tile.nbytes for tile in tiles)))

    def _tiles(self) -> list[Tile]:
        """The file of the optimizer state."""
        capacity = tile_capacity(4 * self.engine.buffer_size, self.engine.sub_group_size, format_=self.format)
        away = self._groups[: self._num_away]
        shards = [ParameterShard(name, torch.Size([n]), decays=True) for group in away for name, n in group.items()]
        # A buffer too small for a page is refused when the run starts; the plan is of the smallest that is not.
        return lay_out_tiles(shards, max(capacity, page_elements(self.format)), format_=self.format)

    def _pool_bytes(self, most: int) -> int:
        """Host bytes of a buffer pool filled up to `most` per buffer: all if page-locked, else what is touched."""
        size = 4 * self.engine.buffer_size
        locked = self.engine.pin_memory and self.device.type == "cuda"
        return self.engine.buffer_count * (size if locked else min(size, -(-most // HUGE_PAGE) * HUGE_PAGE))

    def _staging(self) -> Iterator[Item]:
        """Page-locked memory for copies, and the optimizer's scratch."""
        here, away = self._split
        if self.device.type != "cuda":
            return
        if away:
            yield self.item(BUFFERS, Place.host, count=grad_accumulation.STAGING_BYTES + working_weights.STAGING_BYTES)
        narrow_moments = self.format.width("exp_avg") < 4
        if here and (self.dtype is not torch.float32 or narrow_moments):
            casts = 1 + 2 * narrow_moments + self.format.is_split  # of the gradient, both moments, and masters
            casts += self.format.is_split or self.format.is_quantised  # memory to unpack in
            yield self.item(BUFFERS, Place.device, count=casts * 4 * min(CUDA_CHUNK, here))
