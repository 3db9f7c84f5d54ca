"""Compares two models by their responses to the same prompts, and measures how good a reward model is.

Plain lists come in, plain dictionaries go out and into `results.json`. A share has Wilson's interval, a mean that of a
bootstrap over prompts (`algorithms/statistics.py`). The difference of two models is taken prompt by prompt, so what a
prompt does to both of them cancels. Left out: tests of significance, and win rates corrected for length by a regression
(Dubois et al. 2024, arXiv:2404.04475); the win rates of longer and of shorter responses are given instead.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlhf.algorithms.intervals import wilson
from rlhf.algorithms.statistics import (
    bootstrap_mean,
    expected_calibration_error,
    fitted_temperature,
    preference_nll,
    reliability,
)
from rlhf.config.bounds import as_plain
from rlhf.config.eval_config import EvalConfig
from rlhf.evaluation.judges import Judgement
from rlhf.evaluation.metrics import distinct_ngrams
from rlhf.tracking.answer_statistics import repeated_share

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelAnswers:
    """The responses of one model to all prompts, and the numbers of each."""

    texts: tuple[str, ...]
    numbers: dict[str, list[float]]
    """By name, one per response: `length`, `not_ended`, and if measured `kl`, `raw_score`, `normalized_score`, `gold/*`
    and `reward/*`, which is NaN where the source does not apply."""
    losses: list[tuple[float, float]]
    """Nats and tokens of each held-out demonstration."""


@dataclass(frozen=True)
class PairScores:
    """A reward model's scores of held-out pairs."""

    chosen: list[float]
    rejected: list[float]
    subsets: list[str]
    """The part of the data that each pair belongs to; empty strings if there is none."""


MEASURES = {
    "normalized_score": (
        "score",
        "raw_score less its held-out mean, over its deviation; PPO's score has a clamp and a penalty, too",
    ),
    "raw_score": ("score", "the reward model's score in its own units"),
    "reward/*": ("score", "what a source of eval.rewards says of a response, in its own units"),
    "kl": ("nats", "KL to the reference per response, at the sampling temperature"),
    "gold/*": ("", "a metric of data.gold, which no model was trained on"),
    "length": ("tokens", "length of a response"),
    "not_ended": ("fraction", "responses that were cut instead of ending by themselves"),
    "distinct_1": ("fraction", "different words as a share of all"),
    "distinct_2": ("fraction", "different word pairs as a share of all"),
    "repeated": ("fraction", "responses that another prompt was given too, word for word"),
    "perplexity": ("", "of held-out demonstrations, per token"),
}
"""Unit and meaning of each measure, in the order in which they are shown."""


