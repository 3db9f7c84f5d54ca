"""PPO: the actor learns to score high with reward models and functions while staying close to the reference.

One iteration: collect a rollout, turn scores and KL into token rewards, rewards into advantages, and improve actor and
critic for a few epochs of minibatches. Left out: asynchronous rollouts, tools, several turns.
Run: `python run_pipeline.py stage=ppo`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.loader import PromptLoader, TrainLoader, collate_demonstrations, evaluation_prompts
from data.samples import Demonstration, Prompt, prompts, ptx_texts
from rlhf.algorithms.kl import AdaptiveKL, FixedKL, KLController
from rlhf.algorithms.ppo import token_rewards
from rlhf.config.engine_config import Precision
from rlhf.config.objective_config import KLConfig
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.engine.engine import Engine
from rlhf.engine.loss_scale import LossScale
from rlhf.evaluation.metrics import GoldMetric, critic_metrics, load_gold, policy_metrics, rollout_metrics, sample_rows
from rlhf.forward_passes import critic_values, response_statistics
from rlhf.generation.backend import Backend
from rlhf.hidden_states import may_begin_late
from rlhf.models.model_folder import local_folder
from rlhf.reward_calls import RewardFunctions
from rlhf.rewards import RewardScorer, ScoredSource, ScoreScale, ScoreShaping, reward_metrics
from rlhf.rollout import (
    Collector,
    Models,
    replace_equal_groups,
    scored_rows,
    share_of_equal_groups,
    without_bad_rows,
)
from rlhf.runtime.dist import World
from rlhf.runtime.errors import RunError
from rlhf.text.tokenizer import decode, stop_token_ids
from rlhf.tracking.timing import Stopwatch
from rlhf.training.ppo_update import advantages_of, mismatch_metrics, training_batch, update_policy, update_reference
from rlhf.types import PromptBatch, Responses, Rollout, SFTBatch
from stages.lifecycle.checkpointing import Stateful, TrainingState
from stages.lifecycle.session import Session, open_session, stage_tokenizer, with_average
from stages.lifecycle.stage_models import known_quality, open_model, scored_sources, stored_scale
from stages.lifecycle.stage_record import StageRecord

_EVALUATION_SEED = 7_919
"""Seed for answering held-out prompts: the same random numbers at every evaluation."""


def run_ppo(run: RunConfig, world: World) -> StageRecord:
    """Train `ppo/actor` and `ppo/critic`."""
    config = run.ppo
    assert config is not None
    tokenizer = stage_tokenizer(run, config.actor)
    functions = RewardFunctions.load(config, stage="ppo")
    splits = prompts(run.data, config, tokenizer=tokenizer, columns=functions.columns)
    more = ptx_texts(run.data, config, tokenizer=tokenizer)
    shaping = score_shaping(config)
    with (
        open_session(run, "ppo", world=world, tokenizer=tokenizer, total_steps=config.iterations) as session,
        closing(load_models(run, world, sources=shaping.sources)) as models,
    ):
        evaluator = HeldOutEvaluator.of(session, splits.eval, shaping=shaping)
        collector = new_collector(session, models, functions=functions, shaping=shaping)
        kl = kl_controller(config.kl)
        loader = prompt_loader(session, splits.train)
        text = text_loader(session, more.train)
        others: dict[str, Stateful] = {"kl": kl, "loader": loader, "scores": shaping}
        others |= {"held_out_scores": evaluator.shaping} | ({} if text is None else {"ptx": text})
        following = {"reference": models.reference} if models.reference and config.reference_update_every else {}
        state = TrainingState(learners(models), others, splits.fingerprint + more.fingerprint, following)
        known = known_quality([source.source for source in config.model_sources().values()])
        session.begin(state, evaluate=lambda: evaluator.evaluate(collector, step=0), known=known)
        for step, batch in session.steps(loader):
            rollout, drawn = next_rollout(collector, batch, loader=loader)  # B sequences, on every rank alike
            # Rewards, advantages and returns are [B, R]; masked positions hold 0.
            price = 0.0 if config.kl.in_loss else kl.value  # reward lost per nat
            rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=price)
            estimate = advantages_of(rollout, rewards, config=config)
            ppo_batch = training_batch(rollout, estimate, config=config, dtype=models.actor.dtype)
            update = partial(update_policy, config=config, iteration=step, texts=text, part=session.timer.part)
            with session.timer("train"):
                metrics = update(models, ppo_batch, kl_coef=kl.value)
            metrics |= drawn | mismatch_metrics(rollout, ppo_batch)
            metrics |= rollout_metrics(rollout, kl_coef=price, kl_kind=config.kl.kind)
            metrics |= critic_metrics(rollout, estimate.returns) if models.critic is not None else {}
            metrics |= shaping.metrics(rollout.source_scores) | {"objective/kl_coef": kl.value}
            if step > config.critic_warmup and config.measures_kl:
                kl.update(metrics["objective/kl"], len(rollout))
            evaluates = session.evaluates_at(step, config.eval_every)
            evaluation = evaluator.evaluate(collector, step=step) if evaluates else {}
            metrics |= update_reference(models, config, iteration=step)
            session.finish_step(step, metrics, evaluation=evaluation, num_tokens=tokens_by_phase(rollout, metrics))
        session.export()
        units = (models.value_shift, 1.0)  # mean and deviation of the critic's outputs
        return session.finish(score_units=None if models.critic is None else lambda _: units, data=splits.counts)


def tokens_by_phase(rollout: Rollout, metrics: Mapping[str, float]) -> dict[str, float]:
    """Tokens of all ranks that each phase of an iteration worked on; of the step, those of the rollout once."""
    phases = (("generate", "generated"), ("score", "scored"), ("train", "trained"))
    tokens = {"step": float(rollout.held.num_tokens.sum())}  # on the CPU
    return tokens | {phase: metrics[f"rollout/{name}_tokens"] for phase, name in phases}


def score_shaping(config: PPOConfig) -> ScoreShaping:
    """From the scores of the sources to those that PPO is paid."""
    try:
        sources = scored_sources(config)
    except ValueError as error:
        raise RunError(str(error)) from error
    return ScoreShaping(config.score, sources, config.max_response_tokens, config.reward_combination)


def next_rollout(
    collector: Collector, prompts: PromptBatch, *, loader: PromptLoader
) -> tuple[Rollout, dict[str, float]]:
    """The rollout of an iteration, and metrics of how it was drawn.

    Args:
        collector: generates and scores.
        prompts: this rank's.
        loader: gives further prompts, which later iterations will not see, if groups of equal scores are replaced.
    """
    config, tokens = collector.config, Counter[str]()
    found = list[Tensor]()  # the scores of every response that was drawn

    def collect(batch: PromptBatch) -> Rollout:
        rollout = collector.collect(batch, seed=config.seed, step=loader.iteration - 1)
        found.append(rollout.source_scores)
        tokens["generated"] += int(rollout.lengths.sum())  # waits for the device, which scoring has done before
        tokens["scored"] += int(rollout.held.num_tokens.sum())
        return without_bad_rows(scored_rows(rollout))

    rollout = collect(prompts)
    metrics = dict[str, float]()
    unscored = int(found[0].isnan().all(-1).sum())
    left_out = config.rollout_size - unscored - len(rollout)
    if config.dynamic_sampling:
        rollout, metrics = replace_equal_groups(
            rollout, lambda: collect(loader.further()), config=config, pad_id=collector.pad_id
        )
    elif config.compares_groups:
        metrics = {"rollout/groups_equal": share_of_equal_groups(rollout, config)}
    metrics |= reward_metrics(collector.scorer.names, torch.cat(found)) | collector.scorer.functions.metrics()
    episodes = loader.drawn * config.rollout_size
    metrics |= {f"rollout/{name}_tokens": float(count) for name, count in tokens.items()}
    counts = {"rollout/left_out": left_out, "rollout/unscored": unscored, "rollout/episodes": episodes}
    return rollout, metrics | counts


def learners(models: Models) -> dict[str, Engine]:
    """The models that are trained, by name."""
    return {"actor": models.actor} | ({} if models.critic is None else {"critic": models.critic})


def load_models(run: RunConfig, world: World, *, sources: Sequence[ScoredSource]) -> Models:
    """The models of PPO; with LoRA the reference is the actor without its adapters, unless one is named.

    The critic starts as the first reward model, brought to the units of the scores: where they are normalised or
    weighted, its head is scaled, and what the head has no bias for is subtracted from its values.
    """
    config = run.ppo
    assert config is not None
    roles, loss_scale = roles_of(run, "ppo"), shared_scale(config)
    units = critic_units(config, sources) if any(role.name == "critic" for role in roles) else ScoreScale()
    engines = {
        role.name: open_model(
            run,
            role,
            world=world,
            total_steps=config.optimizer_steps(role.optimizer, num_rows=0) if role.optimizer else 0,
            loss_scale=loss_scale if role.optimizer else None,
            head_scale=1 / units.std if role.name == "critic" else 1.0,
        )
        for role in roles
    }
    judges = [engines[role.name] for role in roles if role.gives_scores]  # in the order of the settings
    return Models(
        actor=engines["actor"],
        rewards=dict(zip((source.name for source in config.model_sources().values()), judges, strict=True)),
        reference=engines.get("reference"),
        critic=engines.get("critic"),
        begin_late=begin_late(engines) if config.reuse_frozen_layers else frozenset(),
        value_shift=units.mean / units.std,
    )


def begin_late(engines: Mapping[str, Engine]) -> frozenset[str]:
    """Of actor and critic, those that can begin after their frozen layers; every rank tries a small batch."""
    passes: dict[str, Callable[[Any, Responses], Tensor]] = {
        "actor": lambda model, batch: response_statistics(model, batch, temperature=1.0).logprobs,
        "critic": partial(critic_values, shift=0.0),
    }
    return frozenset(
        name for name in passes if name in engines and may_begin_late(engines[name], passes[name], name=name)
    )


def critic_units(config: PPOConfig, sources: Sequence[ScoredSource]) -> ScoreScale:
    """The scale of what the critic's starting point says: of the scores, unless another model is named."""
    if config.critic:
        return (stored_scale(config.critic) if config.score.normalize else None) or ScoreScale()
    first = next(iter(config.model_sources().values()), None)
    if first is None:
        return ScoreScale()
    (source,) = (source for source in sources if source.name == first.name)
    scale = source.scale or ScoreScale()
    return ScoreScale(scale.mean, scale.std / (source.weight or 1.0))


