"""An engine for a module that is in memory, and the way back: its parameters whole, to be saved or replaced.

See also: what becomes of the module (`rlhf/models/module_spec.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.engine import Engine, build_engine
from rlhf.engine.fsdp_private import without_load_hooks
from rlhf.engine.fsdp_units import full_tensor, local_rows, sharded_like
from rlhf.models.module_spec import replace_parameters, require_all_layers, spec_of
from rlhf.runtime.dist import World, copy_from_first


def shard_module(module: nn.Module, *, config: EngineConfig, world: World, optimizer: OptimizerConfig | None) -> Engine:
    """Spread a module's own parameters over the ranks; it stays the same object, and its forward the same.

    Args:
        module: parameters of any floating-point type, on any device, alike on all ranks.
        config: ZeRO stage, precision, offloading.
        world: this rank among the others; all must call.
        optimizer: Adam's settings, which groups of parameters replace in every step; None for a frozen model.
    """
    if config.zero_stage >= 1 and world.size > 1:
        require_all_layers(module)
    attributes = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
    engine = build_engine(spec_of(module), config=config, world=world, optimizer=optimizer, total_steps=1)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # FSDP2 has made a class FSDPLlama...: code that knows models by their classes' names would not find it.
            kind, own = type(part), type(part).__mro__[2]
            kind.__name__, kind.__qualname__ = own.__name__, own.__qualname__
    for name, parameter in module.named_parameters():
        vars(parameter).update(attributes[name])  # what users have noted on their parameters
    if world.size > 1:
        _share_statistics(module)
    return engine


def _share_statistics(module: nn.Module) -> None:
    """Train with the first rank's running statistics of batch norms, as DDP does."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]

    def share(*_: Any) -> None:
        for buffer in buffers if module.training else ():
            copy_from_first(buffer)

    if buffers:
        module.register_forward_pre_hook(share)


@torch.no_grad()
def full_state_dict(engine: Engine, *, keep: bool) -> dict[str, Any]:
    """The module's state dict with every tensor whole and on the CPU, in the working type; all ranks must call.

    Args:
        engine: of the module.
        keep: whether this rank wants it; others only take part, and get an empty one.
    """
    module, whole = engine.module, dict(engine.full_tensors() if keep else _dropped(engine))
    if not keep:
        return {}
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        key: whole[first[id(value)]]
        if id(value) in first  # a tied parameter has several keys, and one tensor
        else (value.detach().cpu() if isinstance(value, Tensor) else value)
        for key, value in module.state_dict(keep_vars=True).items()
    }


def _dropped(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Take part in every gather and keep nothing."""
    for _ in engine.full_tensors():
        pass
    yield from ()


@contextmanager
def whole_parameters(engine: Engine) -> Iterator[nn.Module]:
    """Inside, the module has whole fp32 parameters on the CPU, which may be changed; afterwards they are sharded again.

    For loading: any code that loads a state dict or adapters works, because there is nothing special to load into.
    Learning parameters are those that AdamW updates, not rounded ones: what is not loaded keeps every bit. Every rank
    holds the whole model, as when it was first loaded. All ranks must come here, and none may run a forward inside.
    """
    module, sharding = engine.module, engine.sharding
    sharding.release()  # parameters are looked up below, and gathered weights would be out of date
    sharded = dict(module.named_parameters())
    whole = {name: nn.Parameter(_whole(engine, name), parameter.requires_grad) for name, parameter in sharded.items()}
    replace_parameters(module, {id(sharded[name]): parameter for name, parameter in whole.items()})
    try:
        with without_load_hooks(module):
            yield module
    finally:
        replace_parameters(module, {id(parameter): sharded[name] for name, parameter in whole.items()})
    for name, parameter in whole.items():
        rows = local_rows(sharded[name])
        shard = parameter.detach()[rows.start : rows.stop] if parameter.ndim else parameter.detach()
        engine.write_weight(name, shard)
    sharding.flush()  # writes may still be on their way to the disk


def _whole(engine: Engine, name: str) -> Tensor:
    """A parameter whole, fp32, in memory of its own on the CPU; a collective where it is sharded."""
    parameter = engine.module.get_parameter(name)
    shard = engine.read_weight(name).to(parameter.device, torch.float32)
    return full_tensor(sharded_like(parameter, shard)).to("cpu", copy=True)
