"""The training stage that SFT, reward modelling and DPO share: one optimizer step per batch, evaluations in between.

Each stage's file (`sft.py`, `reward.py`, `dpo.py`) defines what differs: its batches and its held-out metrics. The
stage's settings name the data and the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple

from data.loader import TrainLoader, evaluation_batches
from data.samples import READERS
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.config.stage_configs import SupervisedConfig
from rlhf.engine.engine import Engine
from rlhf.runtime.dist import World
from rlhf.training.supervised_step import Batch, objective_of, take_step
from rlhf.types import EvalBatch
from stages.lifecycle.checkpointing import Stateful, TrainingState
from stages.lifecycle.session import Session, open_session, stage_tokenizer, with_average
from stages.lifecycle.stage_models import open_model
from stages.lifecycle.stage_record import StageRecord

Metrics = dict[str, float]


class Prepared(NamedTuple):
    """A stage that is ready to train."""

    engine: Engine
    others: dict[str, Stateful]
    """What was computed for the samples, by name; checkpoints keep it."""


def nothing_to_prepare(_: Session, samples: Sequence[Any], *, open_policy: Callable[[], Engine]) -> Prepared:
    """Open the model; `samples`, all those that the stage will use, need nothing else before training."""
    return Prepared(open_policy(), {})


@dataclass(frozen=True, kw_only=True)
class SupervisedStage(Generic[Batch]):
    """What distinguishes one supervised stage from another."""

    collate: Callable[..., Batch]
    """Pads samples to a batch."""
    evaluate: Callable[[Engine, Sequence[EvalBatch[Batch]]], Metrics]
    """Computes held-out metrics; a collective."""
    score_units: Callable[[Metrics], tuple[float, float]] | None = None
    """From held-out metrics to mean and standard deviation of the outputs of a scalar head; None without one."""
    prepare: Callable[..., Prepared] = nothing_to_prepare
    """Opens the model, once it has computed what the samples need of a reference."""


def run_supervised(run: RunConfig, world: World, *, name: str, stage: SupervisedStage[Batch]) -> StageRecord:
    """Train the model of the stage `name`, export it, and finish the stage."""
    config = run.supervised_config(name)
    role = roles_of(run, name)[0]
    tokenizer = stage_tokenizer(run, role.path)
    splits = READERS[config.rows](run.data, config, tokenizer=tokenizer)
    collate = partial(stage.collate, pad_id=int(tokenizer.pad_token_id))
    loader: TrainLoader[Any, Batch] = train_loader(splits.train, collate, config=config, world=world)
    held_out: list[Any] = splits.eval[: config.eval_rows or None]
    with open_session(run, name, world=world, tokenizer=tokenizer, total_steps=loader.steps) as session:
        open_policy = partial(open_model, run, role, world=world, total_steps=loader.steps)
        engine, others = stage.prepare(session, [*loader.used(), *held_out], open_policy=open_policy)

        def evaluate() -> Metrics:
            return stage.evaluate(engine, held_out_batches(held_out, collate, config=config, world=world))

        with closing(engine):
            state = TrainingState({role.name: engine}, {"loader": loader, **others}, splits.fingerprint)
            session.begin(state, evaluate=evaluate)
            _train(session, engine, loader=loader, evaluate=evaluate)
            session.export()
        return session.finish(score_units=stage.score_units, data=splits.counts)


def _train(
    session: Session, engine: Engine, *, loader: TrainLoader[Any, Batch], evaluate: Callable[[], Metrics]
) -> None:
    """Take one optimizer step for each remaining item of `loader`."""
    config = session.run.supervised_config(session.stage)
    objective = objective_of(config)
    for step, micro_batches in session.steps(loader):
        with session.timer("train"):
            metrics = take_step(engine, micro_batches, objective=objective)
        evaluation: Metrics = {}
        if session.evaluates_at(step, config.eval_every):
            with session.timer("evaluate"):
                evaluation = with_average(engine, evaluate)
        tokens = dict.fromkeys(("step", "train"), metrics["train/tokens"])
        session.finish_step(step, metrics, evaluation=evaluation, num_tokens=tokens)


def train_loader(
    samples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch], *, config: SupervisedConfig, world: World
) -> TrainLoader[Any, Batch]:
    """This rank's micro-batches of every step of the stage."""
    return TrainLoader(
        samples,
        collate,
        global_batch_size=config.global_batch_size,
        limit=config.micro_batch_limit,
        rank=world.rank,
        ranks=world.size,
        seed=config.seed,
        steps=config.steps(len(samples)),
    )


def held_out_batches(
    samples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch], *, config: SupervisedConfig, world: World
) -> list[EvalBatch[Batch]]:
    """This rank's share of the held-out rows."""
    limit = config.micro_batch_limit
    return evaluation_batches(samples, collate, limit=limit, rank=world.rank, ranks=world.size)
