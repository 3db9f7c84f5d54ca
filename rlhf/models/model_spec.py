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
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from rlhf.config.engine_config import Attention
from rlhf.config.stage_configs import LoraConfig
from rlhf.models.cpu_attention import speed_up_attention
from rlhf.models.lora import inject
from rlhf.models.weights import NewParameter, SeededWeights, Weights
from rlhf.runtime.errors import load_auto, reading

_DROPOUT = re.compile(r"dropout|pdrop|drop_prob|drop_rate|layerdrop|jitter")


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
    found_dropout: dict[str, float] = field(default_factory=dict)
    """Dropout probabilities above 0 of the model's folder and code, by name; the module has others."""

    @property
    def frozen_blocks(self) -> list[nn.Module]:
        """The blocks below the first one that learns; none where something before them may learn too."""
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        outside = [name for name, p in self.module.named_parameters() if p.requires_grad and id(p) not in inside]
        if any(not name.startswith("score.") for name in outside):  # that head follows the blocks
            return []
        return list(takewhile(lambda block: not any(p.requires_grad for p in block.parameters()), self.blocks))

    def reads_alone(self, part: nn.Module) -> bool:
        """Whether nothing but the forward of `part`, which is outside the blocks, reads its parameters."""
        return True  # of decoders, whose tied matrices are found by themselves


def assemble(
    module: nn.Module,
    weights: Weights,
    *,
    config: PreTrainedConfig,
    new: Mapping[str, NewParameter],
    lora: LoraConfig | None,
    seed: int,
    dropout: float = 0.0,
) -> ModelSpec:
    """Join modules on meta and their weights, with adapters if `lora` asks for them.

    Args:
        module: Parameters on meta.
        weights: Their values, except for those in `new`.
        config: The configuration that an export writes.
        new: Parameters that start from random numbers of `seed`; they learn even if the rest is frozen.
        lora: Adapters; None or rank 0 trains every parameter.
        seed: Seed of every new parameter.
        dropout: Every dropout probability outside the adapters; `with_dropout` has set those in the configuration.
    """
    found = {name: value for name, value in dropout_settings(config).items() if value} | set_dropout(module, dropout)
    blocks = find_blocks(module, config.num_hidden_layers)
    trainable = {name for name, _ in module.named_parameters()}
    if lora is not None and lora.rank > 0:
        adapters = inject(module, lora, blocks=blocks)
        new = {**new, **adapters}
        trainable = set(adapters) | {name for name in trainable if name.startswith("score.")}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)
    return ModelSpec(module, SeededWeights(weights, new, seed=seed), blocks, trainable, config, found)


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


def dropout_settings(config: PreTrainedConfig) -> dict[str, float]:
    """The dropout probabilities of a configuration and of those inside it, by dotted name."""
    found: dict[str, float] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            inner = dropout_settings(value)  # MPT's takes whole numbers alone, so that it can be nothing but 0
            found |= {f"{name}.{key}": number for key, number in inner.items() if isinstance(number, float)}
        elif isinstance(value, int | float) and not isinstance(value, bool) and _DROPOUT.search(name):
            found[name] = value
    return found


def with_dropout(config: PreTrainedConfig, probability: float) -> PreTrainedConfig:
    """A copy of `config` in which every dropout probability is `probability`.

    Dropping whole layers (OPT) is always off: ranks would disagree on which layers to gather.
    """
    changed = copy.deepcopy(config)
    for name in dropout_settings(config):
        outer, _, last = name.rpartition(".")
        owner = attrgetter(outer)(changed) if outer else changed
        setattr(owner, last, 0.0 if "layerdrop" in last else probability)
    return changed


def set_dropout(module: nn.Module, probability: float) -> dict[str, float]:
    """Set what `with_dropout` did not reach in a model that is built, such as numbers that its code has of its own.

    These are the probabilities of dropout modules, and the attributes that functional dropout is called with.

    Returns:
        What was found, by dotted name; empty where the settings had reached everything.
    """
    found: dict[str, float] = {}
    for name, part in module.named_modules():
        for key, value in list(vars(part).items()):
            named = _DROPOUT.search(key) or (key == "p" and isinstance(part, _DropoutNd))
            if named and isinstance(value, float) and value not in (0.0, probability):
                setattr(part, key, probability)
                found[f"{name}.{key}"] = value
    return found


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


def build_on_meta(
    auto_class: type[_BaseAutoModelClass], config: PreTrainedConfig, *, attention: Attention | None = None
) -> PreTrainedModel:
    """The model that `auto_class` makes from `config`, with fp32 meta parameters and real buffers.

    Args:
        auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
        config: Copied.
        attention: None is SDPA, or eager for a model that SDPA cannot serve (Gemma 2 caps its logits).

    Raises:
        ValueError: transformers cannot make a model from its numbers.
    """
    speed_up_attention()
    attention = attention or (Attention.eager if caps_scores(config) else None)
    complaint = f"Model folder {config.name_or_path}: transformers cannot make the model of its `config.json`:"
    with reading(complaint), init_empty_weights(include_buffers=False):
        module: PreTrainedModel = auto_class.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False, attn_implementation=attention
        )
    # Moving parameters to meta one by one parts those that are tied.
    module.tie_weights()
    for child in module.modules():
        if isinstance(child, nn.Embedding):
            # It would keep the pad token from learning, which in many models is the EOS.
            child.padding_idx = None
    return module


def caps_scores(config: PreTrainedConfig) -> bool:
    """Whether a model caps its attention scores, which SDPA does not do: some versions of transformers let it."""
    return getattr(config, "attn_logit_softcapping", None) is not None


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
