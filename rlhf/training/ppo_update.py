"""The PPO update: advantages of a rollout, then epochs of minibatches that update actor and critic.

Every rank knows the numbers of the whole rollout, and receives the sequences of its share of each minibatch. Losses are
divided by the counted tokens of the whole minibatch, so micro-batches and ranks change nothing but memory and time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.groups import group_advantages
from rlhf.algorithms.kl import clamped, kl_estimate
from rlhf.algorithms.logprobs import TokenStatistics
from rlhf.algorithms.loss_weights import aggregation_weights, mismatch_weights
from rlhf.algorithms.masked import masked_mean, masked_whiten, weighted_sum
from rlhf.algorithms.ppo import Advantages, Surrogate, gae, policy_loss, value_loss
from rlhf.algorithms.supervised_losses import count_targets
from rlhf.config.objective_config import AdvantageKind, AdvantageScale, MismatchCorrection
from rlhf.config.ppo_config import PPOConfig
from rlhf.engine.engine import Engine, step_together
from rlhf.forward_passes import critic_values, response_statistics
from rlhf.hidden_states import after_frozen_layers
from rlhf.rollout import Models
from rlhf.runtime.dist import max_over_ranks, sum_over_ranks
from rlhf.training.minibatches import all_minibatches, share_of
from rlhf.training.supervised_step import next_token_loss, summed
from rlhf.types import Experience, PPOBatch, Rollout, SFTBatch

log = logging.getLogger(__name__)

Part = Callable[[str], AbstractContextManager[Any]]
"""Measures a part of a phase, by its name, as `Stopwatch.part` does."""


def advantages_of(rollout: Rollout, rewards: Tensor, *, config: PPOConfig) -> Advantages:
    """Advantages and returns `[B, R]`: from the critic, the bare returns, or the other responses to the same prompt.

    A group's advantage is the same for each token of a response, and compares whole rewards: the score, and the KL
    penalty where that is in the reward. Responses that were left out of the rollout are left out of their group.
    """
    mask = rollout.response_mask
    if config.compares_groups:
        totals = rewards.sum(-1)  # [B, R] -> [B]
        per_response = group_advantages(
            totals,
            groups=rollout.sample_ids // config.samples_per_prompt,
            baseline="mean" if config.advantage is AdvantageKind.grpo else "others",
            scale="none" if config.scale_advantages is AdvantageScale.whiten else config.scale_advantages,
            eps=config.advantage_eps,
        )
        estimate = Advantages(advantages=per_response[:, None] * mask, returns=totals[:, None] * mask)
    else:  # without a critic values are 0, and with lambda 1 the estimate is then the return
        lam = config.lam if config.has_critic else 1.0
        estimate = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=lam)
    if config.scale_advantages is AdvantageScale.whiten:
        estimate = estimate._replace(advantages=masked_whiten(estimate.advantages, mask))
    return estimate


def training_batch(rollout: Rollout, estimate: Advantages, *, config: PPOConfig, dtype: torch.dtype) -> Experience:
    """What the updates on a rollout need; `dtype` is that in which the actor computes.

    It decides once which tokens count in the actor's loss, and their importance weights for the difference between the
    paths that generate and that train. The critic learns from all of them.
    """
    batch = Experience.from_rollout(rollout, advantages=estimate.advantages, returns=estimate.returns)
    if config.mask_truncated:
        batch = replace(batch, loss_mask=rollout.response_mask & rollout.ended[:, None])
    is_exact = dtype == torch.float32 and config.generation_backend is None
    kind, bounds = config.mismatch.kind(is_exact), (config.mismatch.low, config.mismatch.high)
    if kind is not MismatchCorrection.none:
        weights = mismatch_weights(
            rollout.logprobs, rollout.generation_logprobs, rollout.response_mask, kind=kind, bounds=bounds
        )
        batch = replace(batch, correction=weights)
    return batch


def mismatch_metrics(rollout: Rollout, batch: Experience) -> dict[str, float]:
    """How far the path that trains is from the one that generated, and what the correction does about it."""
    mask = rollout.response_mask
    ratio = (rollout.logprobs - rollout.generation_logprobs).exp()  # [B, R]
    metrics = {"rollout/mismatch_mean": float(masked_mean(ratio, mask)), "rollout/mismatch_max": float(ratio.max())}
    if batch.correction is not None:
        metrics["rollout/mismatch_weight"] = float(masked_mean(batch.correction, mask))
        metrics["rollout/mismatch_left_out"] = float(masked_mean(batch.correction == 0, mask))
    return metrics


def update_policy(
    models: Models,
    batch: Experience,
    *,
    config: PPOConfig,
    iteration: int,
    kl_coef: float = 0.0,
    texts: Iterable[list[SFTBatch]] | None = None,
    part: Part = nullcontext,
) -> dict[str, float]:
    """Train on one rollout for several epochs of minibatches; returns metrics, mostly means over all updates.

    Args:
        models: actor and critic are trained.
        batch: what is known of the rollout of all ranks.
        config: sizes, clips and coefficients.
        iteration: number of the iteration, from 1: seeds the order of minibatches, and ends the critic's warm-up.
        kl_coef: weight of the KL in the loss, if `ppo.kl.in_loss` puts it there.
        texts: this rank's micro-batches of text for the steps of the actor; each `iter` goes on where the last one
            stopped. None where `ppo.ptx.coef` is 0.
        part: measures the seconds of actor and critic.
    """
    actor = models.actor if iteration > config.critic_warmup else None
    learning = {name: engine for name, engine in (("actor", actor), ("critic", models.critic)) if engine is not None}
    history: list[dict[str, float]] = []
    for minibatch in all_minibatches(batch, config, iteration=iteration):
        text = next(iter(texts)) if texts is not None and actor is not None else []
        found = update(models, learning, minibatch=minibatch, config=config, kl_coef=kl_coef, text=text, part=part)
        history.append(found | {"rollout/trained_tokens": float(minibatch.held.num_tokens.sum())})  # on the CPU
        if config.target_kl is not None and history[-1].get("actor/approxkl_avg", 0.0) > config.target_kl:
            break  # on all ranks: the KL is that of the whole minibatch
    for engine in learning.values():  # updates that target_kl skipped still count for the learning-rate schedule
        engine.advance(config.updates_per_iteration - len(history))
    epochs = len(history) / -(-len(batch) // config.minibatch_size)
    return _over_updates(history) | ({} if actor is None else {"actor/epochs": epochs})


def update(
    models: Models,
    learning: dict[str, Engine],
    *,
    minibatch: Experience,
    config: PPOConfig,
    kl_coef: float,
    text: Sequence[SFTBatch] = (),
    part: Part = nullcontext,
) -> dict[str, float]:
    """One optimizer step of each model in `learning`; the critic's backward follows the actor's step.

    If both share a loss scale (fp16), they step together: neither may train on a batch that the other has skipped.
    """
    counted = minibatch.response_mask if minibatch.loss_mask is None else minibatch.loss_mask
    weights = aggregation_weights(counted, kind=config.loss_aggregation, length=config.max_response_tokens)
    micro_batches = share_of(replace(minibatch, loss_weights=weights), config)
    denominator = minibatch.response_mask.sum().clamp(min=1)
    together = len({id(engine.loss_scale) for engine in learning.values()}) < len(learning)
    measured: dict[str, float] = {}
    if "actor" in learning:
        with part("train/actor"):
            # First, as the last micro-batch of a step must be one of the minibatch.
            measured |= text_gradient(models.actor, text, coef=config.ptx.coef) if text else {}
            measured |= policy_gradient(
                models.actor, micro_batches, config=config, denominator=denominator, kl_coef=kl_coef
            )
            measured |= take_steps(actor=models.actor) if not together else {}
    if "critic" in learning:
        with part("train/critic"):  # and both steps, where they are taken together
            measured |= value_gradient(models, micro_batches, config=config, denominator=denominator)
            measured |= take_steps(**learning) if together else take_steps(critic=learning["critic"])
    return measured


_COMBINED: dict[str, Callable[[list[float]], float]] = {
    "actor/ratio_max": max,
    "rollout/trained_tokens": sum,
    **{f"{name}/{steps}": sum for name in ("actor", "critic") for steps in ("skipped_steps", "scale_search_steps")},
    **{f"{name}/loss_scale": min for name in ("actor", "critic")},
}
"""Metrics that are combined over the updates by something else than their mean."""


def _over_updates(history: list[dict[str, float]]) -> dict[str, float]:
    values = {name: [update[name] for update in history] for name in history[0]}
    return {name: _COMBINED.get(name, fmean)(numbers) for name, numbers in values.items()}


def take_steps(**engines: Engine) -> dict[str, float]:
    """One optimizer step of each named engine; engines that share a loss scale step or skip together."""
    measured: dict[str, float] = {}
    for name, step in zip(engines, step_together(*engines.values()), strict=True):
        measured |= step.metrics(name)
    return measured


def policy_gradient(
    actor: Engine,
    micro_batches: list[PPOBatch],
    *,
    config: PPOConfig,
    denominator: Tensor,
    kl_coef: float = 0.0,
    chunk_elements: int | None = None,
) -> dict[str, float]:
    """Backward pass of the actor's loss.

    Args:
        actor: the model in training.
        micro_batches: this rank's, with `loss_weights` of the whole minibatch.
        config: kind of loss, clips and coefficients.
        denominator: response tokens in the whole minibatch, by which statistics are divided.
        kl_coef: price of a nat in the loss.
        chunk_elements: logits at once, see `response_statistics`.
    """
    outcomes, largest = [], torch.zeros((), device=actor.world.device)
    temperature = config.sampling.temperature
    for index, batch in enumerate(micro_batches, start=1):
        # logprobs and entropy [B, R], B = micro-batch
        with after_frozen_layers(actor, batch, states=batch.actor_states):
            statistics = response_statistics(
                actor,
                batch,
                temperature=temperature,
                entropy_grad=bool(config.entropy_coef),
                chunk_elements=chunk_elements,
            )
        result = actor_loss(statistics, batch, config=config, denominator=denominator, kl_coef=kl_coef)
        actor.backward(result.loss, last=index == len(micro_batches))
        largest = torch.maximum(largest, result.ratio_max)
        outcomes.append(result.outcome)
    # Collectives: sums and the maximum over ranks; float() waits for the device, once per minibatch.
    return summed(outcomes) | {"actor/ratio_max": float(max_over_ranks(largest))}


def text_gradient(actor: Engine, micro_batches: Sequence[SFTBatch], *, coef: float) -> dict[str, float]:
    """Backward pass of `coef` times the mean loss of the tokens of text, over all micro-batches and ranks.

    The mean is over these tokens alone (InstructGPT, Ouyang et al. 2022, eq. 2): how many tokens the minibatch of
    responses has does not change the weight of text beside it.
    """
    batches = [batch.to(actor.world.device) for batch in micro_batches]
    counts = torch.stack([count_targets(batch.target_mask) for batch in batches])
    denominator = sum_over_ranks(counts.sum()).clamp(min=1)  # a collective
    outcomes = [text_backward(actor, batch, coef=coef, denominator=denominator) for batch in batches]
    return summed(outcomes)


def text_backward(
    actor: Engine, batch: SFTBatch, *, coef: float, denominator: Tensor, chunk_elements: int | None = None
) -> dict[str, Tensor]:
    """Forward and backward of a micro-batch of text, before those of the responses; metrics that add up."""
    result = next_token_loss(actor, batch, denominator=denominator, chunk_elements=chunk_elements)
    actor.backward(coef * result.loss, last=False)
    return {"ptx/loss": result.loss.detach(), "ptx/tokens": result.num_tokens}


class ActorLoss(NamedTuple):
    """The actor's loss on a micro-batch."""

    loss: Tensor  # scalar, with entropy bonus and KL
    outcome: dict[str, Tensor]  # detached metrics, which add up to those of the minibatch
    ratio_max: Tensor  # scalar


