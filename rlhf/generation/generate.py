"""Decodes a batch of prompts with a KV cache, on one rank.

One forward reads the prompts, then each forward reads one token per row. Rows that have ended leave the batch, so the
cost follows the active rows. A response depends on its prompt and `sample_id` only, not on the rest of the batch.
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
from rlhf.generation.kv_cache import cache_argument, kv_cache
from rlhf.generation.sampling import Drawn, sample, uniforms
from rlhf.types import PromptBatch

_DROP_AT = 8  # drop ended rows once they are one in eight: each time, the cache of the remaining rows is copied


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


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    decoding: Decoding,
    seed: int,
    all_done: Callable[[bool], bool] = bool,
    on_tokens: Callable[[Tensor, Tensor], bool] | None = None,
) -> Generated:
    """Answer every prompt once; several answers to a prompt are several rows.

    Args:
        model: A causal language model in eval mode, with whole parameters.
        prompts: B rows on the model's device, left padded.
        decoding: How tokens are drawn, and where a response ends.
        seed: Together with `sample_ids`, determines every draw.
        all_done: Takes whether this rank is done and returns whether all are. Ranks whose forwards have collectives
            (parameters streamed, not gathered) then run equally many; by default a rank stops when it is done itself.
        on_tokens: Called after every step with the active rows `[N]` and their new tokens `[N]`, stop tokens included.
            Return False to stop decoding; do not when ranks decode in lockstep. None costs nothing.

    Returns:
        Responses, masks and log-probabilities, on the device of the prompts.
    """
    assert not model.training, "generation needs eval mode: training mode may drop out or refuse the cache"
    longest, sampling = decoding.max_new_tokens, decoding.sampling
    assert longest > 0, "a response has at least one token"
    stops = torch.tensor(list(decoding.stop_token_ids), dtype=torch.long, device=prompts.input_ids.device)
    draws = uniforms(seed, prompts.sample_ids, length=longest)
    active_rows = _ActiveRows(model, prompts, max_new_tokens=longest)
    outputs = _Outputs(prompts, longest, pad_id=decoding.pad_id)
    for step in range(longest):
        drawn = sample(
            active_rows.logits,
            draws[active_rows.rows, step],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        stopped = torch.isin(drawn.tokens, stops)
        outputs.add(step, active_rows, drawn=drawn, stopped=stopped)
        active = active_rows.active
        if on_tokens is not None and not on_tokens(active_rows.rows[active], drawn.tokens[active]):
            break
        active_rows.active &= ~stopped
        # The only wait for the device in a step (`on_tokens` may add its own).
        count = int(active_rows.active.sum())
        if step + 1 == longest or all_done(count == 0):
            break
        active_rows.advance(drawn.tokens, drop_ended=0 < count * _DROP_AT <= len(stopped) * (_DROP_AT - 1))
    return outputs.trimmed()


class _ActiveRows:
    """The N rows still in the batch: their indices, cache, masks, and the logits of their next tokens."""

    def __init__(self, model: PreTrainedModel, prompts: PromptBatch, *, max_new_tokens: int) -> None:
        # Without any masked token, transformers gives SDPA no mask, and for grouped queries that is slow on a CPU.
        slack = int(prompts.input_ids.device.type == "cpu" and bool(prompts.attention_mask.all()))
        input_ids = pad(prompts.input_ids, (slack, 0))
        mask = pad(prompts.attention_mask, (slack, 0), value=False)
        batch, self._width = input_ids.shape
        self.rows = torch.arange(batch, device=input_ids.device)  # [N] int64, their rows in the prompts
        self.active = torch.ones_like(self.rows, dtype=torch.bool)  # [N]; ended rows stay until they are dropped
        self._model = model
        self._cache = kv_cache(model.config, self._width + max_new_tokens)
        self._cache_argument = cache_argument(model)
        self._mask = pad(mask, (0, max_new_tokens), value=True)  # [N, P + max_new_tokens]
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        self._position = positions[:, -1:]  # [N, 1], of the last token read
        self.logits = self._read(input_ids, positions)  # [N, V]

    def advance(self, tokens: Tensor, *, drop_ended: bool) -> None:
        """Read `tokens` `[N]`, the next of each row; with `drop_ended`, rows that have ended are dropped first."""
        if drop_ended:
            tokens = tokens[self._drop_ended()]
        self._width += 1
        self._position = self._position + 1
        self.logits = self._read(tokens[:, None], self._position)

    def _drop_ended(self) -> Tensor:
        stay = self.active.nonzero().squeeze(-1)
        self.rows, self.active = self.rows[stay], self.active[stay]
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
        logits: Tensor = output.logits[:, -1]  # [N, 1, V] -> [N, V]
        return logits


class _Outputs:
    """The tokens drawn so far, one column per step."""

    def __init__(self, prompts: PromptBatch, max_new_tokens: int, *, pad_id: int) -> None:
        shape = (len(prompts.input_ids), max_new_tokens)
        self._responses = prompts.input_ids.new_full(shape, pad_id)
        self._mask = torch.zeros_like(self._responses, dtype=torch.bool)
        self._logprobs = torch.zeros_like(self._responses, dtype=torch.float32)
        self._ended = self._mask[:, 0].clone()
        self._pad_id = pad_id

    def add(self, step: int, active_rows: _ActiveRows, *, drawn: Drawn, stopped: Tensor) -> None:
        """Write the tokens of the rows that had not ended before."""
        rows, counts = active_rows.rows, active_rows.active
        self._responses[rows, step] = drawn.tokens.where(counts, self._pad_id)
        self._logprobs[rows, step] = drawn.logprobs.where(counts, 0.0)
        self._mask[rows, step] = counts
        self._ended[rows] |= stopped

    def trimmed(self) -> Generated:
        """The responses, cut after the longest one."""
        longest = int(self._mask.sum(-1).max())
        return Generated(
            responses=self._responses[:, :longest],
            response_mask=self._mask[:, :longest],
            logprobs=self._logprobs[:, :longest],
            ended=self._ended,
        )
