"""The PPO update: advantages of a rollout, and epochs of minibatches that improve actor and critic.

Every rank holds the whole rollout and trains its share of each minibatch; losses are divided by the counted tokens of
the whole minibatch, so micro-batches and ranks change nothing but memory and time.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import torch
from torch import Tensor

from rlhf.algorithms.groups import group_advantages
from rlhf.algorithms.masked import masked_whiten
from rlhf.algorithms.ppo import Advantages, gae, policy_loss, value_loss
from rlhf.config.stages import AdvantageKind, PPOConfig
from rlhf.dist import World, max_over_ranks
from rlhf.engine.engine import Engine
from rlhf.models.positions import position_ids
from rlhf.models.scalar_head import response_values
from rlhf.rollout import Models, response_statistics
from rlhf.types import PPOBatch, Rollout
from stages.supervised import summed


def advantages_of(rollout: Rollout, rewards: Tensor, *, config: PPOConfig) -> Advantages:
    """Advantages and returns `[B, R]`: from the critic, or from the other responses to the same prompt.

    A group's advantage compares whole responses, score and KL penalty together, and is the same for each token.
    """
    mask = rollout.response_mask
    if config.advantage is AdvantageKind.gae:
        estimate = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
    else:
        totals = rewards.sum(-1)
        per_response = group_advantages(totals, group_size=config.samples_per_prompt, kind=config.advantage)
        estimate = Advantages(advantages=per_response[:, None] * mask, returns=totals[:, None] * mask)
    if not config.whiten:
        return estimate
    return estimate._replace(advantages=masked_whiten(estimate.advantages, mask))


def minibatches(batch: PPOBatch, config: PPOConfig, *, seed: int) -> Iterator[PPOBatch]:
    """One epoch over the rollout in random order, which depends on the seed alone."""
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(config.minibatch_size):
        yield batch.rows(rows)


def share_of(minibatch: PPOBatch, config: PPOConfig, *, world: World) -> list[PPOBatch]:
    """This rank's micro-batches, of similar lengths and without useless columns."""
    by_length = minibatch.attention_mask.sum(-1).argsort(stable=True)
    pieces = by_length.split(config.micro_batch_size)[world.rank :: world.size]
    return [minibatch.rows(piece).trimmed() for piece in pieces]


def improve(models: Models, batch: PPOBatch, *, config: PPOConfig, iteration: int) -> dict[str, float]:
    """Epochs of minibatches over one rollout; diagnostics are means over all updates.

    Args:
        models: actor and critic learn.
        batch: the rollout of all ranks.
        config: sizes, clips and coefficients.
        iteration: number of the iteration, from 1: seeds the order of minibatches, and ends the critic's warm-up.
    """
    world, history, epochs = models.actor.world, [], 0
    for epoch in range(config.epochs):
        epochs += 1
        for minibatch in minibatches(batch, config, seed=(config.seed * 1_000_003 + iteration) * 1_009 + epoch):
            micro_batches = share_of(minibatch, config, world=world)
            denominator = minibatch.response_mask.sum()
            update: dict[str, float] = {}
            if iteration > config.critic_warmup:
                update |= update_actor(models.actor, micro_batches, config=config, denominator=denominator)
            if models.critic is not None:
                update |= update_critic(models.critic, micro_batches, config=config, denominator=denominator)
            history.append(update)
        if config.target_kl is not None and history[-1].get("policy/approxkl_avg", 0.0) > config.target_kl:
            break
    return _over_updates(history) | {"policy/epochs": float(epochs)}


_COMBINED = {"policy/ratio_max": max, "actor/skipped_steps": sum, "critic/skipped_steps": sum}
"""How updates are combined into one number, where not by their mean."""


def _over_updates(history: list[dict[str, float]]) -> dict[str, float]:
    values = {name: [update[name] for update in history] for name in history[0]}
    return {name: _COMBINED.get(name, fmean)(numbers) for name, numbers in values.items()}


def update_actor(
    actor: Engine, micro_batches: list[PPOBatch], *, config: PPOConfig, denominator: Tensor
) -> dict[str, float]:
    """One optimizer step of the policy; `denominator` counts the response tokens of the whole minibatch."""
    outcomes, largest = [], torch.zeros((), device=actor.world.device)
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    for index, batch in enumerate(micro_batches, start=1):
        statistics = response_statistics(
            actor,
            batch.sequences,
            attention_mask=batch.attention_mask,
            num_response=batch.response_mask.shape[1],
            temperature=config.sampling.temperature,
        )
        result = policy_loss(
            statistics.logprobs,
            batch.logprobs,
            batch.advantages,
            batch.response_mask,
            clip_range=(config.clip_range, high),
            dual_clip=config.dual_clip,
            denominator=denominator,
        )
        entropy = (statistics.entropy * batch.response_mask).sum() / denominator
        actor.backward(result.loss - config.entropy_coef * entropy, last=index == len(micro_batches))
        largest = torch.maximum(largest, result.ratio_max)
        outcomes.append(
            {
                "policy/loss": result.loss.detach(),
                "policy/clipfrac_avg": result.clip_fraction,
                "policy/approxkl_avg": result.approx_kl,
                "policy/ratio_mean": result.ratio_mean,
                "policy/entropy": entropy.detach(),
            }
        )
    step = actor.step()
    metrics = summed(outcomes) | {"actor/grad_norm": step.grad_norm, "actor/lr": step.lr}
    metrics["actor/skipped_steps"] = float(step.skipped)
    return metrics | {"policy/ratio_max": float(max_over_ranks(largest))}


def update_critic(
    critic: Engine, micro_batches: list[PPOBatch], *, config: PPOConfig, denominator: Tensor
) -> dict[str, float]:
    """One optimizer step of the value function; `denominator` as in `update_actor`."""
    outcomes = []
    for index, batch in enumerate(micro_batches, start=1):
        per_position = critic(batch.sequences, batch.attention_mask, position_ids=position_ids(batch.attention_mask))
        result = value_loss(
            response_values(per_position, batch.response_mask.shape[1]),
            batch.values,
            batch.returns,
            batch.response_mask,
            clip_range=config.value_clip_range,
            denominator=denominator,
        )
        critic.backward(result.loss, last=index == len(micro_batches))
        outcomes.append({"val/loss": result.loss.detach(), "val/clipfrac_avg": result.clip_fraction})
    step = critic.step()
    metrics = summed(outcomes) | {"critic/grad_norm": step.grad_norm, "critic/lr": step.lr}
    return metrics | {"critic/skipped_steps": float(step.skipped)}
