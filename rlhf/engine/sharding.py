"""ZeRO stages 0 to 3, expressed as calls to PyTorch FSDP2.

| stage | parameters between steps | gathered | gradients |
|---|---|---|---|
| 0 | whole | always | see `gradients.py` |
| 1 | sharded | from a step's first forward to its last backward | summed locally, reduced after the last micro-batch |
| 2 | sharded | from a step's first forward to its last backward | reduced after every micro-batch |
| 3 | sharded | one unit at a time, and those prefetched | reduced after every micro-batch |

With `engine.shard_ranks`, each group of that many ranks holds a copy: it gathers among itself, and what it has reduced
is summed over the groups (an all-reduce of shards after every reduce-scatter).
Stage 0 and a single rank leave the module as it is, so they cost nothing. (FSDP2 could replicate, over a mesh of one
shard, but it would keep two copies of the parameters and copy them in every step.) Offloaded weights are the exception:
FSDP2 then wraps even a single rank, because it knows when a unit is needed.
A frozen model has no backward that ends a step: at stages 1 and 2 it stays gathered until `evaluating` or `generating`
is left, at stage 3 each unit is freed after its forward.
See also: which parameters form a unit (`fsdp_units.py`), and offloaded weights (`offload/working_weights.py`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from rlhf.config.engine_config import EngineConfig, GradDtype, OffloadDevice
from rlhf.engine.fsdp_private import end_forwards, gather_on_compute_stream, hook_keys
from rlhf.engine.fsdp_units import (
    FSDPUnit,
    ParameterGroup,
    find_units,
    full_tensor,
    local_shard,
    persistent_parameters,
    prefetched_units,
    sharded_like,
)
from rlhf.engine.offload.placement import offload_device
from rlhf.engine.offload.working_weights import OffloadedWeights
from rlhf.models.model_spec import ModelSpec
from rlhf.runtime.dist import World, device_mesh
from rlhf.runtime.launch import local_ranks

log = logging.getLogger(__name__)


@dataclass
class Sharding:
    """A model that is spread over the ranks."""

    module: nn.Module
    units: list[FSDPUnit]
    stage: int
    frozen: bool
    reduce_dtype: torch.dtype = torch.float32
    """The type in which gradients are summed over ranks."""
    offload_device: OffloadDevice = OffloadDevice.none
    """Where working weights are kept while nothing computes with them."""
    modules: list[FSDPModule] = field(default_factory=list)
    """The module that FSDP2 knows each unit by, the root first; empty where every rank holds the whole model."""
    wrapped: list[nn.Module] = field(default_factory=list)
    """All modules that FSDP2 put hooks on."""
    hooks: set[int] = field(default_factory=set)
    """Keys of these hooks."""
    copies: int = 1
    """How many groups of ranks hold everything that is sharded, each a copy (`engine.shard_ranks`)."""
    replicas: set[str] = field(default_factory=set)
    """Parameters that several ranks hold whole, though each rank computes a gradient of its own for them."""
    offloaded: OffloadedWeights | None = None
    """The working weights that are not on the device; set by `materialize.allocate`."""
    prefetch: EngineConfig | None = None
    """How far ahead units are gathered; None where none is."""

    def before_backward(self, *, last: bool) -> None:
        """Tell FSDP2 what the coming backward does with gradients and gathered parameters (see the table above)."""
        for module in self.modules:
            # Stage 1 reduces once per step. All ranks pass the same `last`, so their reduce-scatters match.
            module.set_requires_gradient_sync(last or self.stage >= 2, recurse=False)
            # Stages 1 and 2 keep parameters gathered for the next micro-batch; the last backward frees them.
            module.set_reshard_after_backward(last or self.stage >= 3, recurse=False)

    def groups(self) -> list[ParameterGroup]:
        """The trainable parameters, unit by unit, in the order of the forward pass.

        A parameter with two names (tied embeddings) appears once, under its first.
        """
        groups = [unit.group(self.module) for unit in self.units]
        return [group for group in groups if group]

    def gather(self) -> None:
        """Gather every unit and keep it; under `without_hooks`, forwards then need no other rank."""
        for module in self.modules:
            module.unshard()  # all-gather: all ranks must come here

    @contextmanager
    def without_hooks(self, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
        """Run forwards inside as if FSDP2 were not there: its hooks cost 0.1 ms for each block and token.

        Args:
            modules: those whose hooks are off; None is all of them.
        """
        modules = self.wrapped if modules is None else modules
        saved = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
        try:
            for module, before, after in saved:
                # FSDP2's hooks would gather and free, which needs all ranks; other hooks (of adapters) must still run.
                module._forward_pre_hooks = self._foreign(before)
                module._forward_hooks = self._foreign(after)
            yield
        finally:
            for module, before, after in saved:
                module._forward_pre_hooks, module._forward_hooks = before, after

    @contextmanager
    def leaving_out(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Forwards inside, and their backwards, read no parameter of `blocks`: units of theirs alone stay sharded.

        Every rank must leave out the same ones, or their all-gathers would not match.
        """
        out = {id(block) for block in blocks} if self.modules else set()
        # A unit that other blocks share keeps its hooks, which count the modules that have run.
        is_idle = [out.issuperset(map(id, unit.modules)) for unit in self.units]
        with self.without_hooks([part for unit in compress(self.units, is_idle) for part in unit.modules]):
            self._prefetch_forward([unit for unit, idle in zip(self.units, is_idle, strict=True) if not idle])
            try:
                yield
            finally:
                self._prefetch_forward(self.units)

    def _prefetch_forward(self, units: list[FSDPUnit]) -> None:
        """Have each of `units` gather those that follow it among them."""
        if self.prefetch is None:
            return
        for unit, following in zip(units, prefetched_units(units, config=self.prefetch), strict=True):
            unit.fsdp_module.set_modules_to_forward_prefetch([other.fsdp_module for other in following])

    def release(self) -> None:
        """Free everything that is gathered, also after a forward that was cut short."""
        if self.modules:
            end_forwards(self.modules)

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.full_tensors`."""
        self.release()  # parameters are looked up below: while gathered, they are not DTensors
        for name, parameter in list(self.module.named_parameters()):
            # NCCL gathers on the device only, so a shard from host or disk goes there first.
            yield name, full_tensor(sharded_like(parameter, self.read_shard(name).to(parameter.device))).cpu()

    def read_shard(self, name: str) -> Tensor:
        """This rank's shard of a parameter that is not gathered: the memory itself, or a copy of what is offloaded."""
        if self.offloaded is not None and name in self.offloaded:
            return self.offloaded.shard(name)
        return local_shard(self.module.get_parameter(name))

    @torch.no_grad()
    def write_shard(self, name: str, shard: Tensor) -> None:
        """Set it, rounded to the working type; `flush` follows where weights are offloaded."""
        if self.offloaded is not None and name in self.offloaded:
            self.offloaded.write(name, 0, values=shard.flatten())
        else:
            local_shard(self.module.get_parameter(name)).copy_(shard)

    def flush(self) -> None:
        """Wait until all writes have reached the host's memory or the disk."""
        if self.offloaded is not None:
            self.offloaded.flush()

    def close(self) -> None:
        """Release files and page-locked memory; the model cannot be used any more."""
        if self.offloaded is not None:
            self.offloaded.close()

    def _foreign(self, hooks: dict[int, Any]) -> OrderedDict[int, Any]:
        return OrderedDict((key, hook) for key, hook in hooks.items() if key not in self.hooks)


def shard(spec: ModelSpec, *, config: EngineConfig, world: World, frozen: bool) -> Sharding:
    """Shard a model that is still on meta over all ranks, unit by unit."""
    away = offload_device(config.offload_param, world.device)
    units = find_units(spec, config=config)
    sharding = Sharding(spec.module, units, config.zero_stage, frozen, reduction_dtype(config), away)
    names = [name for name, _ in spec.module.named_parameters()]
    if config.zero_stage == 0 or (world.size == 1 and away == OffloadDevice.none):
        sharding.replicas = set(names) if world.size > 1 else set()
        return sharding
    sharding.copies = copies_of(config, ranks=world.size)
    persistent = persistent_parameters(spec.module, config)
    sharding.replicas = set(persistent) if world.size > 1 else set()
    _wrap(sharding, persistent, mesh=device_mesh(world, shard_ranks=world.size // sharding.copies))
    if config.zero_stage == 3:
        _prefetch(sharding, config)
    _stay_gathered(sharding)
    return sharding


def reduction_dtype(config: EngineConfig) -> torch.dtype:
    """The type in which gradients are summed over ranks."""
    return torch.bfloat16 if config.reduce_dtype == GradDtype.bf16 else torch.float32


def copies_of(config: EngineConfig, *, ranks: int) -> int:
    """How many copies of what is sharded there are.

    Raises:
        ValueError: the ranks cannot be divided into groups of `engine.shard_ranks`.
    """
    size = min(config.shard_ranks, ranks) or ranks
    if ranks % size:
        raise ValueError(f"engine.shard_ranks={size}: found {ranks} ranks, expected a multiple of {size}.")
    return ranks // size


def check_copies(name: str, config: EngineConfig, *, ranks: int) -> None:
    """Warn if a copy would be shared by several machines; `name` is the engine's. Raises as `copies_of` does."""
    size, here = config.shard_ranks, local_ranks(ranks)
    if copies_of(config, ranks=ranks) > 1 and here % size:
        log.warning(
            "%s.shard_ranks=%s: this machine has %s ranks, so copies are shared between machines, and all weights "
            "travel from one to the other",
            *(name, size, here),
        )


def _wrap(sharding: Sharding, persistent: ParameterGroup, *, mesh: DeviceMesh) -> None:
    """Hand the units to FSDP2, the root last, as it requires."""
    ignored = set(persistent.values())
    # In fp32, whatever the working weights are, sums hardly depend on the number of ranks; in bf16 they do.
    policy = MixedPrecisionPolicy(reduce_dtype=sharding.reduce_dtype)
    for unit in [*sharding.units[1:], sharding.units[0]]:
        before = {key for part in unit.modules for key in hook_keys(part)}
        parts: Any = unit.modules if len(unit.modules) > 1 else unit.modules[0]
        fully_shard(parts, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        sharding.hooks |= {key for part in unit.modules for key in hook_keys(part)} - before
        sharding.wrapped += unit.modules
        first = unit.fsdp_module
        # Reduce to plain sums, because losses are divided by the global denominator already.
        if mesh.size() > 1:  # a single rank would still divide, into a copy of the gradients
            first.set_gradient_divide_factor(1.0)
        first.set_force_sum_reduction_for_comms(True)
        # An embedding is not gathered for backward; see `FSDPUnit.needed_in_backward`.
        first.set_unshard_in_backward(unit.needed_in_backward)
    sharding.modules = [unit.fsdp_module for unit in sharding.units]


def _prefetch(sharding: Sharding, config: EngineConfig) -> None:
    """Gather units while those before them compute, in forward and in backward."""
    units, sharding.prefetch = sharding.units, config
    sharding._prefetch_forward(units)
    backward = units[:0:-1]  # without the root, which stays gathered
    for unit, following in zip(backward, prefetched_units(backward, config=config), strict=True):
        # FSDP2 takes an empty list as "choose yourself". Prefetching a unit that is gathered already does nothing.
        ahead = [other.fsdp_module for other in following if other.needed_in_backward] or [unit.fsdp_module]
        unit.fsdp_module.set_modules_to_backward_prefetch(ahead)
    root = units[0].fsdp_module
    root.set_modules_to_backward_prefetch([root])  # itself, which is gathered: nothing
    if not config.overlap_comm:
        for module in sharding.modules:
            gather_on_compute_stream(module)


def _stay_gathered(sharding: Sharding) -> None:
    """Choose the units that are not freed after forward.

    Backward begins with the last unit and the root: freeing them at the end of forward would gather them twice.
    """
    ends = [] if sharding.frozen else [sharding.modules[0], sharding.modules[-1]]
    kept = {id(module) for module in (ends if sharding.stage == 3 else sharding.modules)}
    for module in sharding.modules:
        module.set_reshard_after_forward(id(module) not in kept, recurse=False)
