"""Causal language models: the actor, the reference, and the model that SFT trains."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.model_folder import ModelFolder, local_folder
from rlhf.models.model_spec import ModelSpec, assemble, build_on_meta, decoder_config, with_dropout
from rlhf.models.weights import open_weights
from rlhf.runtime.errors import reading


def causal_lm(path: str | Path, *, dropout: float = 0.0, lora: LoraConfig | None = None, seed: int = 0) -> ModelSpec:
    """The language model at `path`: any decoder that transformers knows.

    Args:
        path: A folder, or a hub id.
        dropout: Every dropout probability of the model.
        lora: Adapters; None or rank 0 trains the whole model.
        seed: Seed of the adapters' initial values.

    Returns:
        A spec whose module is the plain `AutoModelForCausalLM`.

    Raises:
        ValueError: `path` is not a decoder with safetensors weights.
    """
    folder = local_folder(path)
    config = decoder_config(folder)
    files = ModelFolder(folder)
    module = causal_lm_module(with_dropout(config, dropout))
    module.generation_config = generation_config(folder) or module.generation_config
    config.architectures = [type(module).__name__]
    # An export writes the dropout that the folder had; the modules were built from a copy with the dropout asked for.
    config._attn_implementation = module.config._attn_implementation
    module.config = config
    return assemble(module, open_weights(module, files), config=config, new={}, lora=lora, seed=seed, dropout=dropout)


def generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config in `folder`, None if there is none; raises ValueError for a damaged file."""
    if not (folder / "generation_config.json").is_file():
        return None
    with reading(f"Model folder {folder}: transformers cannot read its `generation_config.json`:"):
        return GenerationConfig.from_pretrained(folder)


def causal_lm_module(config: PreTrainedConfig) -> PreTrainedModel:
    """A language model of this configuration, with its parameters on meta."""
    module = build_on_meta(AutoModelForCausalLM, config)
    head: nn.Module = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    head.register_forward_pre_hook(_in_one_piece)
    return module


def _in_one_piece(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Make the input of the head contiguous.

    `logits_to_keep` cuts a window out of the hidden states, and for such a window `nn.Linear` copies the whole head
    once for every sequence: 17 times the work for 64 sequences and 49,152 tokens on a CPU.
    """
    return (inputs[0].contiguous(),)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position of every token among the real ones, so that left and right padding give the same results.

    Args:
        attention_mask: `[B, T]`, True for real tokens.

    Returns:
        `[B, T]` int64; padding repeats the position before it, and has 0 before the first real token.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
