"""The vocabulary of the pipeline, and the batches that pass through it.

Letters, used in every docstring: B sequences, P prompt, R response, T = P + R, V vocabulary, D width, S reward sources.

* prompt, response, sequence (= prompt + response).
* A *score* `[B]` is what reward models and functions say of a whole response. A *reward* `[B, R]` is per token, after
  KL.
* Everything per token is aligned to the response: index t speaks of response token t. A *value* `[B, R]` is the
  critic's estimate *before* token t is emitted.
* A mask is named for what is True. `response_mask` is True where a token counts, and the EOS counts. Masked
  positions hold 0, never a sentinel.

All classes are frozen; `to(device)` and `rows(index)` return new ones (a `PreferenceBatch` is
not cut by rows). Left out: padding (see `data/loader.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class _TensorBatch:
    """Base of all batches: moves and slices every tensor field along its first dimension."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def rows(self, index: Tensor) -> Self:
        """The rows that `index` `[N]` names, in that order."""
        return replace(self, **{field.name: _selected(getattr(self, field.name), index) for field in fields(self)})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _selected(values: Any, index: Tensor) -> Any:
    if values is None:
        return None
    if isinstance(values, Tensor):
        return values[index.to(values.device)]
    if isinstance(values, HeldRows):
        return values.rows(index)
    return tuple(values[i] for i in index.tolist())


WIDTHS = 8
"""Batches are as wide as their longest row, rounded up to a multiple of this.

oneDNN compiles kernels of half a megabyte for each width, and tensor cores like multiples of 8.
"""


