"""Chooses where each group of parameters keeps its optimizer state: on the device, in host memory, or in a file.

[Note: offload] A training step touches five kinds of tensor. With ZeRO, a rank holds its *shard* of each: its rows of
every parameter. Parameters that one FSDP module gathers together are a *unit*, or a *group* where only those that learn
are meant.

| kind | what it is | type | kept |
|---|---|---|---|
| working weights | what forward and backward compute with | bf16, fp16 or fp32 | where `offload_param` says |
| masters | the weights that AdamW updates; working weights are their rounded copies | fp32 | with the moments |
| moments | AdamW's running averages of the gradient and of its square | fp32 or bf16 | where `offload_optimizer` says |
| gradient sums | gradients of a step's micro-batches, added up | as the first came, then fp32 | with the moments |
| staging buffers | page-locked host memory through which the others travel | bytes | host, of a fixed size |

Masters, moments and gradient sums are the *optimizer state* of a group, and belong to one `OptimizerStateStore`. The
offloaded shards of a unit's working weights are in one `WeightStore`. A store is on one *offload device*, and its
tensors pass through staging buffers on their way to the device that computes:

| `offload_optimizer` | on a CPU machine | with CUDA |
|---|---|---|
| none | memory | device memory; the step runs on the device |
| cpu | the same | host memory; gradients and weights travel, the step runs on the CPU |
| nvme | a file | a file; gradients and weights travel, the step runs on the CPU |

No store changes a number: on one kind of processor every choice trains the same weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rlhf.config.engine_config import EngineConfig, MomentDtype, OffloadDevice
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.engine.adam_kernel import AdamKernel
from rlhf.engine.fsdp_units import ParameterGroup, num_offloaded
from rlhf.engine.offload.buffer_pool import BufferPool
from rlhf.engine.offload.copy_stream import CopyStream
from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator, HostGradAccumulator, PinnedStaging
from rlhf.engine.offload.nvme_layout import PAGE_ELEMENTS, lay_out_tiles, tile_capacity
from rlhf.engine.offload.optimizer_state import InMemoryStateStore, OptimizerStateStore, shards_of
from rlhf.engine.offload.optimizer_state_nvme import NvmeResources, NvmeStateStore
from rlhf.engine.offload.sharded_weights import DeviceWeights, ShardedWeights, StagedWeights
from rlhf.runtime.dist import World

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """Makes the stores of groups of parameters that learn."""

    groups: Sequence[ParameterGroup]
    config: OptimizerConfig
    engine: EngineConfig
    world: World
    offloaded: ShardedWeights | None
    """Working weights that are not kept on the device; None where all are."""

    @property
    def offload_device(self) -> OffloadDevice:
        """Where the groups go that leave the device; `none` where none needs to."""
        is_here = self.engine.offload_optimizer == OffloadDevice.cpu and not has_own_memory(self.world.device)
        return OffloadDevice.none if is_here else self.engine.offload_optimizer

    def stores(self) -> list[OptimizerStateStore]:
        """A store for each group, or one file for all, in the order of the forward pass.

        Raises:
            ValueError: settings that exclude each other.
            RunError: the disk is too small.
        """
        self._check()
        away, here = self._split()
        stores: list[OptimizerStateStore] = []
        if away and self.offload_device == OffloadDevice.nvme:
            stores.append(self._on_nvme(away))  # one file for all: reading ahead does not end with a group
        elif away:
            stores += [self._on_host(group) for group in away]
        return stores + [self._on_device(group) for group in here]

    def _on_device(self, group: ParameterGroup) -> OptimizerStateStore:
        """State in the memory of the model's device."""
        delayed = self.engine.delayed_update
        is_narrow = any(parameter.dtype != torch.float32 for parameter in group.values())
        # Without masters AdamW updates the working weights themselves, which must be fp32, here, and not a step late.
        masters = delayed or self.offloaded is not None or is_narrow
        return InMemoryStateStore(
            shards_of(group),
            DeviceGradAccumulator(),
            kernel=self._device_kernel,
            weights=self.offloaded or self._device_weights,
            moments=self._moments,
            in_place=None if masters else self._device_weights.shard,
            delayed=delayed,
        )

    def _on_host(self, group: ParameterGroup) -> OptimizerStateStore:
        """State in host memory, of a model on a CUDA device."""
        delayed = self.engine.delayed_update
        return InMemoryStateStore(
            shards_of(group),
            # A delayed step reads its gradients while the next step's are added: they need memory of their own.
            HostGradAccumulator(self._staging, sides=2 if delayed else 1),
            kernel=self._host_kernel,
            weights=self._host_weights,
            moments=self._moments,
            delayed=delayed,
        )

    def _on_nvme(self, groups: Sequence[ParameterGroup]) -> OptimizerStateStore:
        """State in one file."""
        shards = [shard for group in groups for shard in shards_of(group)]
        engine, moments = self.engine, self._moments
        nbytes = 4 * engine.buffer_size
        capacity = tile_capacity(nbytes, engine.sub_group_size, moments=moments)
        if capacity == 0:
            least = -(-PAGE_ELEMENTS * (8 + 2 * moments.itemsize) // 4)
            raise ValueError(
                f"engine.buffer_size={engine.buffer_size}: expected {least} or more with offload_optimizer=nvme; "
                "millions are fast."
            )
        tiles = lay_out_tiles(shards, capacity, moments=moments)
        assert engine.nvme_path is not None, "the settings were checked"
        file = DirectFile(
            engine.nvme_path,
            nbytes=max(sum(tile.nbytes for tile in tiles), 1),
            pool=BufferPool(engine.buffer_count, nbytes=nbytes, pin=self._pin),
            label="optimizer state (engine.offload_optimizer=nvme)",
            device=self.world.device,
        )
        resources = NvmeResources(
            file=file,
            tiles=tiles,
            stream=CopyStream(self.world.device),
            reads_ahead=engine.pipeline_read,
            writes_behind=engine.pipeline_write,
        )
        return NvmeStateStore(shards, resources, kernel=self._host_kernel, weights=self._host_weights)

    @property
    def _pin(self) -> bool:
        return self.engine.pin_memory and has_own_memory(self.world.device)

    @property
    def _moments(self) -> torch.dtype:
        return torch.bfloat16 if self.engine.moments == MomentDtype.bf16 else torch.float32

    @cached_property
    def _device_kernel(self) -> AdamKernel:
        return AdamKernel(self.config, self.world.device)

    @cached_property
    def _host_kernel(self) -> AdamKernel:
        return AdamKernel(self.config, _CPU, limit=self.engine.sub_group_size)

    @cached_property
    def _staging(self) -> PinnedStaging:
        return PinnedStaging(self.world.device, pin=self._pin)

    @cached_property
    def _device_weights(self) -> DeviceWeights:
        return DeviceWeights(self.groups)

    @cached_property
    def _host_weights(self) -> ShardedWeights:
        """Working weights as a step on the host writes them."""
        if self.offloaded is not None:
            return self.offloaded
        if has_own_memory(self.world.device):
            return StagedWeights(self.groups, self.world.device, pin=self._pin)
        return self._device_weights

    def _split(self) -> tuple[list[ParameterGroup], list[ParameterGroup]]:
        """The first groups, which leave the device, and the last ones, which stay."""
        if self.offload_device == OffloadDevice.none:
            return [], list(self.groups)
        # Whole sizes, not those of shards: all ranks must split alike.
        sizes = [sum(p.numel() for p in group.values()) for group in self.groups]
        away = num_offloaded(sizes, self.engine.optimizer_share)
        return list(self.groups[:away]), list(self.groups[away:])

    def _check(self) -> None:
        engine = self.engine
        if not engine.delayed_update:
            return
        if engine.offload_optimizer != OffloadDevice.cpu:
            raise ValueError(
                f"engine.delayed_update=true: expected engine.offload_optimizer=cpu, found {engine.offload_optimizer}; "
                "on the device a step has nothing to overlap with, and on disk the next gradients would replace those "
                "that it reads."
            )
        if engine.optimizer_share < 1:
            raise ValueError(
                f"engine.delayed_update=true: expected engine.optimizer_share=1, found {engine.optimizer_share}; "
                "a model of which one part is a step ahead of the rest is not a training method that anybody described."
            )


def has_own_memory(device: torch.device) -> bool:
    """Whether `device` computes in other memory than the host's."""
    return device.type == "cuda"
