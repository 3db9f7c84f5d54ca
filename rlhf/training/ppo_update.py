"""The PPO update: advantages of a rollout, then epochs of minibatches that update actor and critic.

Every rank holds the whole rollout and trains its share of each minibatch; losses are divided by the counted tokens of
the whole minibatch, so micro-batches and ranks change nothing but memory and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from rlhf.algorithms.groups import group_advantages
from rlhf.algorithms.kl import clamped, kl_estimate
from rlhf.algorithms.masked import masked_mean, masked_whiten
from rlhf.algorithms.ppo import Advantages, gae, policy_loss, value_loss
from rlhf.config.ppo_config import AdvantageKind, PPOConfig
from rlhf.engine.engine import Engine, step_together
from rlhf.forward_passes import critic_values, response_statistics
from rlhf.rollout import Models
from rlhf.runtime.dist import World, max_over_ranks
from rlhf.training.supervised_step import summed
from rlhf.types import PPOBatch, Rollout

KL_IN_LOSS = (AdvantageKind.grpo, AdvantageKind.dr_grpo)
"""Advantage kinds whose KL penalty is in the loss instead of in the reward."""


def advantages_of(rollout: Rollout, rewards: Tensor, *, config: PPOConfig) -> Advantages:
    """Advantages and returns `[B, R]`: from the critic, or from the other responses to the same prompt.

    A group's advantage is the same for each token of a response and is never whitened, which would weigh responses by
    their lengths. rloo compares score and KL penalty together, as its paper does. grpo and dr_grpo compare scores
    alone: their KL is in the loss (see `policy_gradient`), for a group of equal scores must not learn from KL noise.
    Responses that were left out of the rollout are left out of their group.
    """
    mask = rollout.response_mask
    if config.advantage is AdvantageKind.gae:
        estimate = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        if config.whiten:
            estimate = estimate._replace(advantages=masked_whiten(estimate.advantages, mask))
        return estimate
    totals = rewards.sum(-1) if config.advantage is AdvantageKind.rloo else rollout.scores
    groups = rollout.sample_ids // config.samples_per_prompt
    per_response = group_advantages(totals, groups=groups, kind=config.advantage, eps=config.advantage_eps)
    return Advantages(advantages=per_response[:, None] * mask, returns=totals[:, None] * mask)


def minibatches(batch: PPOBatch, config: PPOConfig, *, seed: int) -> Iterator[PPOBatch]:
    """One epoch over the rollout in a random order that depends on the seed alone.

    Each has `minibatch_size` rows; after rows were left out of the rollout, sizes differ by at most one.
    """
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    for rows in order.tensor_split(-(-len(order) // config.minibatch_size)):
        yield batch.rows(rows)


def share_of(minibatch: PPOBatch, config: PPOConfig, *, world: World) -> list[PPOBatch]:
    """This rank's micro-batches, by length and trimmed; equally many on every rank: collectives must match."""
    own = minibatch.pieces(config.micro_batch_size, ranks=world.size)[world.rank :: world.size]
    return [minibatch.rows(piece).trimmed() if len(piece) else _filler(minibatch) for piece in own]


def _filler(minibatch: PPOBatch) -> PPOBatch:
    """A row with an empty mask, for a rank without rows: the other ranks' collectives need its forward and backward."""
    row = minibatch.rows(torch.zeros(1, dtype=torch.int64))
    return replace(row, response_mask=torch.zeros_like(row.response_mask)).trimmed()


def update_policy(
    models: Models, batch: PPOBatch, *, config: PPOConfig, iteration: int, kl_coef: float = 0.0
) -> dict[str, float]:
    """Train on one rollout for several epochs of minibatches; returns metrics, mostly means over all updates.

    Args:
        models: actor and critic are trained.
        batch: the rollout of all ranks.
        config: sizes, clips and coefficients.
        iteration: number of the iteration, from 1: seeds the order of minibatches, and ends the critic's warm-up.
        kl_coef: weight of the KL in the loss, for the advantage kinds in `KL_IN_LOSS`.
    """
    actor = models.actor if iteration > config.critic_warmup else None
    learning = {name: engine for name, engine in (("actor", actor), ("critic", models.critic)) if engine is not None}
    history: list[dict[str, float]] = []
    epochs = 0
    while epochs < config.epochs and not _exceeds_target_kl(history, config.target_kl):
        epochs += 1
        for minibatch in minibatches(batch, config, seed=(config.seed * 1_000_003 + iteration) * 1_009 + epochs):
            history.append(update(models, learning, minibatch=minibatch, config=config, kl_coef=kl_coef))
    for engine in learning.values():  # updates that target_kl skipped still count for the learning-rate schedule
        engine.advance(config.updates_per_iteration - len(history))
    return _over_updates(history) | ({} if actor is None else {"actor/epochs": float(epochs)})


