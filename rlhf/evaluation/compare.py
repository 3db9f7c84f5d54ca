"""From responses, scores and verdicts to what an evaluation says: means, win rates, and how good the reward model is.

Everything is plain lists in and plain dictionaries out, as they go into `results.json`. A share has Wilson's interval,
a mean that of a bootstrap over prompts (`algorithms/intervals.py`). The difference of two models is that of their
answers to the same prompts, so what a prompt does to both of them drops out. Left out: tests of significance, and win
rates corrected for length by a regression (Dubois et al. 2024, arXiv:2404.04475); instead, the win rates of longer and
of shorter responses stand beside each other.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlhf.algorithms.calibration import expected_calibration_error, fitted_temperature, preference_nll, reliability
from rlhf.algorithms.intervals import bootstrap_mean, wilson
from rlhf.evaluation.judges import Verdict
from rlhf.evaluation.metrics import distinct
from rlhf.tracking.answer_statistics import repeated_share

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """What one model said to all prompts, and what was measured of it."""

    texts: tuple[str, ...]
    numbers: dict[str, list[float]]
    """By name, one for each response: `length`, `not_ended`, and where they were measured `kl`, `raw_score`,
    `normalized_score` and `gold/*`."""
    losses: list[tuple[float, float]]
    """Nats and tokens of each held-out demonstration."""


@dataclass(frozen=True)
class Measure:
    """A number of each response, of which the mean is shown."""

    unit: str
    meaning: str
    is_share: bool = False


MEASURES = {
    "normalized_score": Measure(
        "score", "raw_score less its held-out mean, over its deviation; PPO's score has a clamp and a penalty, too"
    ),
    "raw_score": Measure("score", "the reward model's score in its own units"),
    "gold/*": Measure("", "a metric of data.gold, which no model was trained on"),
    "kl": Measure("nats", "KL to the reference per response, at the sampling temperature"),
    "length": Measure("tokens", "length of a response"),
    "not_ended": Measure("fraction", "responses that were cut instead of ending by themselves", is_share=True),
}
_OF_ALL: dict[str, tuple[str, Callable[[Sequence[str]], float | None]]] = {
    "distinct_1": ("different words as a share of all", lambda texts: distinct(texts, length=1)),
    "distinct_2": ("different word pairs as a share of all", lambda texts: distinct(texts, length=2)),
    "repeated": (
        "responses that another prompt was given too, word for word",
        lambda texts: repeated_share([{"response": text} for text in texts]),
    ),
}
"""Of all responses together: no means, so without an interval."""


def measures(model: Answers, baseline: Answers | None, *, seed: int) -> list[dict[str, Any]]:
    """One row for each measure: what it is, and its value for each model and for their difference."""
    rows = [_mean_row(name, model, baseline=baseline, seed=seed) for name in model.numbers]
    rows += [
        _row(name, "fraction", meaning=about[0], values=_both(about[1], model, baseline=baseline))
        for name, about in _OF_ALL.items()
    ]
    if any(tokens for _, tokens in model.losses):
        values = {side: _perplexity(found.losses, seed=seed) for side, found in _sides(model, baseline).items()}
        rows.append(_row("perplexity", "", meaning="of held-out demonstrations, per token", values=values))
    return rows


def _sides(model: Answers, baseline: Answers | None) -> dict[str, Answers]:
    return {"model": model} | ({} if baseline is None else {"baseline": baseline})


def _both(
    function: Callable[[Sequence[str]], float | None], model: Answers, *, baseline: Answers | None
) -> dict[str, Any]:
    found = {side: function(said.texts) for side, said in _sides(model, baseline).items()}
    return {side: {} if value is None else {"mean": value} for side, value in found.items()}


def _mean_row(name: str, model: Answers, *, baseline: Answers | None, seed: int) -> dict[str, Any]:
    measure = MEASURES[name if name in MEASURES else f"{name.split('/')[0]}/*"]
    columns = {side: torch.tensor(found.numbers[name]) for side, found in _sides(model, baseline).items()}
    for side, column in columns.items():
        if not bool(column.isfinite().all()):
            count = int((~column.isfinite()).sum())
            log.warning("%s: left out %d of %d responses whose %s is not finite", side, count, len(column), name)
    if baseline is not None:
        columns["difference"] = columns["model"] - columns["baseline"]  # not finite where either is not
    values = {
        side: wilson(float(column.sum()), len(column))
        if measure.is_share and side != "difference"
        else bootstrap_mean(column[column.isfinite()], seed=seed)
        for side, column in columns.items()
    }
    return _row(
        name, measure.unit, meaning=measure.meaning, values={side: asdict(value) for side, value in values.items()}
    )


def _row(name: str, unit: str, *, meaning: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "unit": unit, "meaning": meaning, **values}


def _perplexity(losses: Sequence[tuple[float, float]], *, seed: int) -> dict[str, Any]:
    """Exponential of the mean loss per token, and of the ends of its interval over demonstrations."""
    # Sorted, because which row comes first depends on the number of ranks, and the bootstrap draws by place.
    nats, tokens = torch.tensor(sorted(row for row in losses if row[1] > 0), dtype=torch.float64).T
    mean = bootstrap_mean(nats / tokens, seed=seed, weights=tokens)
    return {"mean": math.exp(mean.mean), "low": math.exp(mean.low), "high": math.exp(mean.high), "count": mean.count}


def win_rate(verdicts: Sequence[Verdict], *, lengths: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How often the model is better, by one judge.

    A pair is won where the mean of all answers to it, in both orders, is for the model; a tie counts one half.

    Args:
        verdicts: of one judge; a pair may have none, one, or one for each order.
        lengths: of each pair, the model's response and the other's, in tokens.
    """
    pairs = _by_pair(verdicts)
    outcomes = {row: _outcome(statistics.fmean(said)) for row, said in pairs.items()}
    longer, shorter = (
        [outcome for row, outcome in outcomes.items() if sign * (lengths[row][0] - lengths[row][1]) > 0]
        for sign in (1, -1)
    )
    won = [outcome == 1 for outcome in longer if outcome != 0.5] + [
        outcome == 0 for outcome in shorter if outcome != 0.5
    ]
    return {
        "pairs": len(lengths),
        "judged": len(outcomes),
        "wins": sum(outcome == 1 for outcome in outcomes.values()),
        "ties": sum(outcome == 0.5 for outcome in outcomes.values()),
        "losses": sum(outcome == 0 for outcome in outcomes.values()),
        "win_rate": _share(list(outcomes.values())),
        "win_rate_when_longer": _share(longer),
        "win_rate_when_shorter": _share(shorter),
        "longer_wins": _share(won),
        **_place(verdicts, pairs),
    }


