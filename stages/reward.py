"""Reward modelling: a trunk with a scalar head learns which of two responses people prefer.

Left out: several objectives, ordinal ratings. Run: `python run_pipeline.py stage=reward`.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from data.collate import collate_preferences
from data.preferences import preferences
from rlhf.algorithms.preference import pairwise_loss
from rlhf.config import RewardConfig, RunConfig
from rlhf.dist import World
from rlhf.engine.engine import Engine
from rlhf.evaluation import PreferenceResult, evaluate_preferences
from rlhf.models.positions import position_ids
from rlhf.models.scalar_head import last_token_scores, scalar_head_model
from rlhf.types import PreferenceBatch
from stages.handover import Record
from stages.model_folders import open_engine
from stages.session import open_session, stage_tokenizer
from stages.supervised import Outcome, held_out_batches, supervise, train_loader


class Pairwise:
    """Score the chosen response above the rejected one (Bradley and Terry 1952)."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config

    def count(self, batch: PreferenceBatch) -> Tensor:
        """Pairs of a micro-batch."""
        return torch.tensor(len(batch.margin), device=batch.margin.device)

    def outcome(self, engine: Engine, batch: PreferenceBatch, *, denominator: Tensor) -> Outcome:
        """Loss of the pairs, both responses in one forward."""
        per_position = engine(batch.input_ids, batch.attention_mask, position_ids=position_ids(batch.attention_mask))
        chosen, rejected = last_token_scores(per_position, batch.attention_mask).chunk(2)
        result = pairwise_loss(
            chosen,
            rejected,
            margin=batch.margin if self._config.use_margin else None,
            center_coef=self._config.center_coef,
            denominator=denominator,
        )
        return Outcome(result.loss, {"train/accuracy": result.accuracy, "train/margin": result.margin})


def run_reward(run: RunConfig, world: World) -> Record:
    """Train `reward/model` and leave its record, with the held-out mean and deviation that PPO normalises by."""
    config = run.reward
    assert config is not None
    tokenizer = stage_tokenizer(run, config.init_from)
    splits = preferences(run.data, config, tokenizer=tokenizer)
    collate = partial(collate_preferences, pad_id=int(tokenizer.pad_token_id))
    loader = train_loader(splits.train, collate, config=config, world=world)
    held_out = held_out_batches(splits.eval, collate, config=config, world=world)
    with open_session(run, "reward", world=world, tokenizer=tokenizer, total_steps=loader.steps) as session:
        blueprint = scalar_head_model(
            config.init_from,
            num_layers=config.num_layers,
            dropout=config.dropout,
            lora=config.lora,
            seed=config.seed,
        )
        engine = open_engine(
            blueprint, config=config.engine, world=world, optimizer=config.optimizer, total_steps=loader.steps
        )
        with closing(engine):
            supervise(
                session,
                engine,
                loader=loader,
                objective=Pairwise(config),
                evaluate=lambda: _metrics(evaluate_preferences(engine, held_out)),
                eval_every=config.eval_every,
                data=splits.fingerprint,
            )
            session.export()
        return session.finish(score_units=lambda after: (after["eval/score_mean"], after["eval/score_std"]))


def _metrics(result: PreferenceResult) -> dict[str, float]:
    return {
        "eval/loss": result.loss,
        "eval/accuracy": result.accuracy,
        "eval/margin": result.margin,
        "eval/score_mean": result.mean,
        "eval/score_std": result.std,
        "eval/pairs": result.count,
    }
