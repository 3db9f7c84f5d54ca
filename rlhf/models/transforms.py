"""Changes to a model of any family: fewer layers, other dropout, activation checkpointing.

The first two act on the configuration before anything is built, so that what is exported describes itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

_DROPOUT = re.compile(r"dropout|pdrop|drop_prob|layerdrop|jitter")


def with_dropout(config: PreTrainedConfig, probability: float) -> PreTrainedConfig:
    """A copy of `config` in which every dropout probability is `probability`.

    Dropping whole layers (OPT) is always off: ranks would disagree on which layers to gather.
    """
    changed = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        is_probability = isinstance(value, int | float) and not isinstance(value, bool)
        if is_probability and _DROPOUT.search(name):
            setattr(changed, name, 0.0 if "layerdrop" in name else probability)
    return changed


def first_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """A copy of `config` with its first `count` layers only; 0 keeps all.

    Raises:
        ValueError: The model has fewer layers.
    """
    total = config.num_hidden_layers
    if not 0 <= count <= total:
        raise ValueError(f"num_layers={count}: expected 0 (all) to {total}, the layers of this model.")
    shorter = copy.deepcopy(config)
    if count in (0, total):
        return shorter
    shorter.num_hidden_layers = count
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == total:
            setattr(shorter, name, value[:count])
    return shorter


def find_blocks(module: nn.Module, count: int) -> list[nn.Module]:
    """The `count` repeated transformer blocks of `module` in forward order: its outermost ModuleList of that length.

    Raises:
        ValueError: There is no such list.
    """
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return list(child)
    raise ValueError(f"{type(module).__name__}: found no list of {count} blocks; this architecture is not supported.")


def enable_activation_checkpointing(module: nn.Module, *, offload: bool = False) -> None:
    """Recompute every block in backward instead of keeping its activations; acts in training mode only.

    Args:
        module: a transformers model, or a module around one.
        offload: keep the blocks' inputs, all that is kept of them, in page-locked host memory (of a CUDA model).

    Raises:
        ValueError: The architecture has no such switch.
    """
    outermost = next((child for child in module.modules() if isinstance(child, PreTrainedModel)), None)
    if outermost is None or not outermost.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(module).__name__} cannot recompute activations; set engine.activation_checkpointing=false."
        )
    # The public switch also makes the embeddings require gradients, which would drag backward through frozen layers.
    recompute = partial(checkpoint, use_reentrant=False)
    outermost._set_gradient_checkpointing(True, partial(_inputs_on_host, recompute) if offload else recompute)


def _inputs_on_host(recompute: Callable[..., Any], block: Callable[..., Any], *args: Any) -> Any:
    """Inside `recompute` its own hooks are in charge, so only what it keeps for itself, the inputs, is moved."""
    with save_on_cpu(pin_memory=True):
        return recompute(block, *args)
