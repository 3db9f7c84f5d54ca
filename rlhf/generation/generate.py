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
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation.sampling import sample, uniforms
from rlhf.generation.slots import Slots, Step
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
    token_ids = [
        row[keep].tolist() for row, keep in zip(prompts.input_ids.cpu(), prompts.attention_mask.cpu(), strict=True)
    ]
    return answer(
        model,
        token_ids,
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
    outputs = _Outputs(sample_ids.to(model.device), decoding, seed=seed)
    slots = Slots(model, WaitingPrompts(token_ids), limit=limit, new=longest, pad_id=decoding.pad_id)
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
    return outputs.trimmed()


class _Outputs:
    """The tokens drawn so far, one column per position; a row after the last belongs to slots without a row."""

    def __init__(self, sample_ids: Tensor, decoding: Decoding, *, seed: int) -> None:
        self._decoding, self._count = decoding, len(sample_ids)
        shape, device = (self._count + 1, decoding.max_new_tokens), sample_ids.device
        self._draws = uniforms(seed, pad(sample_ids, (0, 1)), length=decoding.max_new_tokens)
        self._stops = torch.tensor(list(decoding.stop_token_ids), dtype=torch.long, device=device)
        self._responses = torch.full(shape, decoding.pad_id, device=device)
        self._mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self._logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
        self._ended = torch.zeros(shape[0], dtype=torch.bool, device=device)

    def draw(self, step: Step) -> tuple[Tensor, Tensor]:
        """Draw and keep the next token of K rows; returns them, and whether each row ends with it, `[K]`."""
        sampling, last = self._decoding.sampling, self._decoding.max_new_tokens - 1
        where = step.rows, step.counts.clamp(max=last)  # a slot without a row may count on
        drawn = sample(
            step.logits,
            self._draws[where],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        self._responses[where], self._logprobs[where], self._mask[where] = drawn.tokens, drawn.logprobs, True
        stopped = torch.isin(drawn.tokens, self._stops)
        self._ended[step.rows] = stopped
        return drawn.tokens, stopped | (step.counts >= last)

    def spoken(self, step: Step, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that are there and their tokens."""
        there = step.rows < self._count
        return step.rows[there], tokens[there]

    def trimmed(self) -> Generated:
        """The responses, cut after the longest one."""
        mask = self._mask[: self._count]
        longest = int(mask.sum(-1).max())
        return Generated(
            responses=self._responses[: self._count, :longest],
            response_mask=mask[:, :longest],
            logprobs=self._logprobs[: self._count, :longest],
            ended=self._ended[: self._count],
        )
