"""Measures a model on held-out data: perplexity, preference accuracy, and the metrics of a rollout.

Every number is over the data of all ranks. See also: `compare.py`, which compares two models.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.dpo import DPOForm, dpo_loss
from rlhf.algorithms.kl import clamped
from rlhf.algorithms.logprobs import TokenStatistics, Wanted
from rlhf.algorithms.masked import masked_mean, zero_masked
from rlhf.algorithms.ppo import explained_variance
from rlhf.algorithms.supervised_losses import pairwise_loss, sft_loss
from rlhf.engine.engine import Engine
from rlhf.models.causal_lm import position_ids, token_statistics
from rlhf.models.scalar_head import last_token_scores
from rlhf.row_exchange import texts_of
from rlhf.runtime.dist import gather_objects, sum_over_ranks
from rlhf.runtime.errors import RunError
from rlhf.runtime.user_functions import load_function
from rlhf.tracking.metric_registry import COLUMNS
from rlhf.types import EvalBatch, PreferenceBatch, Rollout, SFTBatch

log = logging.getLogger(__name__)

GoldMetric = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and responses -> one number each."""


def load_gold(metrics: dict[str, str]) -> dict[str, GoldMetric]:
    """Import the functions that `data.gold` names.

    Raises:
        ValueError: a name is not `module:function`, or does not exist.
    """
    signature = "called with the prompts and the responses and returning one number for each"
    return {
        name: load_function(target, f"data.gold.{name}={target!r}", signature=signature)
        for name, target in metrics.items()
    }


