"""Chooses where optimizer state and working weights are kept: on the device, in host memory, or in a file.

[Note: offload] A training step touches five kinds of tensor. With ZeRO, a rank holds its *shard* of each: its rows of
every parameter. Parameters that one FSDP module gathers together are a *unit*, or a *group* where only those that learn
are meant.

| kind | what it is | type | kept |
|---|---|---|---|
| working weights | what forward and backward compute with | bf16, fp16 or fp32 | where `offload_param` says |
| masters | the weights that AdamW updates; working weights are rounded copies | fp32, or split | with the moments |
| moments | AdamW's averages of the gradient and of its square | fp32, bf16 or 8 bits | where `offload_optimizer` says |
| gradient sums | a step's gradients, added up | as the first came, then fp32; or bf16 | with the moments |
| staging buffers | page-locked host memory through which the others travel | bytes | host, of a fixed size |

Masters, moments and gradient sums are the *optimizer state* of a group, and belong to one `OptimizerStateStore`. The
offloaded shards of a unit's working weights are in one `WeightStore`. A store is on one *offload device*, and its
tensors pass through staging buffers on their way to the device that computes:

| `offload_optimizer` | on a CPU machine | with CUDA |
|---|---|---|
| none | memory | device memory; the step runs on the device |
| cpu | the same | host memory; gradients and weights travel, the step runs on the CPU |
| nvme | a file | a file; gradients and weights travel, the step runs on the CPU |

`offload_param` moves the working weights alone: each unit is fetched when FSDP2 gathers it.

No store changes a number: on one kind of processor every choice trains the same weights, bit for bit. Types narrower
than fp32 do, within what `state_format.py` says of them; but for masters that are split, they are the user's choice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig, GradDtype, MasterWeights, OffloadDevice
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adam_kernel import AdamKernel
from rlhf.engine.fsdp_units import FSDPUnit, ParameterGroup
from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator, HostGradAccumulator, PinnedStaging
from rlhf.engine.offload.optimizer_state import InMemoryStateStore, OptimizerStateStore, shards_of
from rlhf.engine.offload.optimizer_state_nvme import NvmeResources, NvmeStateStore
from rlhf.engine.offload.tiles import lay_out_tiles, page_elements, tile_bytes, tile_capacity
from rlhf.engine.offload.transfers import BufferPool, CopyStream
from rlhf.engine.offload.weight_stores import HostWeights, NvmeWeights, WeightStore, file_bytes
from rlhf.engine.offload.working_weights import (
    DeviceWeights,
    OffloadedWeights,
    ShardedWeights,
    StagedWeights,
    lay_out_units,
    unit_bytes,
)
from rlhf.engine.state_format import StateFormat
from rlhf.runtime.dist import World

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def has_own_memory(device: torch.device) -> bool:
    """Whether `device` computes in other memory than the host's."""
    return device.type == "cuda"


def offload_device(wanted: OffloadDevice, device: torch.device) -> OffloadDevice:
    """Where tensors of a model on `device` go; `none` where host memory is the device's memory anyway."""
    return OffloadDevice.none if wanted == OffloadDevice.cpu and not has_own_memory(device) else wanted


def num_offloaded(sizes: Sequence[int], share: float) -> int:
    """How many of the first groups to offload so that `share` of all elements is: whole groups, rounded up.

    `sizes` are the elements of whole groups, not of shards, so that all ranks cut at the same place.
    """
    wanted, before = share * sum(sizes), 0
    for number, size in enumerate(sizes):
        if before >= wanted:
            return number
        before += size
    return len(sizes)


