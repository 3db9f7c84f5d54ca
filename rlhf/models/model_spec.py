"""`ModelSpec`, a model before it has memory, and what decoders of every family share on the way there.

Modules are built on the meta device: buffers are real, parameters take no memory until the engine gives them some,
sharded or not. Fewer layers or another dropout are changes to the configuration before anything is built, so that an
export describes itself. Left out: devices, types and ranks.
See also: `causal_lm.py` and `scalar_head.py`, which make the specs.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.lora import inject
from rlhf.models.weights import NewParameter, SeededWeights, Weights
from rlhf.runtime.errors import load_auto, reading

_DROPOUT = re.compile(r"dropout|pdrop|drop_prob|layerdrop|jitter")


@dataclass
class ModelSpec:
    """A model that can run once its parameters are filled from `weights`."""

    module: nn.Module
    """Every parameter on meta, every buffer real."""
    weights: Weights
    """Covers each name of `module.named_parameters()`."""
    blocks: list[nn.Module]
    """The repeated transformer blocks in forward order: each is sharded, and recomputed, as one."""
    trainable: set[str]
    """Names of the parameters that learn; `requires_grad` agrees."""
    config: PreTrainedConfig
    """The configuration that an export writes."""


def assemble(
    module: nn.Module,
    weights: Weights,
    *,
    config: PreTrainedConfig,
    new: Mapping[str, NewParameter],
    lora: LoraConfig | None,
    seed: int,
) -> ModelSpec:
    """Join modules on meta and their weights, with adapters if `lora` asks for them.

    Args:
        module: Parameters on meta.
        weights: Their values, except for those in `new`.
        config: The configuration that an export writes.
        new: Parameters that start from random numbers of `seed`; they learn even if the rest is frozen.
        lora: Adapters; None or rank 0 trains every parameter.
        seed: Seed of every new parameter.
    """
    blocks = find_blocks(module, config.num_hidden_layers)
    trainable = {name for name, _ in module.named_parameters()}
    if lora is not None and lora.rank > 0:
        adapters = inject(module, lora, blocks=blocks)
        new = {**new, **adapters}
        trainable = set(adapters) | {name for name in trainable if name.startswith("score.")}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    return ModelSpec(module, SeededWeights(weights, new, seed=seed), blocks, trainable, config)


def decoder_config(folder: Path) -> PreTrainedConfig:
    """The configuration in `folder`, which must describe a decoder of text with plain weights.

    Raises:
        ValueError: It does not, or there is no `config.json`, or it needs code from outside transformers.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"Model folder {folder} is no model: it has no `config.json`.")
    config: PreTrainedConfig = load_auto(
        AutoConfig, folder, complaint=f"Model folder {folder}: transformers cannot read its `config.json`:"
    )
    complaint = _complaint(config)
    if complaint:
        raise ValueError(f"Model folder {folder} ({config.model_type}): {complaint}")
    return config


def _complaint(config: PreTrainedConfig) -> str:
    """Why a model of this configuration cannot be used; empty if it can."""
    if config.is_encoder_decoder:
        return "an encoder with a decoder, not a decoder. Expected a causal language model."
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) not in AutoModelForCausalLM._model_mapping:
        return "not a decoder. Expected a causal language model such as Llama, Qwen, Mistral, Gemma, GPT-2 or OPT."
    if config.get_text_config(decoder=True) is not config:
        return "reads more than text. Expected a model for text alone; save the language part of it as a folder first."
    if "quantization_config" in config.to_dict():
        return "its weights are quantised and cannot be trained. Expected fp32, fp16 or bf16 weights."
    return ""


def max_positions(config: PreTrainedConfig) -> int:
    """The longest sequence that a decoder was made for."""
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


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
    """A copy of `config` with only its first `count` layers; 0 keeps all.

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


def build_on_meta(auto_class: type[_BaseAutoModelClass], config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `auto_class` makes from `config`, with fp32 meta parameters and real buffers.

    Args:
        auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
        config: Copied. Attention is SDPA, or eager for a model that SDPA cannot serve (Gemma 2 caps its logits).

    Raises:
        ValueError: transformers cannot make a model from its numbers.
    """
    complaint = f"Model folder {config.name_or_path}: transformers cannot make the model of its `config.json`:"
    with reading(complaint), init_empty_weights(include_buffers=False):
        module: PreTrainedModel = auto_class.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
    # Moving parameters to meta one by one parts those that are tied.
    module.tie_weights()
    for child in module.modules():
        if isinstance(child, nn.Embedding):
            # It would keep the pad token from learning, which in many models is the EOS.
            child.padding_idx = None
    return module


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
        module: A transformers model, or a module around one.
        offload: Keep the inputs of blocks, all that is kept then, in page-locked host memory (CUDA only).

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
    """Run `block` with recomputation; the inputs that it saves are copied to the host and back."""
    # Inside `recompute` its own hooks are in charge, so only what it keeps for itself, the inputs, is moved.
    with save_on_cpu(pin_memory=True):
        return recompute(block, *args)
