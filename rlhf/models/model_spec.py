"""A model before it has memory: modules, where their values come from, and which of them learn.

`causal_lm.py` and `scalar_head.py` make specs; the engine gives them memory, sharded or not. Left out: devices,
types and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from rlhf.config.model_config import LoraConfig
from rlhf.models.lora import inject
from rlhf.models.transforms import find_blocks
from rlhf.models.weights import NewParameter, SeededWeights, Weights


@dataclass
class ModelSpec:
    """A model that needs only `weights` to be run."""

    module: nn.Module
    """Every parameter on meta, every buffer real."""
    weights: Weights
    """Covers each name of `module.named_parameters()`."""
    blocks: list[nn.Module]
    """The repeated transformer blocks in forward order: what is sharded, and recomputed, as one."""
    trainable: set[str]
    """Names of the parameters that learn; `requires_grad` agrees."""
    config: PreTrainedConfig
    """What an export writes."""


def assemble(
    module: nn.Module,
    weights: Weights,
    *,
    config: PreTrainedConfig,
    new: Mapping[str, NewParameter],
    lora: LoraConfig | None,
    seed: int,
) -> ModelSpec:
    """Join a skeleton and its weights, with adapters if `lora` asks for them.

    Args:
        module: Parameters on meta.
        weights: Their values, but for those in `new`.
        config: What an export writes.
        new: Parameters that start from random numbers of `seed`; they learn even when the rest is frozen.
        lora: Adapters; None or rank 0 trains every parameter.
        seed: Of every new parameter.
    """
    blocks = find_blocks(module, config.num_hidden_layers)
    trainable = {name for name, _ in module.named_parameters()}
    if lora is not None and lora.rank > 0:
        adapters = inject(module, lora, blocks=blocks)
        new = {**new, **adapters}
        trainable = set(adapters) | {name for name in trainable if name.startswith("score.")}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    return ModelSpec(
        module=module,
        weights=SeededWeights(weights, new, seed=seed),
        blocks=blocks,
        trainable=trainable,
        config=config,
    )
