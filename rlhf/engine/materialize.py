"""Gives memory and weights to a model that is on meta; each rank reads the rows it keeps and no others.

The model is sharded first, then every parameter gets its memory (`allocate`), then one parameter after the other is
read into it (`fill`). So no rank ever holds more than its shard plus the rows of one parameter, and where weights and
masters are on disk, not even its shard.
See also: where the values come from (`ModelSpec.weights`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig, OffloadDevice, Precision
from rlhf.engine.fsdp_units import local_rows, local_shard, sharded_like
from rlhf.engine.offload.placement import offload_weights
from rlhf.engine.sharding import Sharding
from rlhf.models.model_spec import ModelSpec
from rlhf.runtime.dist import World


def working_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of the weights that forward and backward use on `device`; masters are always fp32.

    `auto` asks what the hardware multiplies natively and never measures, so that every run on a machine, and every
    rank on machines of one kind, gets the same answer.
    """
    if precision == Precision.auto:
        return torch.bfloat16 if _multiplies_bf16(device) else torch.float32
    return {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}[precision]


def _multiplies_bf16(device: torch.device) -> bool:
    """True when `device` has instructions for bf16 products and need not emulate them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def allocate(spec: ModelSpec, sharding: Sharding, *, config: EngineConfig, dtype: torch.dtype, world: World) -> None:
    """Give every parameter memory in `dtype`, on `world.device` or where it is offloaded to; buffers move too.

    Raises:
        RunError: the disk is too small.
    """
    module = spec.module
    _move_buffers(module, world.device)
    owners = _owners(module)

    def replace(parameter: nn.Parameter, shard: Tensor) -> None:
        replacement = nn.Parameter(sharded_like(parameter, shard), requires_grad=parameter.requires_grad)
        for owner, key in owners[id(parameter)]:  # every owner of a tied parameter gets the same one
            setattr(owner, key, replacement)  # not `register_parameter`: recurrent modules keep a list beside it

    offloaded = {}
    for name, parameter in list(module.named_parameters()):
        # Parameters that are not sharded (the small ones of `persistence_threshold`) stay on the device.
        if sharding.offload_device != OffloadDevice.none and isinstance(parameter, DTensor):
            offloaded[name] = parameter
        else:
            replace(parameter, torch.empty(local_shard(parameter).shape, dtype=dtype, device=world.device))
    if offloaded:
        sharding.offloaded = offload_weights(module, sharding.units, config=config, dtype=dtype, world=world)
        for name, parameter in offloaded.items():
            # A placeholder without memory, which fetches the shard when FSDP2 gathers it.
            replace(parameter, sharding.offloaded.placeholder(name, world.device))


@torch.no_grad()
def fill(
    spec: ModelSpec, sharding: Sharding, *, world: World, set_master: Callable[[str, Tensor], None] | None = None
) -> None:
    """Read the weights, one parameter at a time, into their memory.

    Args:
        spec: the model, with every parameter allocated.
        sharding: how it is sharded.
        world: this rank among the others.
        set_master: takes the name and fp32 shard of each trainable parameter, as precise as the model's files are.
    """
    for name, parameter in spec.module.named_parameters():
        rows = local_rows(parameter)
        shard = spec.weights.read(name, slice(rows.start, rows.stop))  # [rows of this rank, ...]
        expected = local_shard(parameter).shape
        assert shard.shape == expected, f"{name}: {tuple(shard.shape)} for {tuple(expected)}"
        sharding.write_shard(name, shard)  # rounds to the working type
        if set_master is not None and parameter.requires_grad:
            set_master(name, shard.float())  # not from the working weights, which are rounded
    sharding.flush()  # writes may still be on their way to the disk


def _owners(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules and keys under which each parameter is registered, by `id`; a tied one has several."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in root.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            # By module, not by dotted name: an attribute is set on its owner.
            owners[id(parameter)].append((module, key))
    return owners


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, key, buffer.to(device))  # never sharded, so every rank needs all of it
