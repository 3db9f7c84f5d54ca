"""The training loop that SFT and reward modelling share: one optimizer step per batch, with evaluations in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data.loader import TrainLoader, evaluation_batches
from rlhf.config.stage_configs import SupervisedConfig
from rlhf.engine.engine import Engine
from rlhf.runtime.dist import World
from rlhf.training.supervised_step import Batch, Objective, take_step
from rlhf.types import EvalBatch
from stages.lifecycle.checkpointing import TrainingState
from stages.lifecycle.session import Session


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


def supervise(
    session: Session,
    engine: Engine,
    *,
    loader: TrainLoader[Any, Batch],
    objective: Objective[Batch],
    evaluate: Callable[[], dict[str, float]],
    eval_every: int,
    data: str,
) -> None:
    """Take one optimizer step for each remaining item of `loader`.

    Args:
        session: the stage.
        engine: the model to train.
        loader: this rank's micro-batches.
        objective: the loss and its metrics.
        evaluate: computes held-out metrics; a collective.
        eval_every: steps between evaluations.
        data: fingerprint of the training rows.
    """
    session.begin(TrainingState({"model": engine}, {"loader": loader}, data), evaluate=evaluate)
    for step, micro_batches in session.steps(loader):
        with session.timer("train"):
            metrics = take_step(engine, micro_batches, objective=objective)
        evaluation: dict[str, float] = {}
        if session.evaluates_at(step, eval_every):
            with session.timer("evaluate"):
                evaluation = evaluate()
        session.finish_step(step, metrics, evaluation=evaluation, num_tokens=metrics["train/tokens"])
