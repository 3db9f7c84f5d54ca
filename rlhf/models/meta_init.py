"""The configuration of a decoder, and its modules before they have memory.

A skeleton has every parameter on the meta device and every buffer real, so it costs no memory at any size and needs
only its weights to be usable. Left out: the weights (`weights.py`), adapters (`lora.py`).
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from rlhf.runtime.errors import load_auto, reading


def decoder_config(folder: Path) -> PreTrainedConfig:
    """The configuration in `folder`, which must describe a decoder of text with plain weights.

    Raises:
        ValueError: It does not, or there is no `config.json`, or it needs code from outside transformers.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"Model folder {folder} is no model: it has no `config.json`.")
    config = load_auto(
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


def skeleton(auto_class: type, config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `auto_class` makes of `config`, with fp32 meta parameters and real buffers.

    Args:
        auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
        config: Copied. Attention is SDPA, or eager for a model that SDPA cannot serve (Gemma 2 caps its logits).

    Raises:
        ValueError: its numbers do not make a model.
    """
    complaint = f"Model folder {config.name_or_path}: transformers cannot make the model of its `config.json`:"
    with reading(complaint), init_empty_weights(include_buffers=False):
        module = auto_class.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
    # Moving parameters to meta one by one parts those that are tied.
    module.tie_weights()
    for child in module.modules():
        if isinstance(child, nn.Embedding):
            # It would keep the pad token from learning, which in many models is the EOS.
            child.padding_idx = None
    return module
