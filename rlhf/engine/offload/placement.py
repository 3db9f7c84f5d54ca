"""Which home each group gets: its place in memory or on disk, as the engine's settings say.

| offload_optimizer | on a CPU machine | with CUDA |
|---|---|---|
| device | memory | the device's memory; the step runs there |
| cpu | the same | host memory; gradients and weights travel, the step runs on the CPU |
| nvme | a file | a file; gradients and weights travel, the step runs on the CPU |

Left out: stores of working weights (`weights.py`).
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
from rlhf.engine.offload.direct_io import DirectFile, run_folder
from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator, HostGradAccumulator, PinnedStaging
from rlhf.engine.offload.nvme_layout import PAGE_ELEMENTS, capacity_of, lay_out
from rlhf.engine.offload.optimizer_state import InMemoryStateStore, OptimizerStateStore, States, shapes_of
from rlhf.engine.offload.optimizer_state_nvme import NvmeResources, NvmeStateStore
from rlhf.engine.offload.weights import ShardedWeights
from rlhf.engine.offload.working_rows import DeviceWeights, StagedWeights
from rlhf.runtime.dist import World

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """Makes stores for groups of parameters that learn."""

    groups: Sequence[ParameterGroup]
    config: OptimizerConfig
    engine: EngineConfig
    world: World
    rows: ShardedWeights | None
    """Of working weights that do not rest on the device."""

    @property
    def tier(self) -> OffloadDevice:
        """Of the groups that leave the device; `device` where none needs to."""
        is_here = self.engine.offload_optimizer == OffloadDevice.cpu and not has_own_memory(self.world.device)
        return OffloadDevice.none if is_here else self.engine.offload_optimizer

    def stores(self) -> list[OptimizerStateStore]:
        """A home for each group, or one for all on disk, in the order of the forward pass.

        Raises:
            ValueError: settings that exclude each other.
        """
        self._check()
        away, here = self._split()
        stores: list[OptimizerStateStore] = []
        if away and self.tier == OffloadDevice.nvme:
            stores.append(self.on_disk(away))
        elif away:
            stores += [self.on_host(group) for group in away]
        return stores + [self.on_device(group) for group in here]

    def on_device(self, group: ParameterGroup) -> OptimizerStateStore:
        """Memory of the model's device."""
        delays = self.engine.delayed_update
        masters = delays or self.rows is not None or _is_narrow(group)
        return InMemoryStateStore(
            shapes_of(group),
            DeviceGradAccumulator(),
            kernel=self._device_kernel,
            rows=self.rows or self._device_rows,
            states=States(self.world.device, self._moments, masters),
            delays=delays,
        )

    def on_host(self, group: ParameterGroup) -> OptimizerStateStore:
        """Host memory of a CUDA device's model."""
        delays = self.engine.delayed_update
        return InMemoryStateStore(
            shapes_of(group),
            HostGradAccumulator(self._staging, sides=2 if delays else 1),
            kernel=self._host_kernel,
            rows=self._host_rows,
            states=States(_CPU, self._moments, masters=True),
            delays=delays,
        )

    def on_disk(self, groups: Sequence[ParameterGroup]) -> OptimizerStateStore:
        """One file for all, so that reading ahead does not end with a group."""
        shapes = [shape for group in groups for shape in shapes_of(group)]
        engine, moments = self.engine, self._moments
        nbytes = 4 * engine.buffer_size
        capacity = capacity_of(nbytes, engine.sub_group_size, moments=moments)
        if capacity == 0:
            least = -(-PAGE_ELEMENTS * (8 + 2 * moments.itemsize) // 4)
            raise ValueError(
                f"engine.buffer_size={engine.buffer_size}: expected {least} or more with offload_optimizer=nvme; "
                "millions are fast."
            )
        records = lay_out(shapes, capacity, moments=moments)
        assert engine.nvme_path is not None, "the settings were checked"
        folder = run_folder(engine.nvme_path, rank=self.world.rank)
        room = NvmeResources(
            file=DirectFile(
                folder / "optimizer",
                nbytes=max(sum(record.nbytes for record in records), 1),
                label="optimizer state (engine.offload_optimizer=nvme)",
            ),
            records=records,
            buffers=BufferPool(engine.buffer_count, nbytes=nbytes, pin=self._pins),
            courier=CopyStream(self.world.device),
            reads_ahead=engine.pipeline_read,
            writes_behind=engine.pipeline_write,
        )
        return NvmeStateStore(shapes, room, kernel=self._host_kernel, rows=self._host_rows)

    @property
    def _pins(self) -> bool:
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
        return PinnedStaging(self.world.device, pin=self._pins)

    @cached_property
    def _device_rows(self) -> ShardedWeights:
        return DeviceWeights(self.groups)

    @cached_property
    def _host_rows(self) -> ShardedWeights:
        """Working weights as seen from the host."""
        if self.rows is not None:
            return self.rows
        if has_own_memory(self.world.device):
            return StagedWeights(self.groups, self.world.device, pin=self._pins)
        return self._device_rows

    def _split(self) -> tuple[list[ParameterGroup], list[ParameterGroup]]:
        """Groups that leave the device, and the last ones, which stay."""
        if self.tier == OffloadDevice.none:
            return [], list(self.groups)
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
                "a part of the model that is one step ahead of the rest is no training that anybody described."
            )


def has_own_memory(device: torch.device) -> bool:
    """Whether `device` computes in other memory than the host's."""
    return device.type == "cuda"


def _is_narrow(group: ParameterGroup) -> bool:
    return any(parameter.dtype != torch.float32 for parameter in group.values())
