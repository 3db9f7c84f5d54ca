"""The loop that SFT and reward modelling share: batches in, one optimizer step each, evaluation in between.

Losses are divided by counts over the whole step, so micro-batches and ranks change nothing but memory and time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from data.loader import EvalBatch, TrainLoader, evaluation_batches, steps_of
from rlhf.config import SupervisedConfig
from rlhf.dist import World, sum_over_ranks
from rlhf.engine.engine import Engine
from rlhf.types import PreferenceBatch, SFTBatch
from stages.resume import Parts
from stages.session import Session

Batch = TypeVar("Batch", SFTBatch, PreferenceBatch)


class Outcome(NamedTuple):
    """What a micro-batch adds to its step; everything adds up over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol, Generic[Batch]):
    """What is learnt, and from how many of what."""

    def count(self, batch: Batch) -> Tensor:
        """What the loss of a whole step is divided by: target tokens, or pairs."""
        ...

    def outcome(self, engine: Engine, batch: Batch, *, denominator: Tensor) -> Outcome:
        """Loss and diagnostics of a micro-batch, divided by the step's denominator."""
        ...


def train_loader(
    samples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch], *, config: SupervisedConfig, world: World
) -> TrainLoader[Any, Batch]:
    """This rank's micro-batches of every step of the stage."""
    steps = steps_of(
        len(samples), config.epochs, max_steps=config.max_steps, global_batch_size=config.global_batch_size
    )
    return TrainLoader(
        samples,
        collate,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=world.rank,
        ranks=world.size,
        seed=config.seed,
        steps=steps,
    )


def held_out_batches(
    samples: Sequence[Any], collate: Callable[[Sequence[Any]], Batch], *, config: SupervisedConfig, world: World
) -> list[EvalBatch[Batch]]:
    """This rank's part of the held-out rows."""
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
    """Take one optimizer step for every item of `loader` that is left.

    Args:
        session: the stage.
        engine: the model that learns.
        loader: this rank's micro-batches.
        objective: what is learnt.
        evaluate: held-out metrics; all ranks together.
        eval_every: steps between evaluations.
        data: fingerprint of the rows.
    """
    session.begin(Parts({"model": engine}, {"loader": loader}, data), evaluate=evaluate)
    for step, micro_batches in session.steps(loader):
        with session.watch("train"), session.observing(step):
            metrics = take_step(engine, micro_batches, objective=objective)
        evaluation: dict[str, float] = {}
        if session.evaluates_at(step, eval_every):
            with session.watch("evaluate"):
                evaluation = evaluate()
        session.finish_step(step, metrics, evaluation=evaluation, num_tokens=metrics["train/tokens"])


def take_step(engine: Engine, micro_batches: Sequence[Batch], *, objective: Objective[Batch]) -> dict[str, float]:
    """One optimizer step from this rank's micro-batches; metrics are those of the step over all ranks."""
    batches = [batch.to(engine.world.device) for batch in micro_batches]
    denominator = sum_over_ranks(torch.stack([objective.count(batch) for batch in batches]).sum())
    outcomes = []
    for index, batch in enumerate(batches, start=1):
        outcome = objective.outcome(engine, batch, denominator=denominator)
        engine.backward(outcome.loss, last=index == len(batches))
        tokens = {"train/loss": outcome.loss.detach(), "train/tokens": batch.attention_mask.sum()}
        outcomes.append(outcome.metrics | tokens)
    return summed(outcomes) | engine.step().metrics("train")


def summed(outcomes: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Every metric added up over micro-batches and ranks."""
    names = list(outcomes[0])
    totals = torch.stack([torch.stack([outcome[name].float() for name in names]) for outcome in outcomes]).sum(0)
    return dict(zip(names, sum_over_ranks(totals).tolist(), strict=True))