def comparison(
    config: EvalConfig,
    models: Mapping[str, ModelAnswers],
    *,
    pair_scores: PairScores | None,
    judgements: Mapping[str, Sequence[Judgement]],
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        config: the settings that it names.
        models: `model` and, if there is one, `baseline`.
        pair_scores: the reward model's, if there is one.
        judgements: of each judge on each pair.
    """
    lengths = list(zip(*(found.numbers["length"] for found in models.values()), strict=True))
    settings = ("name", "model", "baseline", "reference", "reward", "max_response_tokens", "sampling", "seed")
    plain = as_plain(config)
    quality = None
    if pair_scores is not None and pair_scores.chosen:
        quality = reward_model_quality(pair_scores, seed=config.seed)
    return {
        **{name: plain[name] for name in settings},
        "prompts": len(models["model"].texts),
        "intervals": "95%: Wilson's for shares, else the percentiles of a bootstrap over rows",
        "measures": measures(models, seed=config.seed),
        "judges": {name: win_rate(found, lengths=lengths) for name, found in judgements.items()},
        "reward_model": quality,
    }


def sample_rows(
    prompts: Sequence[str], models: Mapping[str, ModelAnswers], *, judgements: Mapping[str, Sequence[Judgement]]
) -> list[dict[str, Any]]:
    """The rows of `samples.jsonl`: a prompt, each model's response with its numbers, and what each judge prefers."""
    preferences = {name: mean_preferences(found, count=len(prompts)) for name, found in judgements.items()}
    return [
        {
            "prompt": prompt,
            **{
                side: {"response": found.texts[row]} | {name: column[row] for name, column in found.numbers.items()}
                for side, found in models.items()
            },
            "preferences": {name: values[row] for name, values in preferences.items()},
        }
        for row, prompt in enumerate(prompts)
    ]


def measures(models: Mapping[str, ModelAnswers], *, seed: int) -> list[dict[str, Any]]:
    """One row per measure: unit, meaning, and the value of each of `models` and of their difference."""
    rows = {name: _means(name, models, seed=seed) for name in models["model"].numbers}
    for side, found in models.items():
        shares = {
            "distinct_1": distinct_ngrams(found.texts, length=1),
            "distinct_2": distinct_ngrams(found.texts, length=2),
            "repeated": repeated_share([{"response": text} for text in found.texts]),
        }
        for name, share in shares.items():  # of all responses together: not a mean, so without an interval
            rows.setdefault(name, {})[side] = {} if share is None else {"mean": share}
    if any(tokens for _, tokens in models["model"].losses):
        rows["perplexity"] = {side: _perplexity(found.losses, seed=seed) for side, found in models.items()}
    described = []
    for known, (unit, meaning) in MEASURES.items():
        named = [name for name in rows if known in (name, f"{name.split('/')[0]}/*")]
        described += [{"name": name, "unit": unit, "meaning": meaning, **rows[name]} for name in named]
    return described


def _means(name: str, models: Mapping[str, ModelAnswers], *, seed: int) -> dict[str, dict[str, Any]]:
    columns = {side: torch.tensor(found.numbers[name]) for side, found in models.items()}
    for side, column in columns.items():
        if (bad := int((~column.isfinite()).sum())) and not name.startswith("reward/"):
            log.warning("%s: left out %d of %d responses whose %s is not finite", side, bad, len(column), name)
    if "baseline" in columns:
        columns["difference"] = columns["model"] - columns["baseline"]  # not finite if either is not
    return {
        side: _share(column.tolist())
        if name == "not_ended" and side != "difference"
        else asdict(bootstrap_mean(column[column.isfinite()], seed=seed))
        for side, column in columns.items()
    }


def _perplexity(losses: Sequence[tuple[float, float]], *, seed: int) -> dict[str, Any]:
    """Exponential of the mean loss per token, and of the ends of its interval over demonstrations."""
    # Sorted, because the order of the rows depends on the number of ranks, and the bootstrap draws by position.
    nats, tokens = torch.tensor(sorted(row for row in losses if row[1] > 0), dtype=torch.float64).T
    mean = bootstrap_mean(nats / tokens, seed=seed, weights=tokens)
    return {"mean": math.exp(mean.mean), "low": math.exp(mean.low), "high": math.exp(mean.high), "count": mean.count}


def win_rate(judgements: Sequence[Judgement], *, lengths: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How often the model's response is better than the baseline's, by one judge.

    A pair is won if the mean of its judgements, in both orders, is for the model; a tie counts one half.

    Args:
        judgements: of one judge; a pair may have none, one, or one for each order.
        lengths: of each pair, the model's response and the baseline's, in tokens.
    """
    means = mean_preferences(judgements, count=len(lengths))
    outcomes = [(row, _outcome(mean)) for row, mean in enumerate(means) if mean is not None]
    won = [outcome for _, outcome in outcomes]
    longer = [outcome for row, outcome in outcomes if lengths[row][0] > lengths[row][1]]
    shorter = [outcome for row, outcome in outcomes if lengths[row][0] < lengths[row][1]]
    longer_won = [outcome for outcome in longer if outcome != 0.5]
    longer_won += [1 - outcome for outcome in shorter if outcome != 0.5]
    return {
        "pairs": len(lengths),
        "judged": len(won),
        "wins": won.count(1.0),
        "ties": won.count(0.5),
        "losses": won.count(0.0),
        "win_rate": _share(won),
        "win_rate_when_longer": _share(longer),
        "win_rate_when_shorter": _share(shorter),
        "longer_wins": _share(longer_won),
        **_position_bias(judgements),
    }


def mean_preferences(judgements: Sequence[Judgement], *, count: int) -> list[float | None]:
    """For each of `count` pairs the mean preference, from -1 to 1, None if it was not judged."""
    found = _preferences_by_pair(judgements)
    return [statistics.fmean(found[row]) if row in found else None for row in range(count)]


def _preferences_by_pair(judgements: Sequence[Judgement]) -> dict[int, list[float]]:
    pairs: dict[int, list[float]] = defaultdict(list)
    for judgement in judgements:
        pairs[judgement.row].append(judgement.preference)
    return pairs


def _outcome(preference: float) -> float:
    return 0.5 if preference == 0 else float(preference > 0)


def _share(outcomes: Sequence[float]) -> dict[str, Any]:
    return asdict(wilson(float(sum(outcomes)), len(outcomes)))


def _position_bias(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How often A wins, and in how many pairs the other response wins when the two are swapped."""
    for_a = [_outcome(v.preference if v.model_is_a else -v.preference) for v in judgements if v.model_is_a is not None]
    twice = [found for found in _preferences_by_pair(judgements).values() if len(found) > 1]
    shares = {"first_wins": _share(for_a)} if for_a else {}
    return shares | ({"inconsistent": _share([min(found) < 0 < max(found) for found in twice])} if twice else {})


def reward_model_quality(pairs: PairScores, *, seed: int) -> dict[str, Any]:
    """Accuracy, margin and calibration of a reward model on pairs; `seed` draws the intervals."""
    chosen, rejected = (torch.tensor(scores, dtype=torch.float64) for scores in (pairs.chosen, pairs.rejected))
    differences = chosen - rejected
    names = sorted(set(pairs.subsets)) if any(pairs.subsets) else []
    parts = {name: differences[[found == name for found in pairs.subsets]] for name in names}
    return {
        **_accuracy(differences, seed=seed),
        "subsets": {name or "(none)": _accuracy(part, seed=seed) for name, part in parts.items()},
        "calibration": _calibration(differences),
    }


def _accuracy(differences: torch.Tensor, *, seed: int) -> dict[str, Any]:
    """A tie of the two scores is an error, as in training."""
    right = (differences > 0).tolist()
    return {"accuracy": _share(right), "margin": asdict(bootstrap_mean(differences.sort().values, seed=seed))}


def _calibration(differences: torch.Tensor) -> dict[str, Any]:
    """The reliability table, its error, the temperature that would correct it, and what it would leave."""
    table, temperature = reliability(differences), fitted_temperature(differences)
    found: dict[str, Any] = {
        "bins": [
            {"from": b.low, "to": b.high, "confidence": b.confidence, "right": asdict(wilson(b.right, b.count))}
            for b in table
        ],
        "error": expected_calibration_error(table),
        "loss": preference_nll(differences),
        "temperature": temperature,
    }
    if temperature is not None:
        found["error_at_temperature"] = expected_calibration_error(reliability(differences / temperature))
        found["loss_at_temperature"] = preference_nll(differences, temperature=temperature)
    return found
