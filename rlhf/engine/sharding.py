"""ZeRO stages 0 to 3 as calls to PyTorch FSDP2, and what a rank holds of a parameter.

| stage | parameters between steps | gathered | gradients |
|---|---|---|---|
| 0 | whole | always | see `gradients.py` |
| 1 | sharded | from a step's first forward to its last backward | summed locally, reduced after the last micro-batch |
| 2 | sharded | from a step's first forward to its last backward | reduced after every micro-batch |
| 3 | sharded | a block at a time | reduced after every micro-batch |

Stage 0 and a single rank leave the module as it is: nothing is wrapped, so nothing is paid for. (FSDP2 could replicate,
over a mesh of one shard, but it would keep two copies of the parameters and copy them in every step.)
A frozen model has no backward that ends a step: at stages 1 and 2 it stays gathered until `evaluating` or `generating`
is left, at stage 3 it is freed block by block.
Left out: offloading.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlhf.dist import World, device_mesh

if TYPE_CHECKING:
    from rlhf.models.blueprint import Blueprint

ParameterGroup = dict[str, nn.Parameter]
"""Parameters that travel together, by name."""


@dataclass
class Sharding:
    """The FSDP2 modules of a model, the root first; none where every rank holds the whole model."""

    stage: int
    frozen: bool
    modules: list[FSDPModule] = field(default_factory=list)
    hooks: set[int] = field(default_factory=set)  # keys of the forward hooks that FSDP2 put on them

    def before_backward(self, *, last: bool) -> None:
        """Say what the coming backward does with gradients and gathered parameters (see the table above)."""
        for module in self.modules:
            module.set_requires_gradient_sync(last or self.stage >= 2, recurse=False)
            module.set_reshard_after_backward(last or self.stage >= 3, recurse=False)

    def gather(self) -> None:
        """Gather every group and keep it; see `without_hooks` for forwards that then need no other rank."""
        for module in self.modules:
            module.unshard()

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Inside, forwards run as if FSDP2 were not there: its hooks take 0.1 ms for each block and token."""
        saved = [(module, module._forward_pre_hooks, module._forward_hooks) for module in self.modules]
        try:
            for module, before, after in saved:
                module._forward_pre_hooks = self._foreign(before)
                module._forward_hooks = self._foreign(after)
            yield
        finally:
            for module, before, after in saved:
                module._forward_pre_hooks, module._forward_hooks = before, after

    def release(self) -> None:
        """Free everything that is gathered, and go back to gathering as the stage says."""
        for module in self.modules:
            # Where a forward was cut short, FSDP2 takes itself to be inside it and keeps what forward keeps.
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
        self._follow_the_stage()

    def _foreign(self, hooks: dict[int, Any]) -> OrderedDict[int, Any]:
        return OrderedDict((key, hook) for key, hook in hooks.items() if key not in self.hooks)

    def _follow_the_stage(self) -> None:
        for depth, module in enumerate(self.modules):
            is_root = depth == 0
            # Backward starts with the root's parameters: freeing them at the end of forward would gather them twice.
            module.set_reshard_after_forward(self.stage >= 3 and (self.frozen or not is_root), recurse=False)


def shard(blueprint: Blueprint, *, stage: int, world: World, frozen: bool) -> Sharding:
    """Shard a model that is still on meta over all ranks, each block a group and the rest another."""
    sharding = Sharding(stage, frozen)
    if world.size == 1 or stage == 0:
        return sharding
    mesh = device_mesh(world)
    for module in [*blueprint.blocks, blueprint.module]:
        before = _hook_keys(module)
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        sharding.hooks |= _hook_keys(module) - before
        _sum_gradients(module)
    sharding.modules = [blueprint.module, *blueprint.blocks]
    if stage >= 3:
        _prefetch(blueprint.blocks)
    sharding._follow_the_stage()
    return sharding


def _hook_keys(module: nn.Module) -> set[int]:
    return {*module._forward_pre_hooks, *module._forward_hooks}


def _sum_gradients(module: FSDPModule) -> None:
    """Plain sums over ranks: losses come divided by the global denominator already."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _prefetch(blocks: list[FSDPModule]) -> None:
    """Gather a block while its neighbour computes."""
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def trainable_groups(blueprint: Blueprint) -> list[ParameterGroup]:
    """The parameters that learn, in the order of the forward pass: those outside the blocks, then each block's.

    A parameter with two names (tied embeddings) appears once, under its first.
    """
    group_of = {id(p): index for index, block in enumerate(blueprint.blocks, 1) for p in block.parameters()}
    groups: list[ParameterGroup] = [{} for _ in range(len(blueprint.blocks) + 1)]
    for name, parameter in blueprint.module.named_parameters():
        if parameter.requires_grad:
            groups[group_of.get(id(parameter), 0)][name] = parameter
    return [group for group in groups if group]


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
