"""What a model is worth on held-out data: perplexity, preference accuracy, and the summary of a rollout.

Every number is over the data of all ranks. Left out: comparing two models (`compare.py`).
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.algorithms.kl import clamped
from rlhf.algorithms.masked import masked_mean
from rlhf.algorithms.ppo import explained_variance
from rlhf.algorithms.preference import pairwise_loss
from rlhf.algorithms.sft import sft_loss
from rlhf.engine.engine import Engine
from rlhf.models.positions import position_ids
from rlhf.models.scalar_head import last_token_scores
from rlhf.runtime.dist import gather_objects, sum_over_ranks
from rlhf.tracking.answer_statistics import COLUMNS
from rlhf.types import PreferenceBatch, Rollout, SFTBatch

log = logging.getLogger(__name__)

GoldMetric = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and responses -> one number each."""


class CountedBatch(Protocol):
    """A batch whose rows beyond `count` are fillers, so that all ranks have equally many batches."""

    batch: SFTBatch | PreferenceBatch
    count: int


@dataclass(frozen=True)
class LanguageResult:
    """Held-out quality of a language model."""

    loss: float
    """Nats per target token."""
    accuracy: float
    """Share of target tokens that are the model's first choice."""

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())


def logits_of(model: Callable[..., Any], batch: SFTBatch) -> Tensor:
    """What a language model expects after every token, `[B, T, V]`."""
    mask = batch.attention_mask
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    return model(**inputs, use_cache=False).logits


def evaluate_language(engine: Engine, batches: Sequence[CountedBatch]) -> LanguageResult:
    """Loss and accuracy on the target tokens of demonstrations; all ranks must call it with equally many batches."""
    device = engine.world.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with engine.evaluating() as model:
        for item in batches:
            batch = item.batch.to(device)
            assert isinstance(batch, SFTBatch)
            targets = batch.target_mask.clone()
            targets[item.count :] = False
            logits = logits_of(model, batch)
            result = sft_loss(logits, batch.input_ids, targets, denominator=1.0)
            totals += torch.stack([result.loss, result.accuracy, result.num_tokens.to(result.loss.dtype)]).double()
    loss, accuracy, count = sum_over_ranks(totals).tolist()
    return LanguageResult(loss=loss / max(count, 1), accuracy=accuracy / max(count, 1))


def row_losses(engine: Engine, batches: Sequence[CountedBatch]) -> Tensor:
    """Nats and target tokens of each demonstration, `[N, 2]` fp64 on the CPU, in the order of the ranks' batches."""
    found: list[list[float]] = []
    with engine.evaluating() as model:
        for item in batches:
            batch = item.batch.to(engine.world.device)
            assert isinstance(batch, SFTBatch)
            logits = logits_of(model, batch)
            for row in range(item.count):
                one = slice(row, row + 1)
                result = sft_loss(logits[one], batch.input_ids[one], batch.target_mask[one], denominator=1.0)
                found.append([float(result.loss), float(result.num_tokens)])
    return torch.cat(gather_objects(torch.tensor(found, dtype=torch.float64).view(-1, 2)))


@dataclass(frozen=True)
class PreferenceResult:
    """Held-out quality of a reward model."""

    loss: float
    """Mean of -log sigmoid(chosen - rejected), in nats."""
    accuracy: float
    """Share of pairs whose chosen response scores strictly higher."""
    margin: float
    """Mean difference of the two scores."""
    mean: float
    """Mean score of all held-out responses: what PPO subtracts."""
    std: float
    """Their standard deviation: what PPO divides by."""
    count: int
    """Pairs behind all of this."""


def evaluate_preferences(engine: Engine, batches: Sequence[CountedBatch]) -> PreferenceResult:
    """Scores held-out pairs; all ranks must call it with equally many batches."""
    chosen, rejected = pair_scores(engine, batches)
    scores = torch.cat([chosen, rejected])
    result = pairwise_loss(chosen, rejected)
    return PreferenceResult(
        loss=float(result.loss),
        accuracy=float(result.accuracy),
        margin=float(result.margin),
        mean=float(scores.mean()),
        std=float(scores.std(correction=0)),
        count=len(chosen),
    )


def pair_scores(engine: Engine, batches: Sequence[CountedBatch]) -> Tensor:
    """Scores of held-out pairs, `[2, N]` fp64 on the CPU: chosen and rejected, in the order of the ranks' batches."""
    pairs: list[Tensor] = []
    with engine.evaluating() as model:
        for item in batches:
            batch = item.batch.to(engine.world.device)
            assert isinstance(batch, PreferenceBatch)
            per_position = model(batch.input_ids, batch.attention_mask, position_ids=position_ids(batch.attention_mask))
            scores = last_token_scores(per_position, batch.attention_mask).view(2, -1)  # chosen, rejected
            pairs.append(scores[:, : item.count].double().cpu())
    return torch.cat(gather_objects(torch.cat(pairs, dim=1)), dim=1)