def width_of(num_tokens: int) -> int:
    """Columns of a batch whose longest row has so many tokens."""
    return -(-num_tokens // WIDTHS) * WIDTHS


@dataclass(frozen=True)
class Responses(_TensorBatch):
    """Prompts with their responses, to be scored or trained on."""

    sequences: Tensor  # [B, T] int64, left-padded prompt then right-padded response
    attention_mask: Tensor  # [B, T] bool, True where a real token is
    response_mask: Tensor  # [B, R] bool, True where a response token counts, EOS included

    def __len__(self) -> int:
        return self.sequences.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt and of its response, `[B, 2]` int64 on the CPU."""
        response = self.response_mask.sum(-1)
        return torch.stack((self.attention_mask.sum(-1) - response, response), dim=1).cpu()  # waits for the device

    def trimmed(self) -> Self:
        """The same rows without the columns that are padding in every row, but as wide as `width_of` says."""
        num_response = self.response_mask.shape[1]
        num_prompt = self.sequences.shape[1] - num_response
        first = int(self.attention_mask.any(0).int().argmax())
        counted = self.response_mask.any(0).nonzero()
        last = int(counted.max()) + 1 if len(counted) else 1
        width = num_prompt + last - first
        first = max(0, first - (width_of(width) - width))
        columns = {name: values[:, :last] for name, values in self._tensors().items() if values.dim() == 2}
        columns["sequences"] = self.sequences[:, first : num_prompt + last]
        columns["attention_mask"] = self.attention_mask[:, first : num_prompt + last]
        return replace(self, **columns)


@dataclass(frozen=True)
class SFTBatch(_TensorBatch):
    """Demonstrations, right padded."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, True where a real token is
    target_mask: Tensor  # [B, T] bool, True where the token is learnt (predicted from the ones before it)


@dataclass(frozen=True)
class PreferenceBatch(_TensorBatch):
    """B preferences as 2B sequences, right padded: all chosen ones first, then the rejected in the same order."""

    input_ids: Tensor  # [2B, T] int64
    attention_mask: Tensor  # [2B, T] bool, True where a real token is
    target_mask: Tensor  # [2B, T] bool, True where a token is an assistant's response, EOS included
    margin: Tensor  # [B] fp32, how much better the chosen one was judged; 0 where unknown
    reference_logprobs: Tensor  # [2B] fp32, of each response under DPO's reference; 0 where there is none


@dataclass(frozen=True)
class PromptBatch(_TensorBatch):
    """Prompts, left padded, with their text, ids and further columns."""

    input_ids: Tensor  # [B, P] int64
    attention_mask: Tensor  # [B, P] bool, True where a real token is
    sample_ids: Tensor  # [B] int64, unique in the run: seeds the sampling of this row, whatever rank it is on
    prompts: tuple[str, ...]  # B texts, for people to read
    # B rows' columns for reward functions, as in `Prompt`: {} without any, None for a row that repeats another
    columns: tuple[Mapping[str, Any] | None, ...]

    def token_ids(self) -> list[list[int]]:
        """The tokens of each prompt, without padding."""
        rows = zip(self.input_ids.cpu(), self.attention_mask.cpu(), strict=True)
        return [row[keep].tolist() for row, keep in rows]


@dataclass(frozen=True)
class Sequences(_TensorBatch):
    """The part of a rollout that is large, or read where it was made: it stays on the rank that generated it."""

    sequences: Tensor  # [B, T] int64, as in `Responses`
    attention_mask: Tensor  # [B, T] bool
    prompts: tuple[str, ...]  # B texts
    responses: tuple[str, ...]  # B texts, special tokens removed
    # What the frozen layers gave: B of [t, D] for the real tokens of each sequence, in host memory; None: not kept
    actor_states: tuple[Tensor, ...] | None = None
    critic_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class HeldRows:
    """Where the sequences of B rows are: each rank holds its own, and all ranks know who holds which.

    `rows` moves no data; `rlhf/row_exchange.py` brings rows to the ranks that train on them.
    """

    own: Sequences
    """What this rank holds; every rank holds equally many, also those that have been left out since."""
    rank: int
    """This one."""
    ranks: int
    holders: Tensor  # [B] int64 on the CPU, the rank that holds each row
    places: Tensor  # [B] int64 on the CPU, its row number there
    num_tokens: Tensor  # [B] int64 on the CPU, prompt and response

    @classmethod
    def of(cls, own: Sequences, num_tokens: Tensor, *, rank: int = 0, ranks: int = 1) -> HeldRows:
        """All rows of all ranks, one rank after the other; `num_tokens` `[B]` is theirs."""
        each = own.sequences.shape[0]
        holders, places = torch.arange(ranks).repeat_interleave(each), torch.arange(each).repeat(ranks)
        return cls(own, rank, ranks, holders=holders, places=places, num_tokens=num_tokens.cpu())

    def rows(self, index: Tensor) -> HeldRows:
        """The rows that `index` `[N]` names, in that order."""
        index = index.cpu()
        names = ("holders", "places", "num_tokens")
        return replace(self, **{name: getattr(self, name)[index] for name in names})


@dataclass(frozen=True)
class Rollout(_TensorBatch):
    """Responses of the actor to B prompts, with everything that the models computed for them.

    Log-probabilities and entropies are those of the whole vocabulary at the sampling temperature, before top-k and
    top-p cut it, taken by the path that trains, with dropout off.
    """

    held: HeldRows
    """The sequences."""
    response_mask: Tensor  # [B, R] bool, as in `Responses`
    sample_ids: Tensor  # [B] int64, as in the prompts; // samples_per_prompt is the same for all responses to a prompt
    logprobs: Tensor  # [B, R] fp32, log-probability of each response token under the actor
    reference_logprobs: Tensor | None  # [B, R] fp32, the same under the reference; None where KL costs nothing
    generation_logprobs: Tensor  # [B, R] fp32, the same as seen by the generation path (a check, never trained on)
    values: Tensor  # [B, R] fp32, the critic's estimate before token t
    kl: Tensor  # [B, R] fp32, the chosen estimator of KL(actor || reference); 0 without a reference
    entropy: Tensor  # [B, R] fp32, entropy in nats of the actor before token t
    source_scores: Tensor  # [B, S] fp32, of each reward source; NaN where it does not apply, infinity where it failed
    raw_scores: Tensor  # [B] fp32, their weighted sum in the units of the sources
    scores: Tensor  # [B] fp32, the same normalised, clamped and with the penalty for a response that never ends
    ended: Tensor  # [B] bool, True where the response ends with a stop token

    def __len__(self) -> int:
        return self.response_mask.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Counted response tokens of each sequence, `[B]` int64."""
        return self.response_mask.sum(-1)


@dataclass(frozen=True, kw_only=True)
class _TokenTargets(_TensorBatch):
    """What a PPO update needs to know of every response token."""

    response_mask: Tensor  # [B, R] bool, as in `Responses`
    logprobs: Tensor  # [B, R] fp32, under the actor that sampled
    reference_logprobs: Tensor | None  # [B, R] fp32, under the reference; None where KL costs nothing
    values: Tensor  # [B, R] fp32, of the critic before the update
    advantages: Tensor  # [B, R] fp32
    returns: Tensor  # [B, R] fp32
    loss_mask: Tensor | None = None  # [B, R] bool, True where a token counts in the actor's loss; None: all that count
    correction: Tensor | None = None  # [B, R] fp32, importance weights of tokens in the actor's loss; None: 1
    loss_weights: Tensor | None = None  # [B, R] fp32, what a token is multiplied by in the sum that is the loss


@dataclass(frozen=True, kw_only=True)
class Experience(_TokenTargets):
    """The part of a rollout that its updates need, on every rank; `rows` cuts minibatches."""

    held: HeldRows
    """The sequences."""

    @classmethod
    def from_rollout(cls, rollout: Rollout, *, advantages: Tensor, returns: Tensor) -> Experience:
        """A rollout with its advantages and returns, both `[B, R]`."""
        own = {field.name for field in fields(rollout)}
        shared = {field.name: getattr(rollout, field.name) for field in fields(cls) if field.name in own}
        return cls(**shared, advantages=advantages, returns=returns)

    def __len__(self) -> int:
        return self.response_mask.shape[0]


@dataclass(frozen=True, kw_only=True)
class PPOBatch(_TokenTargets, Responses):
    """A micro-batch of a PPO update: sequences, and what is known of their tokens."""

    actor_states: tuple[Tensor, ...] | None = None  # as in `Sequences`
    critic_states: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, sequences: Sequences, numbers: Experience) -> PPOBatch:
        """The same B rows of both."""
        found = {**vars(numbers), **vars(sequences)}
        return cls(**{field.name: found[field.name] for field in fields(cls)})


Batch = TypeVar("Batch")


@dataclass(frozen=True)
class EvalBatch(Generic[Batch]):
    """A batch whose first `count` rows count; the rest only keeps ranks in step."""

    batch: Batch
    count: int
