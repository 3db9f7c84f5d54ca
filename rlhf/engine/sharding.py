"""ZeRO stages 0 to 3 as calls to PyTorch FSDP2, and what a rank holds of a parameter.

| stage | parameters between steps | gathered | gradients |
|---|---|---|---|
| 0 | whole | always | see `gradients.py` |
| 1 | sharded | from a step's first forward to its last backward | summed locally, reduced after the last micro-batch |
| 2 | sharded | from a step's first forward to its last backward | reduced after every micro-batch |
| 3 | sharded | a unit at a time, and those that come next | reduced after every micro-batch |

Stage 0 and a single rank leave the module as it is: nothing is wrapped, so nothing is paid for. (FSDP2 could replicate,
over a mesh of one shard, but it would keep two copies of the parameters and copy them in every step.) Weights that rest
off the device are the exception: then one rank is wrapped too, because FSDP2 knows when a unit is needed.
A frozen model has no backward that ends a step: at stages 1 and 2 it stays gathered until `evaluating` or `generating`
is left, at stage 3 it is freed unit by unit.
Left out: what is a unit (`fsdp_units.py`), and where weights rest (`tiers/residency.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.engine.fsdp_private import end_forwards, gather_when_used, hook_keys
from rlhf.engine.fsdp_units import ParameterGroup, Unit, find_units, gathered_ahead, persistent_parameters
from rlhf.engine.offload.weights import OffloadedWeights, param_offload_device
from rlhf.runtime.dist import World, device_mesh

if TYPE_CHECKING:
    from rlhf.models.model_spec import ModelSpec


@dataclass
class Sharding:
    """How a model is spread."""

    module: nn.Module
    units: list[Unit]
    stage: int
    frozen: bool
    tier: OffloadDevice = OffloadDevice.none
    modules: list[FSDPModule] = field(default_factory=list)
    """One of each unit that is gathered, the root first; none where every rank holds the whole model."""
    wrapped: list[nn.Module] = field(default_factory=list)
    """All that FSDP2 put hooks on."""
    hooks: set[int] = field(default_factory=set)
    """Keys of these hooks."""
    replicas: set[str] = field(default_factory=set)
    """Parameters that every one of several ranks holds whole, though each computes a gradient of its own."""
    rows: OffloadedWeights | None = None
    """Of working weights that do not rest on the device; `materialize.py` makes it."""

    def before_backward(self, *, last: bool) -> None:
        """Say what the coming backward does with gradients and gathered parameters (see the table above)."""
        for module in self.modules:
            module.set_requires_gradient_sync(last or self.stage >= 2, recurse=False)
            module.set_reshard_after_backward(last or self.stage >= 3, recurse=False)

    def groups(self) -> list[ParameterGroup]:
        """The parameters that learn, unit by unit, in the order of the forward pass.

        A parameter with two names (tied embeddings) appears once, under its first.
        """
        groups = [unit.group(self.module) for unit in self.units]
        return [group for group in groups if group]

    def gather(self) -> None:
        """Gather every unit and keep it; see `without_hooks` for forwards that then need no other rank."""
        for module in self.modules:
            module.unshard()

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Inside, forwards run as if FSDP2 were not there: its hooks take 0.1 ms for each block and token."""
        saved = [(module, module._forward_pre_hooks, module._forward_hooks) for module in self.wrapped]
        try:
            for module, before, after in saved:
                module._forward_pre_hooks = self._foreign(before)
                module._forward_hooks = self._foreign(after)
            yield
        finally:
            for module, before, after in saved:
                module._forward_pre_hooks, module._forward_hooks = before, after

    def release(self) -> None:
        """Free everything that is gathered, also after a forward that was cut short."""
        if self.modules:
            end_forwards(self.modules)

    def full_tensors(self, masters: Callable[[str], Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole and on the CPU, one at a time; all ranks must iterate to the end.

        Args:
            masters: gives this rank's fp32 rows of a parameter that learns, instead of the working weights.

        Yields:
            Name and tensor; a parameter with two names (tied embeddings) once, under its first. The tensor may share
            the model's memory.
        """
        self.release()
        for name, parameter in list(self.module.named_parameters()):
            if masters is not None and parameter.requires_grad:
                rows = masters(name)
            elif self.rows is not None and name in self.rows:
                rows = self.rows.rows(name)
            else:
                rows = local(parameter)
            yield name, full(like(parameter, rows.to(parameter.device))).cpu()

    def close(self) -> None:
        """Let go of files and page-locked memory; the model cannot be used any more."""
        if self.rows is not None:
            self.rows.close()

    def _foreign(self, hooks: dict[int, Any]) -> OrderedDict[int, Any]:
        return OrderedDict((key, hook) for key, hook in hooks.items() if key not in self.hooks)


def shard(spec: ModelSpec, *, config: EngineConfig, world: World, frozen: bool) -> Sharding:
    """Shard a model that is still on meta over all ranks, unit by unit."""
    tier = param_offload_device(config, world.device)
    units = find_units(spec, config=config)
    sharding = Sharding(spec.module, units, config.zero_stage, frozen, tier)
    names = [name for name, _ in spec.module.named_parameters()]
    if config.zero_stage == 0 or (world.size == 1 and tier == OffloadDevice.none):
        sharding.replicas = set(names) if world.size > 1 else set()
        return sharding
    persistent = persistent_parameters(spec.module, config)
    sharding.replicas = set(persistent) if world.size > 1 else set()
    _wrap(sharding, persistent, world=world)
    if config.zero_stage == 3:
        _gather_ahead(sharding, config)
    _stay_gathered(sharding)
    return sharding


def _wrap(sharding: Sharding, persistent: ParameterGroup, *, world: World) -> None:
    """Hand the units to FSDP2, the root last, as it wants them."""
    mesh, ignored = device_mesh(world), set(persistent.values())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for unit in [*sharding.units[1:], sharding.units[0]]:
        before = {key for part in unit.modules for key in hook_keys(part)}
        parts = unit.modules if len(unit.modules) > 1 else unit.modules[0]
        fully_shard(parts, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        sharding.hooks |= {key for part in unit.modules for key in hook_keys(part)} - before
        sharding.wrapped += unit.modules
        first = unit.modules[0]
        # Plain sums over ranks: losses come divided by the global denominator already.
        if world.size > 1:  # one rank would divide by it, in memory of its own
            first.set_gradient_divide_factor(1.0)
        first.set_force_sum_reduction_for_comms(True)
        first.set_unshard_in_backward(unit.needed_in_backward)
    sharding.modules = [unit.modules[0] for unit in sharding.units]


def _gather_ahead(sharding: Sharding, config: EngineConfig) -> None:
    """Gather units while those before them compute, forward and backward."""
    units = sharding.units
    for unit, following in zip(units, gathered_ahead(units, config=config), strict=True):
        unit.modules[0].set_modules_to_forward_prefetch([other.modules[0] for other in following])
    back = units[:0:-1]  # the root stays gathered
    for unit, following in zip(back, gathered_ahead(back, config=config), strict=True):
        # FSDP2 takes an empty list for a wish to choose itself; a module that is gathered costs nothing.
        ahead = [other.modules[0] for other in following if other.needed_in_backward] or [unit.modules[0]]
        unit.modules[0].set_modules_to_backward_prefetch(ahead)
    units[0].modules[0].set_modules_to_backward_prefetch([units[0].modules[0]])
    if not config.overlap_comm:
        for module in sharding.modules:
            gather_when_used(module)


def _stay_gathered(sharding: Sharding) -> None:
    """Which units are freed after forward.

    Backward begins with the last unit and the root: freeing them at the end of forward would gather them twice.
    """
    ends = [] if sharding.frozen else [sharding.modules[0], sharding.modules[-1]]
    kept = {id(module) for module in (ends if sharding.stage == 3 else sharding.modules)}
    for module in sharding.modules:
        module.set_reshard_after_forward(id(module) not in kept, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of `tensor`, sharing its memory; all of it when it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, rows: Tensor) -> Tensor:
    """`rows` as this rank's part of a tensor that is sharded as `parameter` is, sharing the memory of `rows`."""
    if not isinstance(parameter, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def full(tensor: Tensor) -> Tensor:
    """All rows of `tensor`, on every rank; all ranks must call."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
