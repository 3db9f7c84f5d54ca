"""What a sharded model does otherwise for those who hold it: it generates, is saved, read and set as a whole.

The methods are replaced on the object alone, so its class stays what it is. All ranks must call them equally often.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import update_wrapper
from typing import Any

from torch import Tensor

from rlhf.engine import hybrid
from rlhf.engine.engine import Engine
from rlhf.engine.fsdp_units import local_shard
from rlhf.engine.in_memory import full_state_dict, unshard_module, whole_parameters
from rlhf.hf_trainer.zero_optimizer import ZeroOptimizer


def attach(engine: Engine, *, streams: bool) -> None:
    """Replace the methods of the engine's module that need whole weights, where it has them.

    Args:
        engine: of the module.
        streams: whether weights are offloaded, so that they are never gathered all at once.
    """
    module: Any = engine.module
    module.state_dict = _StateDict(engine, module.state_dict)
    module.load_state_dict = _LoadStateDict(engine, module.load_state_dict)
    if hasattr(module, "generate"):
        module.generate = _Generate(engine, module.generate, streams=streams)
    if hasattr(module, "save_pretrained"):
        module.save_pretrained = _SavePretrained(engine, module.save_pretrained)
    if hasattr(module, "merge_and_unload"):
        module.merge_and_unload = _MergeAndUnload(engine, module.merge_and_unload)
    module._is_accelerate_prepared = True  # Accelerate must neither move the model nor wrap it in DDP


def forget_gradients_of(optimizer: ZeroOptimizer) -> None:
    """Let `zero_grad` of the model, which the Trainer calls, reach the gradients."""
    module: Any = optimizer.engine.module
    module.zero_grad = _ZeroGrad(optimizer, module.zero_grad)


def engine_of(module: Any) -> Engine | None:
    """The engine that `attach` was called with for this module."""
    method = vars(module).get("state_dict") if module is not None else None
    return method.engine if isinstance(method, _Method) else None


def detach(engine: Engine) -> None:
    """Make the module what it was, with whole parameters of its own, and close the engine; all ranks must call."""
    module: Any = engine.module
    for name, method in [item for item in vars(module).items() if isinstance(item[1], _Method)]:
        delattr(module, name)
        if getattr(module, name) != method.original:  # a method that somebody else has put on the object
            setattr(module, name, method.original)
    del module._is_accelerate_prepared
    unshard_module(engine)


class _Method:
    """A method of a module that does something else. Copies of the module have the original one."""

    def __init__(self, engine: Engine, original: Any) -> None:
        self.engine, self.original = engine, original
        mine: Any = self
        update_wrapper(mine, original)  # its signature stays known

    def __reduce__(self) -> Any:
        return self.original.__reduce__()


class _Generate(_Method):
    """`model.generate`, with the weights gathered once, or, streamed, in every forward."""

    def __init__(self, engine: Engine, original: Any, *, streams: bool) -> None:
        super().__init__(engine, original)
        self._streams = streams

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine = self.engine
        if self._streams and engine.world.size > 1:
            kwargs["synced_gpus"] = True  # every forward gathers: no rank may stop before the others
        with hybrid.generating(engine.module, engine.sharding, streamed=self._streams):
            return self.original(*args, **kwargs)


class _StateDict(_Method):
    """`model.state_dict`, whole, on the CPU and in the working type, on every rank."""

    def __call__(
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        if keep_vars:  # the parameters themselves are asked for, which are shards
            found: dict[str, Any] = self.original(destination=destination, prefix=prefix, keep_vars=True)
            return found
        whole = full_state_dict(self.engine, keep=True)
        destination = OrderedDict() if destination is None else destination  # of a module that has this one inside
        destination |= {f"{prefix}{key}": value for key, value in whole.items()}
        return destination


class _LoadStateDict(_Method):
    """`model.load_state_dict` of whole tensors, which also sets what the optimizer updates."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with whole_parameters(self.engine):
            return self.original(*args, **kwargs)


class _SavePretrained(_Method):
    """`model.save_pretrained`, whose first rank writes whole weights."""

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            is_main = self.engine.world.is_main
            kwargs["state_dict"] = full_state_dict(self.engine, keep=is_main)  # collectives
            if not is_main:
                return None
        elif any(_is_shard(value) for value in kwargs["state_dict"].values()):
            raise ValueError(
                "save_pretrained: the state_dict has shards, as `model.named_parameters()` gives them; expected whole "
                "tensors. Take them from `model.state_dict()` on all ranks, leave state_dict out, or use "
                "trainer.save_model."
            )
        return self.original(save_directory, *args, **kwargs)


class _MergeAndUnload(_Method):
    """`model.merge_and_unload` of adapters, which makes another model: it is whole and on the CPU, on every rank."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        detach(self.engine)
        self.engine.module.to(self.engine.dtype)  # as the model was
        return self.original(*args, **kwargs)


class _ZeroGrad(_Method):
    """`model.zero_grad`, which reaches gradients where the engine keeps them."""

    def __init__(self, optimizer: ZeroOptimizer, original: Any) -> None:
        super().__init__(optimizer.engine, original)
        self._optimizer = optimizer

    def __call__(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad()


def _is_shard(value: Any) -> bool:
    return isinstance(value, Tensor) and local_shard(value).shape != value.shape