def _by_pair(verdicts: Sequence[Verdict]) -> dict[int, list[float]]:
    """All that was said of each pair."""
    pairs: dict[int, list[float]] = {}
    for verdict in sorted(verdicts, key=lambda verdict: verdict.row):
        pairs.setdefault(verdict.row, []).append(verdict.preference)
    return pairs


def _outcome(preference: float) -> float:
    return 0.5 if preference == 0 else float(preference > 0)


def _share(outcomes: Sequence[float]) -> dict[str, Any]:
    return asdict(wilson(float(sum(outcomes)), len(outcomes)))


def _place(verdicts: Sequence[Verdict], pairs: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """What the place of a response does: how often A wins, and how many pairs are judged otherwise when turned."""
    for_a = [_outcome(v.preference if v.model_is_a else -v.preference) for v in verdicts if v.model_is_a is not None]
    twice = [said for said in pairs.values() if len(said) > 1]
    found = {"first_wins": _share(for_a)} if for_a else {}
    return found | ({"inconsistent": _share([min(said) < 0 < max(said) for said in twice])} if twice else {})


def outcomes_by_pair(verdicts: Sequence[Verdict], *, count: int) -> list[float | None]:
    """For each of `count` pairs the mean preference, from -1 to 1, None where it was not judged."""
    pairs = _by_pair(verdicts)
    return [statistics.fmean(pairs[row]) if row in pairs else None for row in range(count)]


def reward_model_quality(
    chosen: Sequence[float], rejected: Sequence[float], *, subsets: Sequence[str], seed: int
) -> dict[str, Any]:
    """How often a reward model prefers what people chose, by how much, and whether it is as sure as it is right.

    Args:
        chosen: scores of the chosen response of each pair.
        rejected: those of the other.
        subsets: the part of the data that each pair belongs to; empty where there is none.
        seed: of the intervals.
    """
    differences = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(rejected, dtype=torch.float64)
    places = {name: [row for row, found in enumerate(subsets) if found == name] for name in sorted(set(subsets))}
    parts = {name or "(none)": differences[rows] for name, rows in places.items()} if any(subsets) else {}
    return {
        **_accuracy(differences, seed=seed),
        "subsets": {name: _accuracy(part, seed=seed) for name, part in parts.items()},
        "calibration": _calibration(differences),
    }


def _accuracy(differences: torch.Tensor, *, seed: int) -> dict[str, Any]:
    """A tie of the two scores is an error, as in training."""
    return {
        "accuracy": asdict(wilson(float((differences > 0).sum()), len(differences))),
        "margin": asdict(bootstrap_mean(differences.sort().values, seed=seed)),
    }


def _calibration(differences: torch.Tensor) -> dict[str, Any]:
    """The reliability table, its error, and the temperature that would mend it, with what it would leave."""
    table = reliability(differences)
    temperature = fitted_temperature(differences)
    calibrated = {}
    if temperature is not None:
        calibrated = {
            "error_at_temperature": expected_calibration_error(reliability(differences / temperature)),
            "loss_at_temperature": preference_nll(differences, temperature=temperature),
        }
    return {
        "bins": [
            {
                "from": row.low,
                "to": row.high,
                "confidence": row.confidence,
                "right": asdict(wilson(row.right, row.count)),
            }
            for row in table
        ],
        "error": expected_calibration_error(table),
        "loss": preference_nll(differences),
        "temperature": temperature,
        **calibrated,
    }
