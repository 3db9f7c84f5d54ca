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
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.engine import Engine, build_engine
from rlhf.engine.fsdp_private import unwrap, without_load_hooks
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
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError(
            "parts of the model are sharded already, by a Trainer that trained them as another model; expected a whole "
            "one. Save that model with its trainer.save_model, and load it again."
        )
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
    _adapt_statistics(engine)
    return engine


def unshard_module(engine: Engine) -> None:
    """Undo `shard_module` and close the engine; the module then has whole fp32 parameters on the CPU.

    All ranks must call, and each of them then holds the whole model.
    """
    _replace_by_whole(engine)
    for wrapped in engine.sharding.modules:
        unwrap(wrapped)
    engine.close()


def _adapt_statistics(engine: Engine) -> None:
    """Give statistics of batch norms the type of their weights, and train with the first rank's, as DDP does."""
    module = engine.module
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    for norm in norms:
        for name, buffer in norm.named_buffers(recurse=False):
            # PyTorch's kernels want them alike. Other buffers keep their type: rotary frequencies need fp32.
            setattr(norm, name, buffer.to(engine.dtype) if buffer.is_floating_point() else buffer)

    def share(*_: Any) -> None:
        for norm in norms if module.training else ():
            for buffer in norm.buffers():
                copy_from_first(buffer)

    if norms and engine.world.size > 1:
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
    Nothing is written back where an exception was raised inside.
    """
    module, sharding = engine.module, engine.sharding
    if engine.is_whole:  # `load_state_dict` inside of a longer loading
        yield module
        return
    sharded = _replace_by_whole(engine)
    whole = dict(module.named_parameters())
    engine.is_whole = True
    try:
        with without_load_hooks(module):
            yield module
    finally:
        engine.is_whole = False
        replace_parameters(module, {id(parameter): sharded[name] for name, parameter in whole.items()})
    for name, parameter in whole.items():
        rows = local_rows(sharded[name])
        shard = parameter.detach()[rows.start : rows.stop] if parameter.ndim else parameter.detach()
        engine.write_weight(name, shard)
    sharding.flush()  # writes may still be on their way to the disk


def _replace_by_whole(engine: Engine) -> dict[str, nn.Parameter]:
    """Give the module whole fp32 parameters on the CPU; returns those it had, by name."""
    module = engine.module
    engine.sharding.release()  # parameters are looked up below, and gathered weights would be out of date
    had = dict(module.named_parameters())
    whole = {id(old): nn.Parameter(_whole(engine, name), old.requires_grad) for name, old in had.items()}
    replace_parameters(module, whole)
    return had


def _whole(engine: Engine, name: str) -> Tensor:
    """A parameter whole, fp32, in memory of its own on the CPU; a collective where it is sharded."""
    parameter = engine.module.get_parameter(name)
    shard = engine.read_weight(name).to(parameter.device, torch.float32)
    return full_tensor(sharded_like(parameter, shard)).to("cpu", copy=True)
