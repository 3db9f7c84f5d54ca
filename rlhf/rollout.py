"""Prompts -> `Rollout`: what the actor says, and what the other three models think of it.

A rollout is gathered: every rank holds the sequences of all ranks. Advantages, whitening and metrics are then plain
arithmetic on one batch, the same on every rank, and a minibatch can be cut from it without asking who drew which row.
Sampling is seeded by sample, so the number of ranks does not change what is said. Left out: advantages and updates
(see `stages/ppo.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.logprobs import TokenStatistics, token_logprobs_and_entropy
from rlhf.algorithms.scores import normalize_scores, penalize_unended
from rlhf.config.ppo_config import PPOConfig
from rlhf.engine.engine import Engine
from rlhf.generation.generate import Decoding, Generated, generate
from rlhf.models.lora import adapters_off
from rlhf.models.positions import position_ids
from rlhf.models.scalar_head import last_token_scores, response_values
from rlhf.runtime.dist import gather_objects, max_over_ranks
from rlhf.runtime.errors import RunError
from rlhf.tracking.timing import Stopwatch
from rlhf.types import PromptBatch, Responses, Rollout

log = logging.getLogger(__name__)

Batch = TypeVar("Batch", bound=Responses)


@dataclass(frozen=True)
class Models:
    """The four models of PPO."""

    actor: Engine
    reward: Engine
    reference: Engine | None
    """None: the actor with its adapters switched off."""
    critic: Engine | None
    """None: advantages come from the other responses to a prompt, and values are 0."""
    value_shift: float = 0.0
    """Subtracted from what the critic says: the mean of normalised scores, for which its head has no bias."""

    def close(self) -> None:
        """Let go of what the engines hold outside the process."""
        for engine in (self.actor, self.reward, self.reference, self.critic):
            if engine is not None:
                engine.close()


@dataclass(frozen=True)
class ScoreScale:
    """Mean and standard deviation of held-out scores, in the reward model's own units."""

    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Said(Responses):
    """What the actor said on this rank, before anyone has judged it."""

    sample_ids: Tensor  # [B] int64
    generation_logprobs: Tensor  # [B, R] fp32
    ended: Tensor  # [B] bool
    prompts: tuple[str, ...]  # B texts


@dataclass
class Collector:
    """Collects rollouts: generates, scores, and gathers them over the ranks."""

    models: Models
    config: PPOConfig
    decode: Callable[[list[int]], str]
    pad_id: int
    stop_token_ids: tuple[int, ...]
    scale: ScoreScale
    timer: Stopwatch

    def collect(self, prompts: PromptBatch, *, seed: int, with_values: bool = True) -> Rollout:
        """Answer and judge this rank's prompts `[B, P]`; every rank must call it with equally many.

        Args:
            prompts: this rank's rows.
            seed: of the sampling; a row's draw depends on it and on the row's `sample_ids` alone.
            with_values: False leaves the critic alone, for evaluation.

        Returns:
            The rollout of all ranks, on the actor's device.
        """
        with self.timer("generate"):
            said = self._say(prompts, seed=seed)
        with self.timer("score"), torch.no_grad():
            rollout = self._judge(said, with_values=with_values)
        return gathered(rollout, pad_id=self.pad_id)

    def _say(self, prompts: PromptBatch, *, seed: int) -> Said:
        decoding = Decoding(
            self.config.max_response_tokens, self.stop_token_ids, pad_id=self.pad_id, sampling=self.config.sampling
        )
        size = self.config.rollout_micro_batch_size
        return say(self.models.actor, prompts, decoding=decoding, size=size, seed=seed)

    def _judge(self, said: Said, *, with_values: bool) -> Rollout:
        with self.models.actor.evaluating() as actor:
            logprobs, entropy = self._statistics(actor, said)
        reference_logprobs, kl = None, torch.zeros_like(logprobs)
        if self.config.measures_kl:
            with self._reference() as reference:
                reference_logprobs, _ = self._statistics(reference, said)
            kl = kl_estimate(logprobs, reference_logprobs, kind=self.config.kl.kind)
        raw_scores = scores_of(self.models.reward, said, size=self.config.micro_batch_size)
        return Rollout(
            **{field.name: getattr(said, field.name) for field in fields(said)},
            logprobs=logprobs,
            reference_logprobs=reference_logprobs,
            values=self._values(said) if with_values else torch.zeros_like(logprobs),
            kl=kl,
            entropy=entropy,
            raw_scores=raw_scores,
            scores=self._scores(raw_scores, said.ended),
            responses=texts_of(said, self.decode),
        )

    @contextmanager
    def _reference(self) -> Iterator[torch.nn.Module]:
        if self.models.reference is not None:
            with self.models.reference.evaluating() as reference:
                yield reference
            return
        with self.models.actor.evaluating() as actor, adapters_off(actor):
            yield actor

    def _statistics(self, model: Callable[..., Tensor], said: Said) -> Tensor:
        temperature = self.config.sampling.temperature
        return statistics_of(model, said, size=self.config.micro_batch_size, temperature=temperature)

    def _values(self, said: Said) -> Tensor:
        if self.models.critic is None:
            return torch.zeros_like(said.generation_logprobs)
        with self.models.critic.evaluating() as critic:
            values = partial(critic_values, critic, shift=self.models.value_shift)
            return _over_pieces(said, self.config.micro_batch_size, function=lambda piece: values(piece)[None])[0]

    def clamped_share(self, raw_scores: Tensor) -> float:
        """Share of responses whose score `[B]` is at the clamp, where PPO cannot tell them apart."""
        clamp = self._clamp
        return 0.0 if clamp is None else float((self._normalized(raw_scores).abs() >= clamp).double().mean())

    @property
    def _clamp(self) -> float | None:
        return self.config.score.clamp if self.config.score.normalize and self.config.score.clamp else None

    def _normalized(self, raw_scores: Tensor) -> Tensor:
        return normalize_scores(raw_scores, mean=self.scale.mean, std=self.scale.std, clamp=self._clamp)

    def _scores(self, raw_scores: Tensor, ended: Tensor) -> Tensor:
        rules, scores = self.config.score, self._normalized(raw_scores)
        return penalize_unended(scores, ended, penalty=rules.missing_eos_penalty, kind=rules.missing_eos_mode)


