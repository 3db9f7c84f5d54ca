"""Prompts -> `Rollout`: what the actor says, and what the other three models think of it.

A rollout is gathered: every rank holds the sequences of all ranks. Advantages, whitening and metrics are then plain
arithmetic on one batch, the same on every rank, and a minibatch can be cut from it without asking who drew which row.
Sampling is seeded by sample, so the number of ranks does not change what is said. Left out: advantages and updates
(see `stages/ppo.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.logprobs import TokenStatistics, token_logprobs_and_entropy
from rlhf.algorithms.scores import normalize_scores, penalize_unended
from rlhf.config.stages import PPOConfig, SamplingConfig
from rlhf.dist import gather_objects, max_over_ranks
from rlhf.engine.engine import Engine
from rlhf.generation.generate import Generated, generate
from rlhf.models.lora import adapters_off
from rlhf.models.positions import position_ids
from rlhf.models.scalar_head import last_token_scores, response_values
from rlhf.tracking.timing import Stopwatch
from rlhf.types import PromptBatch, Rollout


@dataclass(frozen=True)
class Models:
    """The four models of PPO."""

    actor: Engine
    reward: Engine
    reference: Engine | None
    """None: the actor with its adapters switched off."""
    critic: Engine | None
    """None: advantages come from the other responses to a prompt, and values are 0."""


@dataclass(frozen=True)
class ScoreScale:
    """Held-out mean and standard deviation of the reward model, in its own units."""

    mean: float = 0.0
    std: float = 1.0


@dataclass
class Collector:
    """Collects rollouts: generates, scores, and gathers them over the ranks."""

    models: Models
    config: PPOConfig
    decode: Callable[[Tensor], str]
    pad_id: int
    stop_token_ids: tuple[int, ...]
    scale: ScoreScale
    watch: Stopwatch

    def collect(self, prompts: PromptBatch, *, seed: int, sampling: SamplingConfig | None = None) -> Rollout:
        """Answer and judge this rank's prompts `[B, P]`; every rank must call it with equally many.

        Args:
            prompts: this rank's rows.
            seed: of the sampling; a row's draw depends on it and on the row's `sample_ids` alone.
            sampling: how to draw; the configuration's if None.

        Returns:
            The rollout of all ranks, on the actor's device.
        """
        sampling = sampling or self.config.sampling
        pieces = torch.arange(len(prompts.prompts)).split(self.config.rollout_micro_batch_size)
        batches = [prompts.rows(piece).to(self.device) for piece in pieces]
        with self.watch("generate"), self.models.actor.generating() as model:
            answers = [self._generate(model, batch, sampling=sampling, seed=seed) for batch in batches]
        with self.watch("score"), torch.no_grad():
            judged = [self._judge(batch, answer) for batch, answer in zip(batches, answers, strict=True)]
        return gathered(judged, pad_id=self.pad_id)

    @property
    def device(self) -> torch.device:
        """Where the models compute."""
        return self.models.actor.world.device

    def _generate(
        self, model: torch.nn.Module, batch: PromptBatch, *, sampling: SamplingConfig, seed: int
    ) -> Generated:
        return generate(
            model,
            batch,
            max_new_tokens=self.config.max_response_tokens,
            stop_token_ids=self.stop_token_ids,
            pad_id=self.pad_id,
            sampling=sampling,
            seed=seed,
        )

    def _judge(self, prompts: PromptBatch, answer: Generated) -> Rollout:
        mask = answer.response_mask
        sequences = torch.cat([prompts.input_ids, answer.responses], dim=1)
        attention_mask = torch.cat([prompts.attention_mask, mask], dim=1)
        with self.models.actor.evaluating() as actor:
            seen = self._statistics(actor, sequences, attention_mask=attention_mask, response_mask=mask)
        with self._reference() as reference:
            expected = self._statistics(reference, sequences, attention_mask=attention_mask, response_mask=mask)
        raw_scores = self._raw_scores(sequences, attention_mask)
        return Rollout(
            sequences=sequences,
            attention_mask=attention_mask,
            response_mask=mask,
            logprobs=seen.logprobs,
            reference_logprobs=expected.logprobs,
            generation_logprobs=answer.logprobs,
            values=self._values(sequences, attention_mask, response_mask=mask),
            kl=kl_estimate(seen.logprobs, expected.logprobs, kind=self.config.kl.kind),
            entropy=seen.entropy,
            raw_scores=raw_scores,
            scores=self._scores(raw_scores, answer.ended),
            ended=answer.ended,
            prompts=prompts.prompts,
            responses=tuple(self.decode(row[keep]) for row, keep in zip(answer.responses, mask, strict=True)),
        )

    @contextmanager
    def _reference(self) -> Iterator[torch.nn.Module]:
        if self.models.reference is not None:
            with self.models.reference.evaluating() as reference:
                yield reference
            return
        with self.models.actor.evaluating() as actor, adapters_off(actor):
            yield actor

    def _statistics(
        self, model: Callable[..., Tensor], sequences: Tensor, *, attention_mask: Tensor, response_mask: Tensor
    ) -> TokenStatistics:
        statistics = response_statistics(
            model,
            sequences,
            attention_mask=attention_mask,
            num_response=response_mask.shape[1],
            temperature=self.config.sampling.temperature,
        )
        return TokenStatistics(*(values * response_mask for values in statistics))

    def _raw_scores(self, sequences: Tensor, attention_mask: Tensor) -> Tensor:
        with self.models.reward.evaluating() as reward:
            per_position = reward(sequences, attention_mask, position_ids=position_ids(attention_mask))
        return last_token_scores(per_position, attention_mask)

    def _scores(self, raw_scores: Tensor, ended: Tensor) -> Tensor:
        rules = self.config.score
        scores = normalize_scores(raw_scores, mean=self.scale.mean, std=self.scale.std, clamp=rules.clamp or None)
        return penalize_unended(scores, ended, penalty=rules.no_end_penalty, kind=rules.no_end_kind)

    def _values(self, sequences: Tensor, attention_mask: Tensor, *, response_mask: Tensor) -> Tensor:
        if self.models.critic is None:
            return torch.zeros_like(response_mask, dtype=torch.float32)
        with self.models.critic.evaluating() as critic:
            per_position = critic(sequences, attention_mask, position_ids=position_ids(attention_mask))
        return response_values(per_position, response_mask.shape[1]) * response_mask


def response_statistics(
    model: Callable[..., Tensor], sequences: Tensor, *, attention_mask: Tensor, num_response: int, temperature: float
) -> TokenStatistics:
    """Log-probability and entropy, `[B, R]` fp32, of the last `num_response` tokens of `sequences` `[B, T]`.

    This is the path that trains: the same call gives old, new and reference log-probabilities.
    """
    logits = model(
        input_ids=sequences,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        logits_to_keep=num_response + 1,
        use_cache=False,
    ).logits
    return token_logprobs_and_entropy(logits, sequences[:, -num_response:], temperature=temperature)


def gathered(parts: Sequence[Rollout], *, pad_id: int) -> Rollout:
    """The rollouts of all micro-batches of all ranks as one, at a common width; every rank must call it."""
    device = parts[0].sequences.device
    widths = torch.tensor([_widths(part) for part in parts])
    num_prompt, num_response = max_over_ranks(widths.amax(0).to(device)).tolist()
    wide = [_widened(part, num_prompt=num_prompt, num_response=num_response, pad_id=pad_id) for part in parts]
    everywhere = [part for rank in gather_objects([part.to("cpu") for part in wide]) for part in rank]
    return _joined(everywhere).to(device)


def _widths(rollout: Rollout) -> tuple[int, int]:
    num_response = rollout.response_mask.shape[1]
    return rollout.sequences.shape[1] - num_response, num_response


def _widened(rollout: Rollout, *, num_prompt: int, num_response: int, pad_id: int) -> Rollout:
    left, right = num_prompt - _widths(rollout)[0], num_response - _widths(rollout)[1]
    columns = {}
    for field in fields(rollout):
        values = getattr(rollout, field.name)
        if isinstance(values, Tensor) and values.dim() == 2:
            of_sequence = field.name in ("sequences", "attention_mask")
            filler = pad_id if field.name == "sequences" else 0
            values = pad(values, (left if of_sequence else 0, right), value=filler)
        columns[field.name] = values
    return Rollout(**columns)


def _joined(parts: Sequence[Rollout]) -> Rollout:
    def join(name: str) -> Tensor | tuple[str, ...]:
        values = [getattr(part, name) for part in parts]
        return torch.cat(values) if isinstance(values[0], Tensor) else tuple(text for texts in values for text in texts)

    return Rollout(**{field.name: join(field.name) for field in fields(Rollout)})
