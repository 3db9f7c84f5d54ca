"""Reward modelling: a scalar head on a decoder learns which of two responses people prefer.

Left out: several objectives, ordinal ratings. Run: `python run_pipeline.py stage=reward`.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial

from data.collate import collate_preferences
from data.samples import preferences
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.evaluation.metrics import evaluate_preferences
from rlhf.runtime.dist import World
from rlhf.training.supervised_step import Pairwise
from stages.lifecycle.session import open_session, stage_tokenizer
from stages.lifecycle.stage_models import open_model
from stages.lifecycle.stage_record import StageRecord
from stages.supervised import held_out_batches, supervise, train_loader


def run_reward(run: RunConfig, world: World) -> StageRecord:
    """Train `reward/model`; its record holds the held-out mean and deviation by which PPO normalises scores."""
    config = run.reward
    assert config is not None
    (role,) = roles_of(run, "reward")
    tokenizer = stage_tokenizer(run, role.path)
    splits = preferences(run.data, config, tokenizer=tokenizer)
    collate = partial(collate_preferences, pad_id=int(tokenizer.pad_token_id))
    loader = train_loader(splits.train, collate, config=config, world=world)
    held_out = held_out_batches(splits.eval, collate, config=config, world=world)
    with open_session(run, "reward", world=world, tokenizer=tokenizer, total_steps=loader.steps) as session:
        engine = open_model(run, role, world=world, total_steps=loader.steps)
        with closing(engine):
            supervise(
                session,
                engine,
                loader=loader,
                objective=Pairwise(config),
                evaluate=lambda: evaluate_preferences(engine, held_out),
                eval_every=config.eval_every,
                data=splits.fingerprint,
            )
            session.export()
        return session.finish(score_units=lambda after: (after["eval/score_mean"], after["eval/score_std"]))