def say(actor: Engine, prompts: PromptBatch, *, decoding: Decoding, size: int, seed: int) -> Said:
    """Answer this rank's prompts `[B, P]`, `size` at once; every rank must call it with equally many.

    Args:
        actor: who answers.
        prompts: this rank's rows.
        decoding: what is drawn, and where it ends.
        size: prompts that are answered at once.
        seed: of the sampling; a row's draw depends on it and on the row's `sample_ids` alone.
    """
    parts = []
    with actor.generating() as model:
        for piece in torch.arange(len(prompts.prompts)).split(size):
            batch = prompts.rows(piece).to(actor.world.device)
            answer = generate(model, batch, decoding=decoding, seed=seed, all_done=actor.all_done)
            parts.append(_said(batch, answer))
    num_prompt, num_response = (max(width) for width in zip(*map(widths, parts), strict=True))
    return joined([widened(part, num_prompt, num_response=num_response, pad_id=decoding.pad_id) for part in parts])


def texts_of(said: Responses, decode: Callable[[list[int]], str]) -> tuple[str, ...]:
    """The responses as people read them, B texts."""
    tokens = said.sequences[:, -said.response_mask.shape[1] :]
    return tuple(decode(row[keep].tolist()) for row, keep in zip(tokens, said.response_mask, strict=True))


def statistics_of(model: Callable[..., Tensor], said: Responses, *, size: int, temperature: float) -> Tensor:
    """Log-probabilities and entropies, `[2, B, R]`, 0 where masked; `size` sequences at once."""

    def of(piece: Responses) -> Tensor:
        return torch.stack(response_statistics(model, piece, temperature=temperature))

    return _over_pieces(said, size, function=of)


def scores_of(reward: Engine, said: Responses, *, size: int) -> Tensor:
    """What a reward model says of each sequence, `[B]`, in its own units; `size` sequences at once.

    Equal sequences have equal scores, which pieces of other shapes would round differently: where they are compared
    and divided by their deviation, as in a group, such a difference would become an advantage.
    """
    scores = torch.zeros(len(said), device=said.sequences.device)
    with reward.evaluating() as model:
        for rows in said.pieces(size):
            piece = said.rows(rows).trimmed()
            scores[rows] = last_token_scores(_scalars(model, piece), piece.attention_mask)
    return scores[_first_equals(said).to(scores.device)]


def _first_equals(said: Responses) -> Tensor:
    """For each row the first one with the same tokens, `[B]` int64 on the CPU."""
    sequences, mask = said.sequences.cpu(), said.attention_mask.cpu()  # one wait for the device
    first: dict[tuple[int, ...], int] = {}
    rows = (tuple(tokens[real].tolist()) for tokens, real in zip(sequences, mask, strict=True))
    return torch.tensor([first.setdefault(tokens, row) for row, tokens in enumerate(rows)])


def _said(prompts: PromptBatch, answer: Generated) -> Said:
    return Said(
        sequences=torch.cat([prompts.input_ids, answer.responses], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, answer.response_mask], dim=1),
        response_mask=answer.response_mask,
        sample_ids=prompts.sample_ids,
        generation_logprobs=answer.logprobs,
        ended=answer.ended,
        prompts=prompts.prompts,
    )