def shared_scale(config: PPOConfig) -> LossScale | None:
    """In fp16, one loss scale for actor and critic, so that both skip the same steps."""
    both = {config.engine.precision, config.critic_engine.precision}
    return LossScale(config.engine) if both == {Precision.fp16} else None


def prompt_loader(session: Session, samples: Sequence[Prompt]) -> PromptLoader:
    """This rank's prompts of every iteration."""
    config = session.run.ppo
    assert config is not None
    return PromptLoader(
        samples,
        rollout_size=config.rollout_size,
        samples_per_prompt=config.samples_per_prompt,
        rank=session.world.rank,
        ranks=session.world.size,
        seed=config.seed,
        iterations=config.iterations,
        pad_id=session.pad_id,
    )


def text_loader(session: Session, samples: Sequence[Demonstration]) -> TrainLoader[Demonstration, SFTBatch] | None:
    """This rank's micro-batches of text for every step of the actor; None where `ppo.ptx.coef` is 0."""
    config = session.run.ppo
    assert config is not None
    if not config.ptx.coef:
        return None
    return TrainLoader(
        samples,
        partial(collate_demonstrations, pad_id=session.pad_id),
        global_batch_size=config.ptx.batch_size,
        limit=config.micro_batch_limit,
        rank=session.world.rank,
        ranks=session.world.size,
        seed=config.seed,
        steps=config.actor_steps,
    )


