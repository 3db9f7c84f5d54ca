"""What a sharded model does otherwise for those who hold it: it generates, is saved and forgets gradients as a whole.

The methods are replaced on the object alone, so its class stays what it is.
"""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

from rlhf.engine import hybrid
from rlhf.engine.engine import Engine
from rlhf.engine.fsdp_units import local_shard
from rlhf.engine.in_memory import full_state_dict
from rlhf.hf_trainer.zero_optimizer import ZeroOptimizer


def attach(engine: Engine, *, streams: bool) -> None:
    """Replace `generate` and `save_pretrained` of the engine's module, where it has them.

    Args:
        engine: of the module.
        streams: whether weights are offloaded, so that they are never gathered all at once.
    """
    module: Any = engine.module
    if hasattr(module, "generate"):
        module.generate = _Generate(engine, module.generate, streams=streams)
    if hasattr(module, "save_pretrained"):
        module.save_pretrained = _SavePretrained(engine, module.save_pretrained)


def forget_gradients_of(optimizer: ZeroOptimizer) -> None:
    """Let `zero_grad` of the model, which the Trainer calls, reach the gradients."""
    optimizer.engine.module.zero_grad = optimizer.zero_grad  # type: ignore[method-assign]


class _Generate:
    """`model.generate`, with the weights gathered once; all ranks must call it equally often."""

    def __init__(self, engine: Engine, original: Any, *, streams: bool) -> None:
        self._engine, self._original, self._streams = engine, original, streams
        update_wrapper(self, original)  # its signature stays known

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._engine
        if self._streams and engine.world.size > 1:
            kwargs["synced_gpus"] = True  # every forward gathers: no rank may stop before the others
        with hybrid.generating(engine.module, engine.sharding, streamed=self._streams):
            return self._original(*args, **kwargs)


class _SavePretrained:
    """`model.save_pretrained`, whose first rank writes whole weights; all ranks must call it."""

    def __init__(self, engine: Engine, original: Any) -> None:
        self._engine, self._original = engine, original
        update_wrapper(self, original)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            is_main = self._engine.world.is_main
            kwargs["state_dict"] = full_state_dict(self._engine, keep=is_main)  # collectives
            if not is_main:
                return None
        elif any(local_shard(value).shape != value.shape for value in kwargs["state_dict"].values()):
            raise ValueError(
                "save_pretrained: the state_dict has shards, as `model.state_dict()` returns them; expected whole "
                "tensors. Leave state_dict out and call it on all ranks, or use trainer.save_model."
            )
        return self._original(save_directory, *args, **kwargs)