def update(
    models: Models, learning: dict[str, Engine], *, minibatch: PPOBatch, config: PPOConfig, kl_coef: float
) -> dict[str, float]:
    """One optimizer step of each model in `learning`; the critic's backward follows the actor's step.

    If both share a loss scale (fp16), they step together: neither may train on a batch that the other has skipped.
    """
    micro_batches = share_of(minibatch, config, world=models.actor.world)
    denominator = minibatch.response_mask.sum().clamp(min=1)
    together = len({id(engine.loss_scale) for engine in learning.values()}) < len(learning)
    measured: dict[str, float] = {}
    if "actor" in learning:
        measured |= policy_gradient(
            models.actor, micro_batches, config=config, denominator=denominator, kl_coef=kl_coef
        )
        measured |= take_steps(actor=models.actor) if not together else {}
    if "critic" in learning:
        measured |= value_gradient(models, micro_batches, config=config, denominator=denominator)
        measured |= take_steps(**learning) if together else take_steps(critic=learning["critic"])
    return measured


def _exceeds_target_kl(history: list[dict[str, float]], target_kl: float | None) -> bool:
    return bool(history) and target_kl is not None and history[-1].get("actor/approxkl_avg", 0.0) > target_kl


_COMBINED: dict[str, Callable[[list[float]], float]] = {
    "actor/ratio_max": max,
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
    """Backward pass of the policy loss; `denominator` is the number of response tokens in the whole minibatch.

    For grpo and dr_grpo the loss also has `kl_coef` times the k3 estimate of KL(actor || reference), whose gradient
    pulls towards the reference where that of k1 would be noise (Shao et al. 2024, eq. 4).
    """
    outcomes, largest = [], torch.zeros((), device=actor.world.device)
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    for index, batch in enumerate(micro_batches, start=1):
        # logprobs and entropy [B, R], B = micro-batch
        temperature = config.sampling.temperature
        statistics = response_statistics(actor, batch, temperature=temperature, chunk_elements=chunk_elements)
        result = policy_loss(
            statistics.logprobs,
            batch.logprobs,
            batch.advantages,
            batch.response_mask,
            clip_range=(config.clip_range, high),
            dual_clip=config.dual_clip,
            denominator=denominator,
        )
        entropy = masked_mean(statistics.entropy, batch.response_mask, denominator=denominator)
        loss = result.loss
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy
        penalty = {}
        if config.advantage in KL_IN_LOSS and batch.reference_logprobs is not None:
            kl = kl_estimate(statistics.logprobs, batch.reference_logprobs, kind="k3")
            loss = loss + kl_coef * masked_mean(kl, batch.response_mask, denominator=denominator)
            cut = masked_mean(clamped(kl, kind="k3"), batch.response_mask, denominator=denominator)
            penalty = {"actor/kl_clamped": cut}
        actor.backward(loss, last=index == len(micro_batches))
        largest = torch.maximum(largest, result.ratio_max)
        outcomes.append(
            {
                "actor/loss": result.loss.detach(),
                "actor/clipfrac_avg": result.clip_fraction,
                "actor/approxkl_avg": result.approx_kl,
                "actor/ratio_mean": result.ratio_mean,
                "actor/entropy": entropy.detach(),
                **penalty,
            }
        )
    # Collectives: sums and the maximum over ranks; float() waits for the device, once per minibatch.
    return summed(outcomes) | {"actor/ratio_max": float(max_over_ranks(largest))}


def value_gradient(
    models: Models, micro_batches: list[PPOBatch], *, config: PPOConfig, denominator: Tensor
) -> dict[str, float]:
    """Backward pass of the value loss; `denominator` as in `policy_gradient`."""
    critic, outcomes = models.critic, []
    assert critic is not None
    for index, batch in enumerate(micro_batches, start=1):
        result = value_loss(
            critic_values(critic, batch, shift=models.value_shift),
            batch.values,
            batch.returns,
            batch.response_mask,
            clip_range=config.value_clip_range,
            denominator=denominator,
        )
        critic.backward(result.loss, last=index == len(micro_batches))
        outcomes.append({"critic/loss": result.loss.detach(), "critic/clipfrac_avg": result.clip_fraction})
    return summed(outcomes)