@dataclass(frozen=True)
class Placement:
    """Makes the stores of groups of parameters that learn."""

    groups: Sequence[ParameterGroup]
    config: OptimizerConfig
    engine: EngineConfig
    world: World
    offloaded: ShardedWeights | None
    """Working weights that are not kept on the device; None where all are."""

    def stores(self) -> list[OptimizerStateStore]:
        """A store for each group, or one file for all, in the order of the forward pass.

        Raises:
            ValueError: the buffers are too small.
            RunError: the disk is too small.
        """
        away, here = self.split()
        stores: list[OptimizerStateStore] = []
        if away and self.engine.offload_optimizer == OffloadDevice.nvme:
            stores.append(self._on_nvme(away))  # one file for all: reading ahead does not end with a group
        elif away:
            stores += [self._on_host(group) for group in away]
        return stores + [self._on_device(group) for group in here]

    def split(self) -> tuple[list[ParameterGroup], list[ParameterGroup]]:
        """The first groups, which leave the device, and the last ones, which stay."""
        if offload_device(self.engine.offload_optimizer, self.world.device) == OffloadDevice.none:
            return [], list(self.groups)
        sizes = [sum(p.numel() for p in group.values()) for group in self.groups]
        away = num_offloaded(sizes, self.engine.optimizer_share)
        return list(self.groups[:away]), list(self.groups[away:])

    def _on_device(self, group: ParameterGroup) -> OptimizerStateStore:
        """State in the memory of the model's device."""
        is_narrow = any(parameter.dtype != torch.float32 for parameter in group.values())
        # Without masters AdamW updates the working weights themselves, which must be fp32 and here.
        masters = self.offloaded is not None or is_narrow
        return InMemoryStateStore(
            shards_of(group),
            DeviceGradAccumulator(self._format.sums),
            kernel=self._device_kernel,  # queued on the current stream, as the forward that follows
            weights=self.offloaded or self._device_weights,
            format_=self._format,
            in_place=None if masters else self._device_weights.shard,
        )

    def _on_host(self, group: ParameterGroup) -> OptimizerStateStore:
        """State in host memory, of a model on a CUDA device."""
        # A store of its own for each group, so that its step need not wait for the gradients of all others.
        return InMemoryStateStore(
            shards_of(group),
            HostGradAccumulator(self._staging, self._format.sums),
            kernel=self._host_kernel,
            weights=self._host_weights,
            format_=self._format,
        )

    def _on_nvme(self, groups: Sequence[ParameterGroup]) -> OptimizerStateStore:
        """State in one file."""
        shards = [shard for group in groups for shard in shards_of(group)]
        engine, format_ = self.engine, self._format
        capacity = tile_capacity(4 * engine.buffer_size, engine.sub_group_size, format_=format_)
        if capacity == 0:
            least = -(-tile_bytes(page_elements(format_), format_) // 4)
            raise ValueError(
                f"engine.buffer_size={engine.buffer_size}: expected {least} or more with offload_optimizer=nvme; "
                "millions are fast."
            )
        tiles = lay_out_tiles(shards, capacity, format_=format_)
        nbytes = max(sum(tile.nbytes for tile in tiles), 1)  # 1 where this rank's shards are all empty
        resources = NvmeResources(
            file=_open_file("optimizer state (engine.offload_optimizer=nvme)", nbytes, config=engine, world=self.world),
            tiles=tiles,
            stream=CopyStream(self.world.device),  # gradients leave the device on it while backward goes on
            reads_ahead=engine.pipeline_read,
            writes_behind=engine.pipeline_write,
        )
        weights = self._host_weights
        return NvmeStateStore(shards, resources, kernel=self._host_kernel, weights=weights, format_=format_)

    @cached_property
    def _format(self) -> StateFormat:
        """Of all groups: working weights have one type."""
        dtype = next((p.dtype for group in self.groups for p in group.values()), torch.float32)
        format_ = StateFormat.of(self.engine, dtype)
        if self.engine.master_weights == MasterWeights.split and not format_.is_split:
            why = "working weights are on a disk" if dtype is torch.bfloat16 else f"working weights are in {dtype}"
            logger.info("engine.master_weights=split: masters stay whole, because %s", why)
        if self.engine.grad_accum_dtype == GradDtype.bf16 and format_.sums is torch.float32:
            logger.info("engine.grad_accum_dtype=bf16: sums stay in fp32, because working weights are in %s", dtype)
        return format_

    @cached_property
    def _device_kernel(self) -> AdamKernel:
        return AdamKernel(self.config, self.world.device)

    @cached_property
    def _host_kernel(self) -> AdamKernel:
        return AdamKernel(self.config, _CPU, limit=self.engine.sub_group_size)

    @cached_property  # Lifetime: one for all groups, which are closed together
    def _staging(self) -> PinnedStaging:
        return PinnedStaging(self.world.device, pin=_pins(self.engine, self.world.device))

    @cached_property
    def _device_weights(self) -> DeviceWeights:
        return DeviceWeights(self.groups)

    @cached_property
    def _host_weights(self) -> ShardedWeights:
        """Working weights as a step on the host writes them."""
        if self.offloaded is not None:
            return self.offloaded
        if has_own_memory(self.world.device):
            return StagedWeights(self.groups, self.world.device, pin=_pins(self.engine, self.world.device))
        return self._device_weights


def units_in_host_memory(sizes: list[int], *, config: EngineConfig, dtype: torch.dtype) -> set[int]:
    """The offloaded units kept in host memory: all, or with nvme the first ones up to `parameters_in_cpu` elements.

    `sizes` are the bytes of each unit, `dtype` is the type of the working weights.
    """
    if config.offload_param == OffloadDevice.cpu:
        return set(range(len(sizes)))
    chosen, left = set(), config.parameters_in_cpu * dtype.itemsize
    for index, size in enumerate(sizes):
        if size <= left:
            chosen.add(index)
            left -= size
    return chosen


def offload_weights(
    module: nn.Module, units: Sequence[FSDPUnit], *, config: EngineConfig, dtype: torch.dtype, world: World
) -> OffloadedWeights:
    """Memory and files for the sharded parameters, unit by unit, in host memory or on disk.

    Raises:
        RunError: the disk is too small.
    """
    parameters = dict(module.named_parameters())
    sharded = {name: parameter.shape for name, parameter in parameters.items() if isinstance(parameter, DTensor)}
    shapes = [{name: sharded[name] for name in unit.names if name in sharded} for unit in units]
    ranks = min(config.shard_ranks, world.size) or world.size  # that share a copy
    slots = lay_out_units(shapes, ranks=ranks, rank=world.rank % ranks, dtype=dtype)
    sizes = unit_bytes(slots, len(shapes))
    in_memory = units_in_host_memory(sizes, config=config, dtype=dtype)
    # Both stores are asked by unit, so each is laid out for all units, with size 0 for those in the other.
    on_host = [size if index in in_memory else 0 for index, size in enumerate(sizes)]
    on_disk = [size if index not in in_memory else 0 for index, size in enumerate(sizes)]
    host = HostWeights(on_host, device=world.device, pin=_pins(config, world.device))
    stores: list[WeightStore] = [host] * len(sizes)
    if any(on_disk):
        label = "working weights (engine.offload_param=nvme)"
        file = _open_file(label, file_bytes(on_disk), config=config, world=world)
        disk = NvmeWeights(on_disk, file=file, device=world.device)
        stores = [host if size == 0 else disk for size in on_disk]
    return OffloadedWeights(slots, stores, dtype=dtype, others=DeviceWeights([parameters]))


def _pins(config: EngineConfig, device: torch.device) -> bool:
    return config.pin_memory and has_own_memory(device)


def _open_file(label: str, nbytes: int, *, config: EngineConfig, world: World) -> DirectFile:
    """A file of this rank below `engine.nvme_path`, and its buffers."""
    assert config.nvme_path is not None, "the settings were checked"
    pool = BufferPool(config.buffer_count, nbytes=4 * config.buffer_size, pin=_pins(config, world.device))
    return DirectFile(config.nvme_path, nbytes=nbytes, pool=pool, label=label, device=world.device)
