"""From prompts to a `Rollout`: responses of the actor, log-probabilities, KL, scores and values.

The numbers of a rollout are gathered: every rank has those of all ranks. Advantages, whitening and metrics are then
plain arithmetic on one batch, the same on every rank, and a minibatch can be cut from it no matter which rank drew
which row. The sequences stay where they were drawn, until a rank trains on them (`row_exchange.py`).
Sampling is seeded by sample, so the number of ranks does not change the responses. See also: `ppo_update.py` for
advantages and updates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rlhf.algorithms.groups import groups_that_differ
from rlhf.algorithms.kl import kl_estimate
from rlhf.config.ppo_config import PPOConfig
from rlhf.engine.engine import Engine
from rlhf.forward_passes import Around, all_statistics, critic_values, in_pieces
from rlhf.generation.backend import Backend
from rlhf.generation.generate import Decoding, Generated, generate
from rlhf.hidden_states import KeptStates
from rlhf.models.export import plain_tensors
from rlhf.models.lora import adapters_off
from rlhf.reward_functions import RewardRows
from rlhf.rewards import RewardScorer, ScoreShaping
from rlhf.row_exchange import concatenated, gather_rollout, padded_to, texts_of, widths
from rlhf.runtime.errors import RunError
from rlhf.tracking.timing import Stopwatch
from rlhf.types import HeldRows, PromptBatch, Responses, Rollout, Sequences

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The models of PPO."""

    actor: Engine
    rewards: Mapping[str, Engine]
    """Reward models by the names of their sources."""
    reference: Engine | None
    """None uses the actor with its adapters switched off."""
    critic: Engine | None
    """None where advantages come from the other responses to a prompt; values are then 0."""
    begin_late: frozenset[str] = frozenset()
    """Of actor and critic, those whose frozen layers are computed once for a rollout, see `hidden_states.py`."""
    value_shift: float = 0.0
    """Subtracted from the critic's outputs: the mean of normalised scores, for which its head has no bias."""

    def close(self) -> None:
        """Free what the engines hold outside the process, such as files."""
        for engine in (self.actor, *self.rewards.values(), self.reference, self.critic):
            if engine is not None:
                engine.close()