def actor_loss(
    statistics: TokenStatistics, batch: PPOBatch, *, config: PPOConfig, denominator: Tensor, kl_coef: float
) -> ActorLoss:
    """The policy loss, less the entropy bonus, plus the KL if `ppo.kl.in_loss` puts it there.

    The KL in the loss pulls by the gradient of its estimate: that of k3 towards the reference, where that of k1 would
    be noise (Shao et al. 2024, eq. 4). Arguments as for `policy_gradient`.
    """
    mask, weights = batch.response_mask, batch.loss_weights
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    result = policy_loss(
        statistics.logprobs,
        batch.logprobs,
        batch.advantages,
        mask,
        surrogate=Surrogate(
            (config.clip_range, high), kind=config.policy_loss, ratio=config.ratio_level, dual_clip=config.dual_clip
        ),
        weights=weights if batch.correction is None or weights is None else weights * batch.correction,
        denominator=denominator,
    )
    outcome = {
        "actor/loss": result.loss.detach(),
        "actor/clipfrac_avg": result.clip_fraction,
        "actor/approxkl_avg": result.approx_kl,
        "actor/ratio_mean": result.ratio_mean,
        "actor/entropy": masked_mean(statistics.entropy.detach(), mask, denominator=denominator),
    }
    loss = result.loss
    if config.entropy_coef:
        bonus = weighted_sum(statistics.entropy, mask, weights=weights, denominator=denominator)
        loss = loss - config.entropy_coef * bonus
    if config.kl.in_loss and batch.reference_logprobs is not None:
        kl = kl_estimate(statistics.logprobs, batch.reference_logprobs, kind=config.kl.kind)
        loss = loss + kl_coef * weighted_sum(kl, mask, weights=weights, denominator=denominator)
        cut = clamped(kl, kind=config.kl.kind)
        outcome["actor/kl_clamped"] = masked_mean(cut, mask, denominator=denominator)
    return ActorLoss(loss, outcome, result.ratio_max)