def new_collector(session: Session, models: Models, *, functions: RewardFunctions, shaping: ScoreShaping) -> Collector:
    """Collects rollouts with the session's tokenizer and timer."""
    config = session.run.ppo
    assert config is not None
    return Collector(
        models=models,
        config=config,
        decode=partial(decode, session.tokenizer),
        pad_id=session.pad_id,
        stop_token_ids=stop_token_ids(session.tokenizer, getattr(models.actor.module, "generation_config", None)),
        scorer=RewardScorer(
            [source.name for source in shaping.sources], models.rewards, functions, config.micro_batch_limit
        ),
        shaping=shaping,
        timer=session.timer,
        backend=generation_backend(config, session.world),
    )


def generation_backend(config: PPOConfig, world: World) -> Backend | None:
    """The generator that `ppo.generation_backend` names, on this rank."""
    if config.generation_backend is None:
        return None
    folder = str(local_folder(config.actor))
    return Backend.open(config.generation_backend, model=folder, rank=world.rank, ranks=world.size)


def kl_controller(config: KLConfig) -> KLController:
    """A fixed coefficient, or an adaptive one if `ppo.kl.target` is set."""
    if config.target > 0:
        return AdaptiveKL(config.coef, target=config.target, horizon=config.horizon)
    return FixedKL(config.coef)


