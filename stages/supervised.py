"""The training stage that SFT and reward modelling share: one optimizer step per batch, evaluations in between.

A story (`sft.py`, `reward.py`) says what is different, its data and its held-out metrics; the stage's settings name the
objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

from data.build_samples import Splits
from data.loader import TrainLoader, evaluation_batches
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.config.stage_configs import SupervisedConfig
from rlhf.engine.engine import Engine
from rlhf.runtime.dist import World
from rlhf.training.supervised_step import Batch, objective_of, take_step
from rlhf.types import EvalBatch
from stages.lifecycle.checkpointing import TrainingState
from stages.lifecycle.session import Session, open_session, stage_tokenizer, with_average
from stages.lifecycle.stage_models import open_model
from stages.lifecycle.stage_record import StageRecord

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SupervisedStage(Generic[Batch]):
    """What distinguishes one supervised stage from another."""

    read: Callable[..., Splits[Any]]
    """Reads, checks and tokenises the data."""
    collate: Callable[..., Batch]
    """Pads samples to a batch."""
    evaluate: Callable[[Engine, Sequence[EvalBatch[Batch]]], Metrics]
    """Computes held-out metrics; a collective."""
    score_units: Callable[[Metrics], tuple[float, float]] | None = None
    """From held-out metrics to mean and standard deviation of the outputs of a scalar head; None without one."""


def run_supervised(run: RunConfig, world: World, *, name: str, stage: SupervisedStage[Batch]) -> StageRecord:
    """Train the model of the stage `name`, export it, and finish the stage."""
    config = run.supervised_config(name)
    (role,) = roles_of(run, name)
    tokenizer = stage_tokenizer(run, role.path)
    splits = stage.read(run.data, config, tokenizer=tokenizer)
    collate = partial(stage.collate, pad_id=int(tokenizer.pad_token_id))
    loader = train_loader(splits.train, collate, config=config, world=world)
    held_out = held_out_batches(splits.eval, collate, config=config, world=world)
    with open_session(run, name, world=world, tokenizer=tokenizer, total_steps=loader.steps) as session:
        engine = open_model(run, role, world=world, total_steps=loader.steps)
        with closing(engine):
            state = TrainingState({role.name: engine}, {"loader": loader}, splits.fingerprint)
            session.begin(state, evaluate=lambda: stage.evaluate(engine, held_out))
            _train(session, engine, stage=stage, loader=loader, held_out=held_out, eval_every=config.eval_every)
            session.export()
        return session.finish(score_units=stage.score_units)


def _train(
    session: Session,
    engine: Engine,
    *,
    stage: SupervisedStage[Batch],
    loader: TrainLoader[Any, Batch],
    held_out: list[EvalBatch[Batch]],
    eval_every: int,
) -> None:
    """Take one optimizer step for each remaining item of `loader`."""
    objective = objective_of(session.run.supervised_config(session.stage))
    for step, micro_batches in session.steps(loader):
        with session.timer("train"):
            metrics = take_step(engine, micro_batches, objective=objective)
        evaluation: Metrics = {}
        if session.evaluates_at(step, eval_every):
            with session.timer("evaluate"):
                evaluation = with_average(engine, lambda: stage.evaluate(engine, held_out))
        session.finish_step(step, metrics, evaluation=evaluation, num_tokens=metrics["train/tokens"])


def train_loader(
    samples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch], *, config: SupervisedConfig, world: World
) -> TrainLoader[Any, Batch]:
    """This rank's micro-batches of every step of the stage."""
    return TrainLoader(
        samples,
        collate,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=world.rank,
        ranks=world.size,
        seed=config.seed,
        steps=config.steps(len(samples)),
    )


def held_out_batches(
    samples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch], *, config: SupervisedConfig, world: World
) -> list[EvalBatch[Batch]]:
    """This rank's share of the held-out rows."""
    rows = samples[: config.eval_rows] if config.eval_rows else samples
    size = config.micro_batch_size
    return evaluation_batches(rows, collate, micro_batch_size=size, rank=world.rank, ranks=world.size)
