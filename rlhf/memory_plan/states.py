"""What a model keeps in memory whatever it computes: arithmetic on shapes, through the code that lays states out.

With N elements on each of R ranks, one rank's share of a trainable model at ZeRO 3 is `(2 + 2 + K) N / R` bytes in the
terms of the ZeRO paper (Rajbhandari et al. 2020, section 3.1: bf16 weights and gradients, K = 12 for fp32 master
weights and two moments); here rows are counted, so what divides by nothing is padded as the engine pads it.
Left out: what a forward or backward allocates (`trace.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from rlhf.config.engine_config import EngineConfig, MomentDtype, OffloadDevice
from rlhf.engine.fsdp_units import FSDPUnit, find_units, num_offloaded, persistent_parameters, prefetched_units
from rlhf.engine.materialize import units_in_host_memory
from rlhf.engine.offload import grad_accumulation, weights
from rlhf.engine.offload.buffer_pool import HUGE_PAGE
from rlhf.engine.offload.nvme_layout import lay_out_tiles, tile_capacity
from rlhf.engine.offload.offloaded_weights import lay_out_units, param_offload_device, unit_bytes
from rlhf.engine.offload.optimizer_state import ParameterShard
from rlhf.engine.offload.weight_stores import file_bytes
from rlhf.memory_plan.plan import Item, Place
from rlhf.models.model_spec import ModelSpec

WORKING, GRADIENTS, MASTERS, MOMENTS = "working parameters", "gradients", "master weights", "moments"
GATHERED, BUFFERS = "gathered weights", "buffers"

_STAGED = grad_accumulation.STAGING_BYTES + weights.STAGING_BYTES  # page-locked for copies


@dataclass(frozen=True)
class Setting:
    """A model in a run, as far as memory is concerned."""

    role: str
    engine: EngineConfig
    ranks: int
    """Over which it is sharded, on all machines."""
    device: torch.device
    """Only its type counts; the device need not be there."""
    dtype: torch.dtype
    """Of the working weights."""
    micro_batches: int
    """Of an optimizer step, on one rank; 0 for a frozen model."""

    @property
    def frozen(self) -> bool:
        """Whether the model has no optimizer."""
        return self.micro_batches == 0


@dataclass(frozen=True)
class States:
    """The bytes of a model on the first rank, which holds the most rows."""

    spec: ModelSpec
    """On meta, not sharded; `requires_grad` says what learns."""
    setting: Setting

    def at_rest(self) -> list[Item]:
        """What is there between steps."""
        items = [*self._working(), *self._optimizer(), *self._buffers()]
        return [item for item in items if item.bytes]

    def gradients(self, share: float = 1.0) -> list[Item]:
        """The sums of a step once `share` of them is complete."""
        on_device, away = self._split
        bytes_each = self._sum_bytes
        items = [self._item(GRADIENTS, Place.device, count=int(share * bytes_each * on_device * self._sides))]
        if self.offload_optimizer == OffloadDevice.cpu:  # page-locked, and kept from step to step
            kept = self.setting.dtype.itemsize + (4 if self.setting.micro_batches > 1 else 0)
            items.append(self._item(GRADIENTS, Place.host, count=kept * away * self._sides))
        return [item for item in items if item.bytes]

    def gathered(self) -> int:
        """Device bytes beside this rank's rows while the model computes: units of weights that are whole."""
        if not self.is_sharded:
            return 0
        if self.setting.engine.zero_stage < 3:
            return sum(unit.numel for unit in self.units) * self.setting.dtype.itemsize
        forward = self._moving(self.units[1:])
        backward = 0
        if not self.setting.frozen:  # the last unit stays from forward to backward
            backward = self.units[-1].numel + self._moving(self.units[-2:0:-1])
        most = self.units[0].numel + max(forward, backward)
        return (most + self._brought) * self.setting.dtype.itemsize

    def _moving(self, units: list[FSDPUnit]) -> int:
        """Elements of a unit that computes and of those that are gathered meanwhile, or of its two copies before."""
        return max(
            unit.numel + max(unit.numel, sum(other.numel for other in following))
            for unit, following in zip(units, prefetched_units(units, config=self.setting.engine), strict=True)
        )

    def whole(self) -> int:
        """Device bytes beside this rank's rows while all units are gathered."""
        return sum(unit.numel for unit in self.units) * self.setting.dtype.itemsize if self.is_sharded else 0

    def in_reduction(self) -> int:
        """Device bytes of gradients on their way to their sums: a unit's whole ones, and what is sent of them.

        ZeRO 1 also keeps the whole fp32 sums until the last micro-batch is reduced.
        """
        setting, trainable = self.setting, [self._trainable_numel(unit) for unit in self.units]
        if setting.ranks == 1:
            return 0
        waiting = 4 * sum(trainable) if setting.engine.zero_stage == 1 and setting.micro_batches > 1 else 0
        # Whole gradients, and the fp32 copy that is sent: FSDP2 waits for one reduction before the next.
        return waiting + max(trainable) * (setting.dtype.itemsize + 4 if self.is_sharded else 4)

    def copied_for_a_checkpoint(self) -> int:
        """Host bytes of a copy of what learns, while a thread writes it; what rests on disk is not copied."""
        learning = sum(self._split) if self.offload_optimizer != OffloadDevice.nvme else self._split[0]
        return learning * self._saved

    def in_a_checkpoint(self) -> int:
        """Disk bytes of this rank's share of a checkpoint."""
        return sum(self._split) * self._saved

    @property
    def _saved(self) -> int:
        """Bytes of an element in a checkpoint: master and moments, and beside a delayed update the working weight."""
        return 16 if self.setting.engine.delayed_update else 12

    def exported(self) -> int:
        """Disk bytes of the model without this project; the first rank writes all of it.

        Merged adapters are in fp32 where the working type would lose too much of them, which is not known before.
        """
        plain = [p for name, p in self._parameters if ".lora_" not in name]
        merges = len(plain) < len(self._parameters)
        return sum(p.numel() for p in plain) * (4 if merges else self.setting.dtype.itemsize)

    @cached_property
    def units(self) -> list[FSDPUnit]:
        """What travels together."""
        return find_units(self.spec, config=self.setting.engine)

    @cached_property
    def offload_param(self) -> OffloadDevice:
        """Where working weights rest."""
        return param_offload_device(self.setting.engine, self.setting.device)

    @cached_property
    def offload_optimizer(self) -> OffloadDevice:
        """Where states rest that leave the device."""
        tier = self.setting.engine.offload_optimizer
        return OffloadDevice.none if tier == OffloadDevice.cpu and self.setting.device.type == "cpu" else tier

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds the model."""
        stage, alone = self.setting.engine.zero_stage, self.setting.ranks == 1
        return stage > 0 and not (alone and self.offload_param == OffloadDevice.none)

    def outside_blocks(self) -> int:
        """Elements of this rank's rows of what learns outside the blocks."""
        blocks = {id(p) for block in self.spec.blocks for p in block.parameters()}
        return sum(self._local(name, p) for name, p in self._learning if id(p) not in blocks)

    def finished_before_blocks(self) -> int:
        """Of these, the elements whose gradients are complete when backward reaches the blocks."""
        blocks = {id(p) for block in self.spec.blocks for p in block.parameters()}
        return sum(self._local(name, p) for name, p in self._learning if id(p) not in blocks and self._is_after(name))

    def elements(self) -> int:
        """Elements of this rank's rows of what learns."""
        return sum(self._split)

    @cached_property
    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.spec.module.named_parameters())

    @property
    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [] if self.setting.frozen else [(name, p) for name, p in self._parameters if p.requires_grad]

    @cached_property
    def _persistent(self) -> set[str]:
        return set(persistent_parameters(self.spec.module, self.setting.engine))

    def _local(self, name: str, parameter: nn.Parameter) -> int:
        """Elements of the first rank's rows."""
        if not self.is_sharded or name in self._persistent or not parameter.ndim:
            return parameter.numel()
        return -(-parameter.shape[0] // self.setting.ranks) * (parameter.numel() // parameter.shape[0])

    def _is_after(self, name: str) -> bool:
        """Whether a parameter outside the blocks belongs to what follows them."""
        owner = self.spec.module.get_submodule(name.rpartition(".")[0])
        tied = sum(p is self.spec.module.get_parameter(name) for p in self._with_copies)
        return tied == 1 and not isinstance(owner, nn.Embedding)

    @cached_property
    def _with_copies(self) -> list[nn.Parameter]:
        return [p for _, p in self.spec.module.named_parameters(remove_duplicate=False)]

    def _trainable_numel(self, unit: FSDPUnit) -> int:
        return 0 if self.setting.frozen else sum(p.numel() for p in unit.group(self.spec.module).values())

    @cached_property
    def _groups(self) -> list[list[ParameterShard]]:
        """This rank's rows of what learns, unit by unit."""
        if self.setting.frozen:
            return []
        found = [
            [
                ParameterShard(name, torch.Size([self._local(name, p)]), decays=True)
                for name, p in unit.group(self.spec.module).items()
            ]
            for unit in self.units
        ]
        return [group for group in found if group]

    @cached_property
    def _split(self) -> tuple[int, int]:
        """Elements whose states stay on the device, and those that leave it; as `Placement` cuts the groups."""
        sizes = [sum(shape.numel for shape in group) for group in self._groups]
        leaving = sum(sizes[: self._num_away])
        return sum(sizes) - leaving, leaving

    @cached_property
    def _num_away(self) -> int:
        if self.offload_optimizer == OffloadDevice.none:
            return 0
        sizes = [self._trainable_numel(unit) for unit in self.units]
        return num_offloaded([size for size in sizes if size], self.setting.engine.optimizer_share)

    @property
    def _sides(self) -> int:
        return 2 if self.setting.engine.delayed_update else 1

    @property
    def _sum_bytes(self) -> int:
        """Of an element of a gradient sum on the device: FSDP2 reduces in fp32, and so are sums of several."""
        several = self.setting.ranks > 1 or self.setting.micro_batches > 1
        return 4 if several else self.setting.dtype.itemsize

    def _item(self, part: str, place: Place, *, count: float) -> Item:
        return Item(self.setting.role, part, place, int(count))

    def _working(self) -> Iterator[Item]:
        size = self.setting.dtype.itemsize
        buffers = sum(buffer.nbytes for buffer in self.spec.module.buffers())
        if self.offload_param == OffloadDevice.none:
            elements = sum(self._local(name, p) for name, p in self._parameters)
            yield self._item(WORKING, Place.device, count=elements * size + buffers)
            return
        resident = sum(p.numel() for name, p in self._parameters if name in self._persistent)
        yield self._item(WORKING, Place.device, count=resident * size + buffers)
        sizes = self._resting_units
        kept = units_in_host_memory(sizes, config=self.setting.engine, dtype=self.setting.dtype)
        yield self._item(WORKING, Place.host, count=sum(size for index, size in enumerate(sizes) if index in kept))
        on_disk = [0 if index in kept else size for index, size in enumerate(sizes)]
        yield self._item(WORKING, Place.disk, count=file_bytes(on_disk))
        if any(on_disk):  # weights that are written run on from unit to unit
            yield self._item(BUFFERS, Place.host, count=self._buffer_bytes(file_bytes(on_disk)))

    @cached_property
    def _resting_units(self) -> list[int]:
        shapes = {name: p.shape for name, p in self._parameters if name not in self._persistent}
        units = [{name: shapes[name] for name in unit.names if name in shapes} for unit in self.units]
        slots = lay_out_units(units, ranks=self.setting.ranks, rank=0, dtype=self.setting.dtype)
        return unit_bytes(slots, len(units))

    @property
    def _brought(self) -> int:
        """Elements of rows on their way from where they rest to a gather: a unit's, and the next one's."""
        if self.offload_param == OffloadDevice.none:
            return 0
        copies = 2 if self.offload_param == OffloadDevice.cpu else 1
        return copies * max(self._resting_units) // self.setting.dtype.itemsize

    @property
    def _moment_bytes(self) -> int:
        return 2 if self.setting.engine.moments == MomentDtype.bf16 else 4

    def _optimizer(self) -> Iterator[Item]:
        here, away = self._split
        narrow = self.setting.dtype is not torch.float32
        apart = narrow or self.offload_param != OffloadDevice.none or self.setting.engine.delayed_update
        yield self._item(MASTERS, Place.device, count=4 * here if apart else 0)
        yield self._item(MOMENTS, Place.device, count=2 * self._moment_bytes * here)
        if self.offload_optimizer == OffloadDevice.cpu:
            yield self._item(MASTERS, Place.host, count=4 * away)
            yield self._item(MOMENTS, Place.host, count=2 * self._moment_bytes * away)
        if self.offload_optimizer == OffloadDevice.nvme and away:
            yield from self._on_disk()

    def _on_disk(self) -> Iterator[Item]:
        engine = self.setting.engine
        moments = torch.bfloat16 if engine.moments == MomentDtype.bf16 else torch.float32
        shapes = [shape for group in self._groups[: self._num_away] for shape in group]
        capacity = tile_capacity(4 * engine.buffer_size, engine.sub_group_size, moments=moments)
        records = lay_out_tiles(shapes, max(capacity, 1 << 12), moments=moments)
        elements = sum(record.size for record in records)
        yield self._item(GRADIENTS, Place.disk, count=4 * elements)
        yield self._item(MASTERS, Place.disk, count=4 * elements)
        yield self._item(MOMENTS, Place.disk, count=2 * self._moment_bytes * elements)
        yield self._item(BUFFERS, Place.host, count=self._buffer_bytes(max(record.nbytes for record in records)))

    def _buffer_bytes(self, most: int) -> int:
        """Of a set of buffers each filled up to `most`: what is touched, by huge pages, or all that is locked."""
        engine = self.setting.engine
        locked = engine.pin_memory and self.setting.device.type == "cuda"
        touched = -(-most // HUGE_PAGE) * HUGE_PAGE
        return engine.buffer_count * (4 * engine.buffer_size if locked else min(4 * engine.buffer_size, touched))

    def _buffers(self) -> Iterator[Item]:
        """Page-locked memory for copies, and the optimizer's scratch."""
        if self.setting.device.type != "cuda" or self.setting.frozen:
            return
        if self._split[1]:
            yield self._item(BUFFERS, Place.host, count=_STAGED)
        if self._split[0] and (self.setting.dtype is not torch.float32 or self._moment_bytes == 2):
            casts = 1 + (2 if self._moment_bytes == 2 else 0)
            yield self._item(BUFFERS, Place.device, count=casts * 4 * min(1 << 24, self._split[0]))
