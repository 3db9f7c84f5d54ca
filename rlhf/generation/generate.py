"""Decodes a queue of prompts with a KV cache, on one rank.

One forward reads some prompts, then each forward reads one token per slot. A row that has ended makes room for a
waiting prompt, so the cost follows the tokens that are needed, however unequal responses are (continuous batching, Yu
et al. 2022, "Orca"). A response depends on its prompt and `sample_id` only, not on what else is decoded.
Left out: beams, and the settings of `generation_config.json`, which would change the distribution without PPO knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation.decode_graphs import DecodeGraphs
from rlhf.generation.outputs import Outputs
from rlhf.generation.slots import Slots
from rlhf.generation.waiting import WaitingPrompts
from rlhf.types import PromptBatch


@dataclass(frozen=True)
class Generated:
    """Responses to B prompts; R is the longest of them, so ranks may differ."""

    responses: Tensor  # [B, R] int64, right padded
    response_mask: Tensor  # [B, R] bool, True up to the stop token and including it
    logprobs: Tensor  # [B, R] fp32, of each token under softmax(logits / temperature); 0 where masked
    ended: Tensor  # [B] bool, True where the response ends with a stop token


@dataclass(frozen=True)
class Decoding:
    """Sampling and length of responses."""

    max_new_tokens: int
    """Longest response, in tokens."""
    stop_token_ids: Sequence[int]
    """Any of these ends a response and belongs to it."""
    pad_id: int
    """Fills responses after their end."""
    sampling: SamplingConfig
    """Temperature, top-k and top-p."""
    slots: int | None = None
    """Rows that are decoded at once, for memory, not results; None takes all."""
    graphs: DecodeGraphs | None = None
    """Keeps the decode steps captured so far; None decodes eagerly, and so does a call with `on_tokens`."""


def generate(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    decoding: Decoding,
    seed: int,
    all_done: Callable[[bool], bool] = bool,
    on_tokens: Callable[[Tensor, Tensor], bool] | None = None,
) -> Generated:
    """Answer every prompt once; several answers to a prompt are several rows, and the prompt is read once.

    Args:
        model: A causal language model in eval mode, with whole parameters.
        prompts: B rows, left padded; all of them wait for `decoding.slots`.
        decoding: How tokens are drawn, and where a response ends.
        seed: Together with `sample_ids`, determines every draw.
        all_done: Takes whether this rank is done and returns whether all are. Ranks whose forwards have collectives
            (parameters streamed, not gathered) then run equally many; by default a rank stops when it is done itself.
        on_tokens: Called after every step with the rows that spoke `[N]` and their tokens `[N]`, stop tokens included.
            Return False to stop decoding; do not when ranks decode in lockstep. None costs nothing.

    Returns:
        Responses, masks and log-probabilities, on the device of the model.
    """
    return answer(
        model,
        prompts.token_ids(),
        sample_ids=prompts.sample_ids,
        decoding=decoding,
        seed=seed,
        all_done=all_done,
        on_tokens=on_tokens,
    )


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    token_ids: Sequence[Sequence[int]],
    *,
    sample_ids: Tensor,
    decoding: Decoding,
    seed: int,
    all_done: Callable[[bool], bool] = bool,
    on_tokens: Callable[[Tensor, Tensor], bool] | None = None,
) -> Generated:
    """`generate` for B lists of tokens, with `sample_ids` `[B]`."""
    assert not model.training, "generation needs eval mode: training mode may drop out or refuse the cache"
    longest, limit = decoding.max_new_tokens, decoding.slots or len(token_ids)
    assert longest > 0, "a response has at least one token"
    outputs = Outputs(
        len(token_ids),
        length=longest,
        pad_id=decoding.pad_id,
        stops=decoding.stop_token_ids,
        sampling=decoding.sampling,
        device=model.device,
    )
    waiting, fixed = WaitingPrompts(token_ids), None
    if decoding.graphs is not None and on_tokens is None:
        fixed = decoding.graphs.slots(model, waiting, outputs=outputs, limit=limit)
    slots = fixed or Slots(model, waiting, limit=limit, new=longest, pad_id=decoding.pad_id)
    outputs = fixed.outputs if fixed else outputs
    outputs.restart(sample_ids, seed=seed)
    while True:  # in every turn one forward, whatever it is of: ranks in lockstep must make equally many
        step = slots.step()
        if step is None:
            slots.idle()
        else:
            tokens, ended = outputs.draw(step)
            if on_tokens is not None and not on_tokens(*outputs.spoken(step, tokens)):
                break
            slots.accept(tokens, ended)
        if all_done(slots.is_done):
            break
    return _trimmed(outputs)


def _trimmed(outputs: Outputs) -> Generated:
    """The responses, cut after the longest one, in memory of their own."""
    mask = outputs.mask[: outputs.count]
    longest = int(mask.sum(-1).max())
    return Generated(
        responses=outputs.responses[: outputs.count, :longest].clone(),
        response_mask=mask[:, :longest].clone(),
        logprobs=outputs.logprobs[: outputs.count, :longest].clone(),
        ended=outputs.ended[: outputs.count].clone(),
    )