@dataclass(frozen=True)
class HeldOutEvaluator:
    """Has the actor answer the same held-out prompts at every evaluation, with the same random numbers."""

    session: Session
    prompts: PromptBatch | None
    """This rank's share of the prompts; None evaluates nothing."""
    count: int
    """Number of prompts over all ranks; the last ranks repeat some so that all have equally many."""
    gold: dict[str, GoldMetric]
    shaping: ScoreShaping
    """Its running scales are those of the answers before training, or evaluations could not be compared."""

    @classmethod
    def of(cls, session: Session, samples: Sequence[Prompt], *, shaping: ScoreShaping) -> HeldOutEvaluator:
        """Take the first `ppo.eval_prompts` held-out prompts, and scales of its own."""
        config, world = session.run.ppo, session.world
        assert config is not None
        gold = load_gold(session.run.data.gold)
        count, shaping = min(config.eval_prompts, len(samples)), replace(shaping, sources=deepcopy(shaping.sources))
        if count == 0:
            return cls(session, None, count=0, gold=gold, shaping=shaping)
        batch = evaluation_prompts(samples[:count], rank=world.rank, ranks=world.size, pad_id=session.pad_id)
        return cls(session, batch, count=count, gold=gold, shaping=shaping)

    def evaluate(self, collector: Collector, *, step: int) -> dict[str, float]:
        """Answer the prompts, log the samples, and return mean metrics."""
        prompts = self.prompts
        if prompts is None:
            return {}
        # A timer of its own keeps these phases out of the iteration's timing.
        collector = replace(collector, timer=Stopwatch(self.session.world.device), shaping=self.shaping)
        found: list[list[dict[str, Any]]] = []

        def measure() -> dict[str, float]:
            rollout = collector.collect(prompts, seed=_EVALUATION_SEED, step=step, trains=False)
            rows = rollout.rows(torch.arange(self.count))
            if step == 0:
                self.shaping.observe(rows.source_scores)
                rows = collector.with_scores(rows, trains=False)
            sources, is_one_source = collector.scorer.names, self.shaping.is_one_source
            found.append(sample_rows(rows, self.gold, sources=sources, is_one_source=is_one_source))
            metrics = {f"eval/{name}": value for name, value in collector.scorer.functions.metrics().items()}
            metrics["eval/clamped"] = self.shaping.clamped_share(rows.source_scores)
            return metrics | policy_metrics(found[-1])

        with self.session.timer("evaluate"):
            actor = collector.models.actor
            metrics = with_average(actor, measure) if step else measure()  # they are equal before training
        self.session.tracker.samples(step, found[0])
        return metrics
