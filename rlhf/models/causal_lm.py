"""Causal language models: the actor, the reference, and the model that SFT trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from rlhf.algorithms.logprobs import TokenStatistics, Wanted, statistics_of_logits
from rlhf.config.engine_config import Attention
from rlhf.config.stage_configs import LoraConfig
from rlhf.models.language_head import HeadQuestion, make_answering
from rlhf.models.model_folder import ModelFolder, local_folder
from rlhf.models.model_spec import ModelSpec, assemble, build_on_meta, decoder_config, with_dropout
from rlhf.models.weights import open_weights
from rlhf.runtime.errors import reading

log = logging.getLogger(__name__)


def causal_lm(
    path: str | Path,
    *,
    dropout: float = 0.0,
    lora: LoraConfig | None = None,
    seed: int = 0,
    attention: Attention | None = None,
) -> ModelSpec:
    """The language model at `path`: any decoder that transformers knows.

    Args:
        path: A folder, or a hub id.
        dropout: Every dropout probability of the model.
        lora: Adapters; None or rank 0 trains the whole model.
        seed: Seed of the adapters' initial values.
        attention: Its implementation; None is transformers' choice.

    Returns:
        A spec whose module is the plain `AutoModelForCausalLM`.

    Raises:
        ValueError: `path` is not a decoder with safetensors weights.
    """
    folder = local_folder(path)
    config = decoder_config(folder)
    files = ModelFolder(folder)
    module = causal_lm_module(with_dropout(config, dropout), attention)
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


def causal_lm_module(config: PreTrainedConfig, attention: Attention | None = None) -> PreTrainedModel:
    """A language model of this configuration, with its parameters on meta; `attention` as in `causal_lm`."""
    module = build_on_meta(AutoModelForCausalLM, config, attention=attention)
    make_answering(module)
    return module


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position of every token among the real ones, so that left and right padding give the same results.

    Args:
        attention_mask: `[B, T]`, True for real tokens.

    Returns:
        `[B, T]` int64; padding repeats the position before it, and has 0 before the first real token.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def token_statistics(
    model: Callable[..., Any], input_ids: Tensor, *, attention_mask: Tensor, mask: Tensor, wanted: Wanted
) -> TokenStatistics:
    """Statistics, `[B, R]` each, of the last R tokens of every sequence under a language model.

    Args:
        model: Called with keywords, as a causal language model of transformers.
        input_ids: `[B, T]`, T > R.
        attention_mask: `[B, T]`, True for real tokens.
        mask: `[B, R]`, True where a token counts. What the others' statistics are is not defined.
        wanted: Which statistics, and what is differentiable: see `head_statistics`.
    """
    num_targets = mask.shape[1]
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids(attention_mask),
    }
    if num_targets + 1 < input_ids.shape[1]:  # the token before the first target predicts it
        inputs["logits_to_keep"] = num_targets + 1
    targets = input_ids[:, input_ids.shape[1] - num_targets :]
    question, random = HeadQuestion(targets, mask, wanted), _random_states(input_ids.device)
    with question.asked():
        output: Tensor = model(**inputs, use_cache=False).logits
    if question.head is not None and not question.is_answered_by(output):
        question.head.answers = False
        log.info(
            "%s changes logits after its head: its losses are computed from whole logits",
            type(question.head.model).__name__,
        )
        del question, output  # what the forward has kept
        _set_random_states(random, input_ids.device)  # dropout: the second forward is as if there had been no first
        return token_statistics(model, input_ids, attention_mask=attention_mask, mask=mask, wanted=wanted)
    if question.head is not None:
        logprobs, entropy, first_choice = output.unbind(-1)
        return TokenStatistics(logprobs, entropy if wanted.entropy_grad else entropy.detach(), first_choice.detach())
    return statistics_of_logits(output, targets, wanted=wanted)


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of the random number generators of the host and of a GPU; neither waits for it."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_states(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
