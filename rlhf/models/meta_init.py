"""Models before they have memory: `ModelSpec`, and the modules of a decoder built on the meta device.

Every parameter is on meta and every buffer is real, so a model of any size costs no memory until the engine gives it
some, sharded or not. `causal_lm.py` and `scalar_head.py` make the specs. Left out: devices, types and ranks.
See also: `weights.py` for the values, `lora.py` for adapters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.lora import inject
from rlhf.models.transforms import find_blocks
from rlhf.models.weights import NewParameter, SeededWeights, Weights
from rlhf.runtime.errors import load_auto, reading


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
    """The configuration that an export writes."""


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


def max_positions(config: PreTrainedConfig) -> int:
    """The longest sequence that a decoder was made for."""
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _complaint(config: PreTrainedConfig) -> str:
    if config.is_encoder_decoder:
        return "an encoder with a decoder, not a decoder. Expected a causal language model."
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) not in AutoModelForCausalLM._model_mapping:
        return "not a decoder. Expected a causal language model such as Llama, Qwen, Mistral, Gemma, GPT-2 or OPT."
    if config.get_text_config(decoder=True) is not config:
        return "reads more than text. Expected a model for text alone; save the language part of it as a folder first."
    if "quantization_config" in config.to_dict():
        return "its weights are quantised and cannot be trained. Expected fp32, fp16 or bf16 weights."
    return ""


def build_on_meta(auto_class: type[_BaseAutoModelClass], config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `auto_class` makes of `config`, with fp32 meta parameters and real buffers.

    Args:
        auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
        config: Copied. Attention is SDPA, or eager for a model that SDPA cannot serve (Gemma 2 caps its logits).

    Raises:
        ValueError: its numbers do not make a model.
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
        weights: Their values, but for those in `new`.
        config: What an export writes.
        new: Parameters that start from random numbers of `seed`; they learn even when the rest is frozen.
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
    return ModelSpec(
        module=module,
        weights=SeededWeights(weights, new, seed=seed),
        blocks=blocks,
        trainable=trainable,
        config=config,
    )