def update_reference(models: Models, config: PPOConfig, *, iteration: int) -> dict[str, float]:
    """Move the reference towards the actor if it is due; from the next rollout on, KL is measured from there."""
    if not config.reference_update_every:
        return {}
    is_due = iteration % config.reference_update_every == 0
    if is_due:
        assert models.reference is not None, "the settings were checked"
        models.reference.follow(models.actor, share=config.reference_update_mix)
        log.info(
            "iteration %d: the reference has moved %g of the way to the actor", iteration, config.reference_update_mix
        )
    return {"objective/reference_updated": float(is_due)}


def value_gradient(
    models: Models, micro_batches: list[PPOBatch], *, config: PPOConfig, denominator: Tensor
) -> dict[str, float]:
    """Backward pass of the value loss; `denominator` as in `policy_gradient`."""
    critic, outcomes = models.critic, []
    assert critic is not None
    for index, batch in enumerate(micro_batches, start=1):
        with after_frozen_layers(critic, batch, states=batch.critic_states):
            values = critic_values(critic, batch, shift=models.value_shift)  # [B, R]
        result = value_loss(
            values,
            batch.values,
            batch.returns,
            batch.response_mask,
            clip_range=config.value_clip_range,
            denominator=denominator,
        )
        critic.backward(result.loss, last=index == len(micro_batches))
        outcomes.append({"critic/loss": result.loss.detach(), "critic/clipfrac_avg": result.clip_fraction})
    return summed(outcomes)