def _over_pieces(said: Responses, size: int, *, function: Callable[[Responses], Tensor]) -> Tensor:
    """`function` of rows of similar length without useless columns, `[K, b, r]` each, put together as `[K, B, R]`.

    Training cuts its minibatches into other pieces. In fp32 that changes nothing that matters; with 16-bit weights a
    kernel may round a row differently in another shape, so before the first update some of the new log-probabilities
    already differ from the old ones (in bf16 every twelfth, by up to 0.2).
    """
    found: Tensor | None = None
    for rows in said.pieces(size):
        piece = said.rows(rows).trimmed()
        values = function(piece) * piece.response_mask
        if found is None:
            found = values.new_zeros(len(values), *said.response_mask.shape)
        found[:, rows, : values.shape[-1]] = values
    assert found is not None, "a rollout has at least one row"
    return found


def response_statistics(
    model: Callable[..., Any], batch: Responses, *, temperature: float, chunk_elements: int | None = None
) -> TokenStatistics:
    """Log-probability and entropy, `[B, R]` fp32, of the response tokens; `chunk_elements` as in `token_logprobs`.

    This is the path that trains: the same call gives old, new and reference log-probabilities.
    """
    num_response = batch.response_mask.shape[1]
    logits = model(
        input_ids=batch.sequences,
        attention_mask=batch.attention_mask,
        position_ids=position_ids(batch.attention_mask),
        logits_to_keep=num_response + 1,
        use_cache=False,
    ).logits
    targets = batch.sequences[:, -num_response:]
    return token_logprobs_and_entropy(logits, targets, temperature=temperature, chunk_elements=chunk_elements)


def critic_values(critic: Callable[..., Tensor], batch: Responses, *, shift: float) -> Tensor:
    """The critic's estimate before each response token, `[B, R]`, in units of normalised scores."""
    return response_values(_scalars(critic, batch), batch.response_mask.shape[1]) - shift


def _scalars(model: Callable[..., Tensor], batch: Responses) -> Tensor:
    return model(batch.sequences, batch.attention_mask, position_ids=position_ids(batch.attention_mask))


def gathered(rollout: Rollout, *, pad_id: int) -> Rollout:
    """The rollouts of all ranks as one, at a common width; every rank must call it."""
    device = rollout.sequences.device
    num_prompt, num_response = max_over_ranks(torch.tensor(widths(rollout), device=device)).tolist()
    wide = widened(rollout, num_prompt, num_response=num_response, pad_id=pad_id)
    parts = gather_objects({field.name: getattr(wide, field.name) for field in fields(wide)})
    return joined([Rollout(**part) for part in parts]).to(device)


def widths(batch: Responses) -> tuple[int, int]:
    """Columns of the prompt and of the response."""
    num_response = batch.response_mask.shape[1]
    return batch.sequences.shape[1] - num_response, num_response


def widened(batch: Batch, num_prompt: int, *, num_response: int, pad_id: int) -> Batch:
    """The same rows with more padding: prompts to `num_prompt` columns, responses to `num_response`."""
    left, right = num_prompt - widths(batch)[0], num_response - widths(batch)[1]
    columns = {}
    for field in fields(batch):
        values = getattr(batch, field.name)
        if isinstance(values, Tensor) and values.dim() == 2:
            of_sequence = field.name in ("sequences", "attention_mask")
            filler = pad_id if field.name == "sequences" else 0
            columns[field.name] = pad(values, (left if of_sequence else 0, right), value=filler)
    return replace(batch, **columns)


def joined(parts: Sequence[Batch]) -> Batch:
    """Rows of equally wide batches under each other."""

    def join(name: str) -> Tensor | tuple[str, ...] | None:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        return torch.cat(values) if isinstance(values[0], Tensor) else tuple(text for texts in values for text in texts)

    return replace(parts[0], **{field.name: join(field.name) for field in fields(parts[0])})


def without_bad_rows(rollout: Rollout) -> Rollout:
    """The rollout without the rows in which some number is not finite, so that one cannot spoil the batch.

    They are gone, not masked: they reach no forward, no gradient, no group and no statistics.

    Raises:
        RunError: more than half of the rows are bad: the models are broken, not a sample.
    """
    numbers = [getattr(rollout, name) for name in _JUDGED]
    good = torch.stack([values.isfinite().view(len(rollout), -1).all(-1) for values in numbers if values is not None])
    good = good.all(0)
    if bool(good.all()):
        return rollout
    bad = (~good).nonzero().flatten().tolist()
    examples = "; ".join(repr(rollout.prompts[row] + rollout.responses[row])[:200] for row in bad[:3])
    if 2 * len(bad) > len(rollout):
        raise RunError(
            f"{len(bad)} of {len(rollout)} responses have log-probabilities, values or scores that are not finite, "
            f"such as {examples}. Look at the metrics before; lower the learning rates, or set engine.precision=fp32."
        )
    log.warning("left out %d of %d responses with numbers that are not finite: %s", len(bad), len(rollout), examples)
    return rollout.rows(good.nonzero().flatten())


_JUDGED = ("logprobs", "reference_logprobs", "generation_logprobs", "values", "kl", "entropy", "raw_scores", "scores")