@dataclass(frozen=True)
class GeneratedResponses(Responses):
    """Responses that the actor generated on this rank, before they are scored."""

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
    scorer: RewardScorer
    shaping: ScoreShaping
    timer: Stopwatch
    backend: Backend | None = None
    """Generates in place of the actor's engine."""

    def collect(self, prompts: PromptBatch, *, seed: int, step: int, trains: bool = True) -> Rollout:
        """Generate and score responses to this rank's prompts `[B, P]`; every rank must call it with equally many.

        Args:
            prompts: this rank's rows.
            seed: seed of sampling; a row's draw depends on it and on the row's `sample_ids` alone.
            step: iterations finished so far, for reward functions.
            trains: False is an evaluation: it skips the critic, leaves running scales alone, and has no groups.

        Returns:
            The rollout of all ranks, on the actor's device; each rank holds the sequences that it generated.
        """
        with self.timer("generate"):
            responses = self._generate(prompts, seed=seed)
        with self.timer("score"), torch.no_grad():
            rollout = self._score(responses, prompts.columns, step=step, trains=trains)
        gathered = gather_rollout(rollout, pad_id=self.pad_id, world=self.models.actor.world)
        return self.with_scores(gathered, trains=trains)

    def _generate(self, prompts: PromptBatch, *, seed: int) -> GeneratedResponses:
        config = self.config
        decoding = Decoding(
            config.max_response_tokens,
            self.stop_token_ids,
            pad_id=self.pad_id,
            sampling=config.sampling,
            slots=config.rollout_micro_batch_size,
        )
        if self.backend is None:
            return generate_responses(self.models.actor, prompts, decoding=decoding, seed=seed)
        actor = self.models.actor
        module, prompts = cast(Any, actor.module), prompts.to(actor.world.device)
        self.backend.load(plain_tensors(module, actor.full_tensors()))  # collectives: a gather for each tensor
        vocabulary = module.get_input_embeddings().num_embeddings
        answer = self.backend.answer(prompts, decoding=decoding, seed=seed, vocabulary=vocabulary)
        return _with_responses(prompts, answer)

    def with_scores(self, rollout: Rollout, *, trains: bool) -> Rollout:
        """The rollout of all ranks with the scores that PPO is paid, computed alike on every rank.

        An evaluation leaves the running scales alone and has no groups, whose mean would be 0.
        """
        shaping, scores = self.shaping, rollout.source_scores
        if trains:
            shaping.observe(scores)
        count = self.config.samples_per_prompt
        groups = rollout.sample_ids // count if count > 1 else torch.zeros_like(rollout.sample_ids)
        paid = shaping.scores(scores, groups if trains else None, ended=rollout.ended, lengths=rollout.lengths)
        return replace(rollout, raw_scores=shaping.raw_scores(scores), scores=paid)

    def _score(
        self, generated: GeneratedResponses, columns: Sequence[Mapping[str, Any] | None], *, step: int, trains: bool
    ) -> Rollout:
        models = self.models
        states = KeptStates(models.actor, used="actor" in models.begin_late)
        with models.actor.evaluating() as actor:
            logprobs, entropy = self._statistics(actor, generated, around=states.kept)
        reference_logprobs, kl = None, torch.zeros_like(logprobs)
        if self.config.measures_kl:
            with self._reference() as reference:
                around = states.reused if models.reference is None else nullcontext
                reference_logprobs, _ = self._statistics(reference, generated, around=around)
            kl = kl_estimate(logprobs, reference_logprobs, kind=self.config.kl.kind)
        texts, ids = response_texts(generated, self.decode), response_ids(generated)
        values, critic_states = self._values(generated) if trains else (torch.zeros_like(logprobs), None)
        rows = RewardRows.of(columns, texts=texts, token_ids=ids, step=step, total_steps=self.config.iterations)
        with self.timer.part("score/reward"):
            source_scores = self.scorer.score(generated, rows)
        mask = generated.attention_mask
        own = Sequences(
            generated.sequences,
            mask,
            prompts=generated.prompts,
            responses=texts,
            actor_states=states.of(generated.sample_ids) if trains else None,
            critic_states=critic_states,
        )
        return Rollout(
            held=HeldRows.of(own, mask.sum(-1)),
            response_mask=generated.response_mask,
            sample_ids=generated.sample_ids,
            generation_logprobs=generated.generation_logprobs,
            ended=generated.ended,
            logprobs=logprobs,
            reference_logprobs=reference_logprobs,
            values=values,
            kl=kl,
            entropy=entropy,
            source_scores=source_scores,
            raw_scores=torch.zeros(len(texts)),  # the scores follow once those of all ranks are there
            scores=torch.zeros(len(texts)),
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
        self, model: Callable[..., Tensor], generated: GeneratedResponses, *, around: Around = nullcontext
    ) -> Tensor:
        temperature, limit = self.config.sampling.temperature, self.config.micro_batch_limit
        return all_statistics(model, generated, limit=limit, temperature=temperature, around=around)

    def _values(self, generated: GeneratedResponses) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The critic's values `[B, R]`, and what its frozen layers gave."""
        if self.models.critic is None:
            return torch.zeros_like(generated.generation_logprobs), None
        states = KeptStates(self.models.critic, used="critic" in self.models.begin_late)
        with self.models.critic.evaluating() as critic:
            values = partial(critic_values, critic, shift=self.models.value_shift)
            limit = self.config.micro_batch_limit
            found = in_pieces(generated, limit, function=lambda piece: values(piece)[None], around=states.kept)[0]
        return found, states.of(generated.sample_ids)


def generate_responses(actor: Engine, prompts: PromptBatch, *, decoding: Decoding, seed: int) -> GeneratedResponses:
    """Generate responses to this rank's prompts `[B, P]`; every rank must call it with equally many.

    Args:
        actor: the model that generates.
        prompts: this rank's rows.
        decoding: sampling, length, and how many rows at once.
        seed: seed of sampling; a row's draw depends on it and on the row's `sample_ids` alone.
    """
    decoding = replace(decoding, graphs=actor.decode_graphs)
    with actor.generating() as model:
        answer = generate(cast(Any, model), prompts, decoding=decoding, seed=seed, all_done=actor.all_done)
    return _with_responses(prompts.to(actor.world.device), answer)


def response_texts(responses: Responses, decode: Callable[[list[int]], str]) -> tuple[str, ...]:
    """The responses as text, B of them."""
    return tuple(map(decode, response_ids(responses)))


def response_ids(responses: Responses) -> list[list[int]]:
    """The counted tokens of each response, B lists."""
    tokens = responses.sequences[:, -responses.response_mask.shape[1] :]
    return [row[keep].tolist() for row, keep in zip(tokens, responses.response_mask, strict=True)]


