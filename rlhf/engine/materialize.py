"""Gives a model that is on meta memory and weights, each rank reading the rows it keeps and no others.

The model is sharded first, then every parameter gets its place (`allocate`), then one parameter after the other is read
and put there (`fill`). So no rank ever holds more than its share and one parameter's rows on top, and where weights and
masters rest on disk, not even its share.
Left out: where the rows come from (`ModelSpec.weights`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.engine.offload.buffer_pool import BufferPool
from rlhf.engine.offload.direct_io import DirectFile, run_folder
from rlhf.engine.offload.weights import OffloadedWeights, WeightStore, lay_out, unit_bytes
from rlhf.engine.offload.weights_host import HostWeights
from rlhf.engine.offload.weights_nvme import NvmeWeights, file_bytes
from rlhf.engine.offload.working_rows import DeviceWeights
from rlhf.engine.sharding import Sharding, like, local

if TYPE_CHECKING:
    from rlhf.models.model_spec import ModelSpec
    from rlhf.runtime.dist import World


def allocate(spec: ModelSpec, sharding: Sharding, *, config: EngineConfig, dtype: torch.dtype, world: World) -> None:
    """Give every parameter its place in `dtype`, on `world.device` or where working weights rest; buffers move too.

    Raises:
        RunError: the disk has no room.
    """
    module = spec.module
    _move_buffers(module, world.device)
    owners = _owners(module)

    def place(parameter: nn.Parameter, rows: Tensor) -> None:
        placed = nn.Parameter(like(parameter, rows), requires_grad=parameter.requires_grad)
        for owner, key in owners[id(parameter)]:
            owner.register_parameter(key, placed)

    resting = {}
    for name, parameter in list(module.named_parameters()):
        if sharding.tier != OffloadDevice.none and isinstance(parameter, DTensor):
            resting[name] = parameter
        else:
            place(parameter, torch.empty(local(parameter).shape, dtype=dtype, device=world.device))
    if resting:
        sharding.rows = _residency(sharding, config=config, dtype=dtype, world=world)
        for name, parameter in resting.items():
            place(parameter, sharding.rows.stand_in(name, world.device))


@torch.no_grad()
def fill(
    spec: ModelSpec,
    sharding: Sharding,
    *,
    world: World,
    set_master: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Read the weights, one parameter at a time, into their places.

    Args:
        spec: with every parameter allocated.
        sharding: of it.
        world: this rank among the others.
        set_master: takes the name and fp32 rows of each parameter that learns, as precise as the checkpoint is.
    """
    for name, parameter in spec.module.named_parameters():
        rows = spec.weights.read(name, _rows(parameter, world))
        assert rows.shape == local(parameter).shape, f"{name}: {tuple(rows.shape)} for {tuple(local(parameter).shape)}"
        if sharding.rows is not None and name in sharding.rows:
            sharding.rows.write(name, 0, values=rows.flatten())
        else:
            local(parameter).copy_(rows)
        if set_master is not None and parameter.requires_grad:
            set_master(name, rows.float())
    if sharding.rows is not None:
        sharding.rows.flush()


def _residency(sharding: Sharding, *, config: EngineConfig, dtype: torch.dtype, world: World) -> OffloadedWeights:
    module = sharding.module
    sharded = {name: p.shape for name, p in module.named_parameters() if isinstance(p, DTensor)}
    shapes = [{name: sharded[name] for name in unit.names if name in sharded} for unit in sharding.units]
    slots = lay_out(shapes, ranks=world.size, rank=world.rank, dtype=dtype)
    sizes = unit_bytes(slots, len(shapes))
    in_memory = _in_memory(sizes, config=config, dtype=dtype)
    pin = config.pin_memory and world.device.type == "cuda"
    on_host = [size if index in in_memory else 0 for index, size in enumerate(sizes)]
    on_disk = [size if index not in in_memory else 0 for index, size in enumerate(sizes)]
    host = HostWeights(on_host, device=world.device, pin=pin)
    stores: list[WeightStore] = [host] * len(sizes)
    if any(on_disk):
        disk = _disk_home(on_disk, config=config, world=world)
        stores = [host if size == 0 else disk for size in on_disk]
    return OffloadedWeights(slots, stores, dtype=dtype, others=DeviceWeights([dict(module.named_parameters())]))


def _in_memory(sizes: list[int], *, config: EngineConfig, dtype: torch.dtype) -> set[int]:
    """The units that rest in host memory: all, or with nvme the first ones up to `parameters_in_cpu` elements."""
    if config.offload_param == OffloadDevice.cpu:
        return set(range(len(sizes)))
    chosen, left = set(), config.parameters_in_cpu * dtype.itemsize
    for index, size in enumerate(sizes):
        if size <= left:
            chosen.add(index)
            left -= size
    return chosen


def _disk_home(sizes: list[int], *, config: EngineConfig, world: World) -> NvmeWeights:
    assert config.nvme_path is not None, "the settings were checked"
    file = DirectFile(
        run_folder(config.nvme_path, rank=world.rank) / "parameters",
        nbytes=file_bytes(sizes),
        label="working weights (engine.offload_param=nvme)",
    )
    buffers = BufferPool(
        config.buffer_count, nbytes=4 * config.buffer_size, pin=config.pin_memory and world.device.type == "cuda"
    )
    return NvmeWeights(sizes, file=file, buffers=buffers, device=world.device)


def _rows(parameter: Tensor, world: World) -> slice:
    """The rows that this rank keeps: `ceil(rows / ranks)` each, the last ranks fewer or none."""
    total = parameter.shape[0] if parameter.ndim else 1
    if not isinstance(parameter, DTensor):
        return slice(0, total)
    share = -(-total // world.size)
    return slice(min(world.rank * share, total), min((world.rank + 1) * share, total))


def _owners(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter hangs, by `id`; a tied one hangs in several places."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in root.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)].append((module, key))
    return owners


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, key, buffer.to(device))