def rollout_metrics(rollout: Rollout, *, kl_coef: float, kl_kind: str) -> dict[str, float]:
    """What a rollout says of the actor, masked tokens left out; `metric_registry.py` has the meanings."""
    mask = rollout.response_mask
    gap = (rollout.generation_logprobs - rollout.logprobs).abs() * mask
    penalty = -kl_coef * rollout.kl.sum(-1)
    return {
        **_kl_metrics(rollout, kind=kl_kind),
        "objective/entropy": float(masked_mean(rollout.entropy, mask)),
        "objective/scores": float(rollout.scores.mean()),
        "objective/raw_scores": float(rollout.raw_scores.mean()),
        "objective/non_score_reward": float(penalty.mean()),
        "objective/rlhf_reward": float((rollout.scores + penalty).mean()),
        "rollout/response_length": float(rollout.lengths.double().mean()),
        "rollout/eos_rate": float(rollout.ended.double().mean()),
        "rollout/logprob_gap_max": float(gap.max()),
        "rollout/logprob_gap_mean": float(masked_mean(gap, mask)),
    }


def _kl_metrics(rollout: Rollout, *, kind: str) -> dict[str, float]:
    """How far the actor is from the reference; nothing where there is none."""
    if rollout.reference_logprobs is None:
        return {}
    log_ratio = rollout.logprobs - rollout.reference_logprobs
    return {
        "objective/kl": float(log_ratio.sum(-1).mean()),
        "objective/kl_per_token": float(masked_mean(log_ratio, rollout.response_mask)),
        "objective/kl_clamped": float(masked_mean(clamped(rollout.kl, kind=kind), rollout.response_mask)),
    }


def critic_metrics(rollout: Rollout, returns: Tensor) -> dict[str, float]:
    """How well the critic foresaw the returns `[B, R]` of the whole rollout."""
    explained = explained_variance(rollout.values, returns, rollout.response_mask)
    return {"critic/explained_variance": float(explained)}


def sample_rows(rollout: Rollout, gold: dict[str, GoldMetric]) -> list[dict[str, str | float | bool]]:
    """One row per response, for people to read: what was said, how it was judged, what it cost."""
    reference = rollout.reference_logprobs
    kl = None if reference is None else (rollout.logprobs - reference).sum(-1)
    judged = {f"gold/{name}": metric(rollout.prompts, rollout.responses) for name, metric in gold.items()}
    return [
        {
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "score": float(rollout.scores[row]),
            "raw_score": float(rollout.raw_scores[row]),
            **{name: float(values[row]) for name, values in judged.items()},
            **({} if kl is None else {"kl": float(kl[row])}),
            "length": int(rollout.lengths[row]),
            "ended": bool(rollout.ended[row]),
        }
        for row in range(len(rollout.prompts))
    ]


def policy_metrics(rows: Sequence[dict[str, str | float | bool]]) -> dict[str, float]:
    """Means over `sample_rows` of held-out prompts: the reward model, the cost, and metrics that no model saw.

    A row whose score or KL is not finite is in none of them, and that is said.
    """
    judged = [name for name in ("score", "raw_score", "kl") if name in rows[0]]
    good = [row for row in rows if all(math.isfinite(row[name]) for name in judged)]
    if len(good) < len(rows):
        log.warning("evaluation: left out %d of %d responses that are not finite", len(rows) - len(good), len(rows))
    named = {**COLUMNS, **{name: name for name in rows[0] if name.startswith("gold/")}}
    measured = {key: name for key, name in named.items() if name in rows[0]}
    metrics = {key: fmean(row[name] for row in good) if good else math.nan for key, name in measured.items()}
    pairs = distinct([str(row["response"]) for row in good], length=2)
    return metrics | ({} if pairs is None else {"eval/distinct_2": pairs})


def distinct(texts: Sequence[str], *, length: int) -> float | None:
    """Different runs of `length` words as a share of all those of `texts`; None without any (Li et al. 2016)."""
    words = [text.lower().split() for text in texts]
    runs = [run for line in words for run in zip(*(line[start:] for start in range(length)), strict=False)]
    return len(set(runs)) / len(runs) if runs else None


def load_gold(metrics: dict[str, str]) -> dict[str, GoldMetric]:
    """Import the functions that `data.gold` names.

    Raises:
        ValueError: a name is not `module:function`, or does not exist.
    """
    called = "called with the prompts and the responses and returning one number for each"
    return {name: imported(target, f"data.gold.{name}={target!r}", called=called) for name, target in metrics.items()}


def imported(target: str, setting: str, *, called: str) -> Callable[..., Any]:
    """The function that `target`, `module:function`, names.

    Its module is installed, part of this project, or in the folder where the run was started.

    Args:
        target: its address.
        setting: name and value of what holds it, for the message.
        called: how it will be called and what it returns, for the message.

    Raises:
        ValueError: there is no such function.
    """
    module_name, _, function_name = target.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that nothing there stands in for a library
    try:
        function = vars(importlib.import_module(module_name))[function_name]
    except (ImportError, KeyError, SyntaxError, ValueError) as error:
        raise ValueError(f"{setting}: no such function ({error}); expected module:function, {called}.") from error
    if not callable(function):
        raise ValueError(f"{setting}: found a {type(function).__name__}; expected a function, {called}.")
    return function  # type: ignore[no-any-return]