def _with_responses(prompts: PromptBatch, answer: Generated) -> GeneratedResponses:
    return GeneratedResponses(
        sequences=torch.cat([prompts.input_ids, answer.responses], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, answer.response_mask], dim=1),
        response_mask=answer.response_mask,
        sample_ids=prompts.sample_ids,
        generation_logprobs=answer.logprobs,
        ended=answer.ended,
        prompts=prompts.prompts,
    )


def replace_equal_groups(
    rollout: Rollout, more: Callable[[], Rollout], *, config: PPOConfig, pad_id: int
) -> tuple[Rollout, dict[str, float]]:
    """Replace groups whose scores are all equal, which teach nothing, by groups of further prompts.

    That is DAPO's dynamic sampling (Yu et al. 2025, arXiv:2503.14476, section 3.2). With groups missing after
    `ppo.dynamic_sampling` further rollouts, the batch is smaller; where no group differs, the first rollout is kept.

    Args:
        rollout: of all ranks.
        more: collects a rollout of further prompts; every rank calls it equally often, since all see the same scores.
        config: size of a rollout and of its groups.
        pad_id: the padding token.

    Returns:
        A rollout of at most `ppo.rollout_size` rows in whole groups, and metrics.
    """
    parts = [_varied(rollout, config)]
    metrics = {"rollout/groups_equal": share_of_equal_groups(rollout, config), "rollout/further_rollouts": 0.0}
    while sum(map(len, parts)) < config.rollout_size and metrics["rollout/further_rollouts"] < config.dynamic_sampling:
        parts.append(_varied(more(), config))
        metrics["rollout/further_rollouts"] += 1
    num_prompt, num_response = (max(width) for width in zip(*map(widths, parts), strict=True))
    joined = concatenated([padded_to(part, num_prompt, num_response=num_response, pad_id=pad_id) for part in parts])
    if len(joined) == 0:
        return rollout, metrics
    groups = joined.sample_ids // config.samples_per_prompt
    if len(joined) > config.rollout_size:  # a group at the border is left out whole
        beyond = groups[config.rollout_size]
        joined = joined.rows((groups[: config.rollout_size] != beyond).nonzero().flatten())
    return joined, metrics


def share_of_equal_groups(rollout: Rollout, config: PPOConfig) -> float:
    """Share of the responses whose group has a single score; reading it waits for the device, once."""
    return 1 - float(_differs(rollout, config).double().mean())


def _varied(rollout: Rollout, config: PPOConfig) -> Rollout:
    return rollout.rows(_differs(rollout, config).nonzero().flatten())


def _differs(rollout: Rollout, config: PPOConfig) -> Tensor:
    return groups_that_differ(rollout.scores, rollout.sample_ids // config.samples_per_prompt)  # [B] bool


def scored_rows(rollout: Rollout) -> Rollout:
    """Drop the responses to which no reward source applies.

    Raises:
        RunError: there are no others.
    """
    scored = ~rollout.scores.isnan()
    if not bool(scored.any()):
        raise RunError(
            f"none of {len(rollout)} responses has a score: every reward source said None of each, such as "
            f"{''.join(texts_of(rollout.held, limit=1)[0])!r:.200}. Name a source in ppo.rewards that applies to them."
        )
    return rollout if bool(scored.all()) else rollout.rows(scored.nonzero().flatten())


def without_bad_rows(rollout: Rollout) -> Rollout:
    """Drop the rows in which some number is not finite, so that one of them cannot spoil the batch.

    They are removed, not masked: they reach no forward pass, no gradient, no group and no statistics.

    Raises:
        RunError: more than half of the rows are bad, so it is the models that are broken.
    """
    numbers = [getattr(rollout, name) for name in _NUMBERS]
    good = torch.stack([values.isfinite().view(len(rollout), -1).all(-1) for values in numbers if values is not None])
    good = good.all(0)
    if bool(good.all()):
        return rollout
    bad = (~good).nonzero().flatten()
    # A collective: all ranks see the same bad rows.
    examples = "; ".join(repr("".join(texts))[:200] for texts in texts_of(rollout.held.rows(bad), limit=3))
    if 2 * len(bad) > len(rollout):
        raise RunError(
            f"{len(bad)} of {len(rollout)} responses have log-probabilities, values or scores that are not finite, "
            f"such as {examples}. Look at the metrics before; lower the learning rates, or set engine.precision=fp32. "
            f"Where it is a reward function that fails, mend it: ppo.reward_on_error=drop has named the error."
        )
    log.warning("left out %d of %d responses with numbers that are not finite: %s", len(bad), len(rollout), examples)
    return rollout.rows(good.nonzero().flatten())


_NUMBERS = ("logprobs", "reference_logprobs", "generation_logprobs", "values", "kl", "entropy", "raw_scores", "scores")