def gold_values(name: str, metric: GoldMetric, *, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """One number per response.

    Raises:
        RunError: the metric returned more or fewer.
    """
    values = metric(prompts, responses)
    if len(values) != len(responses):
        raise RunError(f"data.gold.{name} gave {len(values)} numbers for {len(responses)} responses; expected as many.")
    return [float(value) for value in values]


def target_statistics(
    model: Callable[..., Any], batch: SFTBatch | PreferenceBatch, *, wanted: Wanted
) -> TokenStatistics:
    """The statistics of every token after the first, `[B, T - 1]` each, where it is a target."""
    mask = batch.target_mask[:, 1:]
    return token_statistics(model, batch.input_ids, attention_mask=batch.attention_mask, mask=mask, wanted=wanted)


def response_logprobs(
    model: Callable[..., Any], batch: PreferenceBatch, *, chunk_elements: int | None = None
) -> Tensor:
    """Log-probability of each whole response of B pairs, `[2B]` fp32; `chunk_elements` as in `Wanted`."""
    found = target_statistics(model, batch, wanted=Wanted(chunk_elements=chunk_elements))  # [2B, T - 1]
    return zero_masked(found.logprobs, batch.target_mask[:, 1:]).sum(-1)


def evaluate_language(engine: Engine, batches: Sequence[EvalBatch[SFTBatch]]) -> dict[str, float]:
    """Loss in nats per target token, perplexity and accuracy on demonstrations.

    All ranks must call it with equally many batches.
    """
    device = engine.world.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, accuracy, target tokens
    with engine.evaluating() as model:
        for item in batches:
            batch = item.batch.to(device)
            targets = batch.target_mask.clone()
            targets[item.count :] = False
            found = target_statistics(model, replace(batch, target_mask=targets), wanted=Wanted(first_choice=True))
            result = sft_loss(found, targets, denominator=1.0)
            totals += torch.stack([result.loss, result.accuracy, result.num_tokens.to(result.loss.dtype)]).double()
    loss, accuracy, count = sum_over_ranks(totals).tolist()
    mean_loss = torch.tensor(loss / max(count, 1), dtype=torch.float64)
    perplexity = float(mean_loss.exp())  # of a tensor, because math.exp raises where this is infinite
    return {"eval/loss": float(mean_loss), "eval/perplexity": perplexity, "eval/accuracy": accuracy / max(count, 1)}


def demonstration_losses(engine: Engine, batches: Sequence[EvalBatch[SFTBatch]]) -> Tensor:
    """Nats and target tokens of each demonstration, `[N, 2]` fp64 on the CPU, in the order of the ranks' batches."""
    found = [torch.zeros(0, 2, dtype=torch.float64)]
    with engine.evaluating() as model:
        for item in batches:
            batch = item.batch.to(engine.world.device)
            mask = batch.target_mask[:, 1:]
            logprobs = target_statistics(model, batch, wanted=Wanted()).logprobs  # [B, T - 1]
            both = torch.stack((-zero_masked(logprobs, mask).sum(-1), mask.sum(-1)), dim=1)  # [B, 2]
            found.append(both[: item.count].double().cpu())
    return torch.cat(gather_objects(torch.cat(found)))


def evaluate_preferences(engine: Engine, batches: Sequence[EvalBatch[PreferenceBatch]]) -> dict[str, float]:
    """Quality of a reward model on held-out pairs, and mean and deviation of its scores, which PPO normalises by.

    All ranks must call it with equally many batches.
    """
    chosen, rejected = pair_scores(engine, batches)
    scores = torch.cat([chosen, rejected])
    result = pairwise_loss(chosen, rejected)
    return {
        "eval/loss": float(result.loss),
        "eval/accuracy": float(result.accuracy),
        "eval/margin": float(result.margin),
        "eval/score_mean": float(scores.mean()),
        "eval/score_std": float(scores.std(correction=0)),
        "eval/pairs": len(chosen),
    }


def evaluate_policy_on_pairs(
    engine: Engine, batches: Sequence[EvalBatch[PreferenceBatch]], *, form: DPOForm
) -> dict[str, float]:
    """DPO's loss, implicit rewards and log-ratios on held-out pairs; all ranks must call it with equally many batches.

    The log-ratio is no KL, as the policy did not write these responses; `stage=eval` measures the KL.
    """
    found: list[Tensor] = []
    with engine.evaluating() as model:
        for item in batches:
            batch = item.batch.to(engine.world.device)
            columns = (response_logprobs(model, batch), batch.reference_logprobs, batch.target_mask.sum(-1))
            pairs = torch.stack(columns).view(3, 2, -1)  # three times [2B] -> [3, 2, B]
            found.append(pairs[:, :, : item.count].double().cpu())
    everything = torch.cat(gather_objects(torch.cat(found, dim=2)), dim=2)  # [3, 2, N] of all ranks
    result = dpo_loss(*everything.flatten(1), form=form)
    metrics = {f"eval/{name}": float(value) for name, value in result._asdict().items()}
    return metrics | {"eval/pairs": everything.shape[2]}


def pair_scores(engine: Engine, batches: Sequence[EvalBatch[PreferenceBatch]]) -> Tensor:
    """Scores of held-out pairs, `[2, N]` fp64 on the CPU: chosen and rejected, in the order of the ranks' batches."""
    pairs: list[Tensor] = []
    with engine.evaluating() as model:
        for item in batches:
            batch = item.batch.to(engine.world.device)
            per_position = model(batch.input_ids, batch.attention_mask, position_ids=position_ids(batch.attention_mask))
            scores = last_token_scores(per_position, batch.attention_mask).view(2, -1)  # [2B] -> [2, B]
            pairs.append(scores[:, : item.count].double().cpu())
    return torch.cat(gather_objects(torch.cat(pairs, dim=1)), dim=1)


def rollout_metrics(rollout: Rollout, *, kl_coef: float, kl_kind: str) -> dict[str, float]:
    """Metrics of the actor's responses, masked tokens left out; `metric_registry.py` has the meanings."""
    mask = rollout.response_mask
    gap = (rollout.generation_logprobs - rollout.logprobs).abs() * mask
    penalty = -kl_coef * rollout.kl.sum(-1)  # [B, R] -> [B]
    found = {
        "objective/entropy": masked_mean(rollout.entropy, mask),
        "objective/scores": rollout.scores.mean(),
        "objective/non_score_reward": penalty.mean(),
        "objective/rlhf_reward": (rollout.scores + penalty).mean(),
        "rollout/response_length": rollout.lengths.double().mean(),
        "rollout/eos_rate": rollout.ended.double().mean(),
        "rollout/logprob_gap_max": gap.max(),
        "rollout/logprob_gap_mean": masked_mean(gap, mask),
    }
    if rollout.reference_logprobs is not None:
        log_ratio = rollout.logprobs - rollout.reference_logprobs
        found["objective/kl"] = log_ratio.sum(-1).mean()
        found["objective/kl_per_token"] = masked_mean(log_ratio, mask)
        found["objective/kl_clamped"] = masked_mean(clamped(rollout.kl, kind=kl_kind), mask)
    return {name: float(value) for name, value in found.items()}


def critic_metrics(rollout: Rollout, returns: Tensor) -> dict[str, float]:
    """How well the critic predicted the returns `[B, R]` of a rollout."""
    explained = explained_variance(rollout.values, returns, rollout.response_mask)
    return {"critic/explained_variance": float(explained)}


def sample_rows(
    rollout: Rollout, gold: dict[str, GoldMetric], *, sources: Sequence[str] = (), is_one_source: bool = False
) -> list[dict[str, Any]]:
    """One row per response for people to read: prompt, response and every number of it; every rank must call it.

    A score is None where no reward source applies, and so is that of a source which does not. `sources` names those of
    `rollout.source_scores`; if the raw score is that of the only one, it is not there a second time.
    """
    prompts, responses = zip(*texts_of(rollout.held), strict=True)  # a collective
    columns: dict[str, Sequence[Any]] = {
        "prompt": prompts,
        "response": responses,
        "score": _or_none(rollout.scores),
        **({} if is_one_source else {"raw_score": _or_none(rollout.raw_scores)}),
    }
    columns |= {f"reward/{name}": _or_none(rollout.source_scores[:, place]) for place, name in enumerate(sources)}
    for name, metric in gold.items():
        columns[f"gold/{name}"] = gold_values(name, metric, prompts=prompts, responses=responses)
    if rollout.reference_logprobs is not None:
        columns["kl"] = (rollout.logprobs - rollout.reference_logprobs).sum(-1).tolist()
    columns |= {"length": rollout.lengths.tolist(), "ended": rollout.ended.tolist()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _or_none(scores: Tensor) -> list[float | None]:
    return [None if math.isnan(score) else score for score in scores.tolist()]


def policy_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the `sample_rows` of held-out prompts.

    A row whose score or KL is not finite is left out of all of them, with a warning; one without a score, out of the
    mean score.
    """
    checked = [name for name in ("score", "raw_score", "kl") if name in rows[0]]
    good = [row for row in rows if all(row[name] is None or math.isfinite(row[name]) for name in checked)]
    if len(good) < len(rows):
        log.warning("evaluation: left out %d of %d responses that are not finite", len(rows) - len(good), len(rows))
    named = {**COLUMNS, **{name: name for name in rows[0] if name.startswith("gold/")}}
    named |= {f"eval/{name}": name for name in rows[0] if name.startswith("reward/")}
    found = {
        key: [row[name] for row in good if row[name] is not None] for key, name in named.items() if name in rows[0]
    }
    metrics = {key: fmean(values) if values else math.nan for key, values in found.items() if values or not good}
    pairs = distinct_ngrams([str(row["response"]) for row in good], length=2)
    return metrics | ({} if pairs is None else {"eval/distinct_2": pairs})


def distinct_ngrams(texts: Sequence[str], *, length: int) -> float | None:
    """Different runs of `length` words as a share of all runs; None if there are none (Li et al. 2016)."""
    words = [text.lower().split() for text in texts]
    runs = [run for line in words for run in zip(*(line[start:] for start in range(length)), strict=False)]
    return len(set(runs)) / len(runs) if runs else None
