"""Decode a batch of prompts with a cache, on this rank alone.

The prompts are read once, then one token per row and forward. Rows that have ended leave the batch, so the cost follows
the rows that still speak; what a row says depends on its prompt and its `sample_id` only, not on who is in the batch.
Left out: beams, and the settings of `generation_config.json`, which would change the distribution behind PPO's back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation.kv_cache import cache_argument, kv_cache
from rlhf.generation.sampling import Drawn, sample, uniforms
from rlhf.types import PromptBatch

_LEAVE_AT = 8  # rows leave when one in so many has ended: each departure copies the cache of those who stay


@dataclass(frozen=True)
class Generated:
    """Responses to B prompts; R is the longest of them, so ranks may differ."""

    responses: Tensor  # [B, R] int64, right padded
    response_mask: Tensor  # [B, R] bool, True up to the stop token and including it
    logprobs: Tensor  # [B, R] fp32, of each token under softmax(logits / temperature); 0 where masked
    ended: Tensor  # [B] bool, True where the response ends with a stop token


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn, and where they end."""

    max_new_tokens: int
    """Where a response that has not ended is cut."""
    stop_token_ids: Sequence[int]
    """Any of these ends a response and belongs to it."""
    pad_id: int
    """Fills responses after their end."""
    sampling: SamplingConfig
    """Temperature, top-k and top-p."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    decoding: Decoding,
    seed: int,
    all_done: Callable[[bool], bool] = bool,
    hear: Callable[[Tensor, Tensor], bool] | None = None,
) -> Generated:
    """Answer every prompt once; several answers to a prompt are several rows.

    Args:
        model: A causal language model in eval mode, with whole parameters.
        prompts: B rows on the model's device, left padded.
        decoding: What is drawn, and where it ends.
        seed: With `sample_ids`, of every draw.
        all_done: From whether this rank is done to whether all are. Ranks that need each other in every forward of the
            model (where it is streamed, not gathered) then make equally many; by itself, a rank stops when it is done.
        hear: Told after every step which rows `[N]` have said which tokens `[N]`, stop tokens included; False ends
            everything there, which ranks that need each other must not do. None costs nothing.

    Returns:
        Responses, masks and log-probabilities, on the device of the prompts.
    """
    assert not model.training, "generation needs eval mode: training mode may drop out or refuse the cache"
    longest, sampling = decoding.max_new_tokens, decoding.sampling
    assert longest > 0, "a response has at least one token"
    stops = torch.tensor(list(decoding.stop_token_ids), dtype=torch.long, device=prompts.input_ids.device)
    draws = uniforms(seed, prompts.sample_ids, length=longest)
    speakers = _Speakers(model, prompts, max_new_tokens=longest)
    record = _Record(prompts, longest, pad_id=decoding.pad_id)
    for step in range(longest):
        drawn = sample(
            speakers.logits,
            draws[speakers.rows, step],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        stopped = torch.isin(drawn.tokens, stops)
        record.add(step, speakers, drawn=drawn, stopped=stopped)
        if hear is not None and not hear(speakers.rows[speakers.speaking], drawn.tokens[speakers.speaking]):
            break
        speakers.speaking &= ~stopped
        # The only wait for the device in a step.
        count = int(speakers.speaking.sum())
        if step + 1 == longest or all_done(count == 0):
            break
        speakers.say(drawn.tokens, leaving=0 < count * _LEAVE_AT <= len(stopped) * (_LEAVE_AT - 1))
    return record.trimmed()


class _Speakers:
    """The N rows in the batch: which they are, what they have seen, and what they might say next."""

    def __init__(self, model: PreTrainedModel, prompts: PromptBatch, *, max_new_tokens: int) -> None:
        # Without any masked token, transformers gives SDPA no mask, and for grouped queries that is slow on a CPU.
        slack = int(prompts.input_ids.device.type == "cpu" and bool(prompts.attention_mask.all()))
        input_ids = pad(prompts.input_ids, (slack, 0))
        mask = pad(prompts.attention_mask, (slack, 0), value=False)
        batch, self._width = input_ids.shape
        self.rows = torch.arange(batch, device=input_ids.device)  # [N] int64, their rows in the prompts
        self.speaking = torch.ones_like(self.rows, dtype=torch.bool)  # [N]; those who have ended leave later
        self._model = model
        self._cache = kv_cache(model.config, self._width + max_new_tokens)
        self._cache_argument = cache_argument(model)
        self._mask = pad(mask, (0, max_new_tokens), value=True)  # [N, P + max_new_tokens]
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        self._position = positions[:, -1:]  # [N, 1], of the last token read
        self.logits = self._read(input_ids, positions)  # [N, V]

    def say(self, tokens: Tensor, *, leaving: bool) -> None:
        """Read `tokens` `[N]`, the next of each row; with `leaving`, rows that have ended go first."""
        if leaving:
            tokens = tokens[self._leave()]
        self._width += 1
        self._position = self._position + 1
        self.logits = self._read(tokens[:, None], self._position)

    def _leave(self) -> Tensor:
        stay = self.speaking.nonzero().squeeze(-1)
        self.rows, self.speaking = self.rows[stay], self.speaking[stay]
        self._mask, self._position = self._mask[stay], self._position[stay]
        self._cache.batch_select_indices(stay)
        return stay

    def _read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=tokens,
            attention_mask=self._mask[:, : self._width],
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._cache},
        )
        return output.logits[:, -1]


class _Record:
    """What has been said, one column per step."""

    def __init__(self, prompts: PromptBatch, max_new_tokens: int, *, pad_id: int) -> None:
        shape = (len(prompts.input_ids), max_new_tokens)
        self._responses = prompts.input_ids.new_full(shape, pad_id)
        self._mask = torch.zeros_like(self._responses, dtype=torch.bool)
        self._logprobs = torch.zeros_like(self._responses, dtype=torch.float32)
        self._ended = self._mask[:, 0].clone()
        self._pad_id = pad_id

    def add(self, step: int, speakers: _Speakers, *, drawn: Drawn, stopped: Tensor) -> None:
        """Write the tokens of the rows that had not ended before."""
        rows, counts = speakers.rows, speakers.speaking
        self._responses[rows, step] = drawn.tokens.where(counts, self._pad_id)
        self._logprobs[rows, step] = drawn.logprobs.where(counts, 0.0)
        self._mask[rows, step] = counts
        self._ended[rows] |= stopped

    def trimmed(self) -> Generated:
        """Everything, up to the longest response."""
        longest = int(self._mask.sum(-1).max())
        return Generated(
            responses=self._responses[:, :longest],
            response_mask=self._mask[:, :longest],
            logprobs=self._logprobs[:, :longest],
            ended=self._ended,
        )
