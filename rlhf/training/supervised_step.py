"""One optimizer step of SFT, reward modelling or DPO: their objectives, and micro-batches that add up to a step.

Losses are divided by counts over the whole step, so micro-batches and ranks change nothing but memory and time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf.algorithms.dpo import DPOForm, dpo_loss
from rlhf.algorithms.logprobs import Wanted
from rlhf.algorithms.supervised_losses import SFTLoss, count_targets, pairwise_loss, sft_loss
from rlhf.config.dpo_config import DPOConfig
from rlhf.config.stage_configs import SupervisedConfig
from rlhf.engine.engine import Engine
from rlhf.evaluation.metrics import response_logprobs, target_statistics
from rlhf.models.causal_lm import position_ids
from rlhf.models.scalar_head import last_token_scores
from rlhf.runtime.dist import sum_over_ranks
from rlhf.types import PreferenceBatch, SFTBatch

Batch = TypeVar("Batch", SFTBatch, PreferenceBatch)


class LossAndMetrics(NamedTuple):
    """Loss and metrics of a micro-batch; all of them add up over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]


def next_token_loss(
    engine: Engine, batch: SFTBatch, *, denominator: Tensor, chunk_elements: int | None = None
) -> SFTLoss:
    """Cross-entropy of a micro-batch's target tokens; `denominator` as of `sft_loss`, the chunk as in `Wanted`."""
    wanted = Wanted(first_choice=True, chunk_elements=chunk_elements)
    return sft_loss(target_statistics(engine, batch, wanted=wanted), batch.target_mask, denominator=denominator)


class Objective(Generic[Batch]):
    """A training objective: its loss, and the count that its loss is divided by."""

    def __init__(self, config: SupervisedConfig, *, chunk_elements: int | None = None) -> None:
        """Args: `config`: the stage's settings; `chunk_elements`: as in `Wanted`."""
        self.config: Any = config
        self.chunk_elements = chunk_elements

    def count(self, batch: Batch) -> Tensor:
        """This micro-batch's part of the step's denominator: target tokens, or pairs."""
        raise NotImplementedError

    def outcome(self, engine: Engine, batch: Batch, *, denominator: Tensor) -> LossAndMetrics:
        """Loss and metrics of a micro-batch, divided by the step's denominator."""
        raise NotImplementedError


class NextToken(Objective[SFTBatch]):
    """Next-token prediction on the target tokens of demonstrations."""

    def count(self, batch: SFTBatch) -> Tensor:
        """Target tokens of a micro-batch."""
        return count_targets(batch.target_mask)

    def outcome(self, engine: Engine, batch: SFTBatch, *, denominator: Tensor) -> LossAndMetrics:
        """Cross-entropy of the target tokens."""
        result = next_token_loss(engine, batch, denominator=denominator, chunk_elements=self.chunk_elements)
        return LossAndMetrics(result.loss, {"train/accuracy": result.accuracy})


class OfPairs(Objective[PreferenceBatch]):
    """An objective that is a mean over pairs."""

    def count(self, batch: PreferenceBatch) -> Tensor:
        """Pairs of a micro-batch."""
        return torch.tensor(len(batch.margin), device=batch.margin.device)


class Pairwise(OfPairs):
    """Score the chosen response above the rejected one (Bradley and Terry 1952)."""

    def outcome(self, engine: Engine, batch: PreferenceBatch, *, denominator: Tensor) -> LossAndMetrics:
        """Loss of the pairs, both responses in one forward."""
        per_position = engine(batch.input_ids, batch.attention_mask, position_ids=position_ids(batch.attention_mask))
        chosen, rejected = last_token_scores(per_position, batch.attention_mask).chunk(2)
        result = pairwise_loss(
            chosen,
            rejected,
            margin=batch.margin if self.config.use_margin else None,
            center_coef=self.config.center_coef,
            denominator=denominator,
        )
        return LossAndMetrics(result.loss, {"train/accuracy": result.accuracy, "train/margin": result.margin})


class DirectPreference(OfPairs):
    """Make the chosen response likelier, beside the reference, than the rejected one (Rafailov et al. 2023)."""

    def outcome(self, engine: Engine, batch: PreferenceBatch, *, denominator: Tensor) -> LossAndMetrics:
        """Loss of the pairs, both responses in one forward; the reference's part has been computed before."""
        logprobs = response_logprobs(engine, batch, chunk_elements=self.chunk_elements)
        lengths, form = batch.target_mask.sum(-1), dpo_form(self.config)
        result = dpo_loss(logprobs, batch.reference_logprobs, lengths, form=form, denominator=denominator)
        metrics = {f"train/{name}": value for name, value in result._asdict().items() if name != "loss"}
        return LossAndMetrics(result.loss, metrics)


def dpo_form(config: DPOConfig) -> DPOForm:
    """The shape of DPO's loss, as the settings say."""
    smoothing, averages = config.label_smoothing, config.normalize_length
    return DPOForm(config.beta, config.loss_type, smoothing, normalize_length=averages, nll_coef=config.rpo_alpha)


OBJECTIVES: dict[str, type[Objective[Any]]] = {
    "next_token": NextToken,
    "pairwise": Pairwise,
    "dpo": DirectPreference,
}
"""The objectives by the name that a stage's settings give."""


def objective_of(config: SupervisedConfig, *, chunk_elements: int | None = None) -> Objective[Any]:
    """The objective of a stage; training and the memory plan run the same one."""
    return OBJECTIVES[config.objective](config, chunk_elements=chunk_elements)


def take_step(engine: Engine, micro_batches: Sequence[Batch], *, objective: Objective[Batch]) -> dict[str, float]:
    """One optimizer step from this rank's micro-batches; returns metrics over all ranks."""
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
