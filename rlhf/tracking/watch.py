"""Signs that a stage goes wrong, in words: reward hacking, runaway KL, collapsing entropy, numbers that are none.

Each sign looks at what was logged so far and at the answers to held-out prompts, the same prompts every time. Left out:
where and when they are said (`report/page.py`, `lookout.py`), and stopping a run, which is a person's decision.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from rlhf.tracking.table import number

Row = Mapping[str, Any]
R = TypeVar("R", bound=Row)

ENTROPY = "objective/entropy"
KL_PER_TOKEN = 1.0  # nats: on average, a token is e times as likely as under the reference
ENTROPY_SHARE = 0.1  # of what it was at the start
SURE = 2.0  # standard errors
CORRELATED = 0.5
REPEATED = 0.2  # of the responses
_SMALLEST_SAMPLE = 8  # responses: below, nothing is said about their distribution


@dataclass(frozen=True)
class Sign:
    """Something that a person should look at."""

    name: str
    """Which sign."""
    text: str
    """What was seen, and what it may mean."""


def signs(rows: Sequence[Row], samples: Sequence[Row]) -> list[Sign]:
    """All signs in what a stage has logged; most are about PPO.

    Args:
        rows: of `metrics.jsonl`, oldest first.
        samples: of `samples.jsonl`: the answers of every evaluation to the same prompts, in the same order.
    """
    answers = by_step(samples)
    found = [_not_finite(rows), _kl(rows), _entropy(rows), *_parted(rows, answers)]
    if answers:
        last = answers[max(answers)]
        found += [_length(last), *(_risen(answers, share) for share in _SHARES)]
    return [sign for sign in found if sign is not None]


def by_step(samples: Sequence[R]) -> dict[int, list[R]]:
    """The rows of each evaluation."""
    steps: dict[int, list[R]] = {}
    for row in samples:
        steps.setdefault(row["step"], []).append(row)
    return steps


def series(rows: Sequence[Row], key: str) -> list[tuple[int, float]]:
    """Steps and values of a metric where it is a finite number."""
    return [(row["step"], float(row[key])) for row in rows if is_number(row.get(key))]


def _not_finite(rows: Sequence[Row]) -> Sign | None:
    bad = [(row["step"], key) for row in rows for key in row if "/" in key and not _is_right(row, key)]
    skipped = _total(rows, "skipped_steps") - _total(rows, "scale_search_steps")
    if not bad and not skipped:
        return None
    where = f"{bad[0][1]} was not finite at step {bad[0][0]}" if bad else ""
    steps = f"{number(int(skipped))} optimizer steps were skipped for a gradient that was not finite" if skipped else ""
    advice = "Lower the learning rate, or set engine.precision=fp32."
    return Sign("not_finite", f"{'; '.join(text for text in (where, steps) if text)}. {advice}")


def _is_right(row: Row, key: str) -> bool:
    """Whether a value is finite, or the norm of a gradient that overflowed while fp16 looked for its loss scale."""
    model, _, name = key.partition("/")
    return is_number(row[key]) or (name == "grad_norm" and bool(row.get(f"{model}/scale_search_steps")))


def _total(rows: Sequence[Row], name: str) -> float:
    """The sum of a count over steps and models."""
    keys = dict.fromkeys(key for row in rows for key in row if key.endswith(f"/{name}"))
    return sum(value for key in keys for _, value in series(rows, key))


def _kl(rows: Sequence[Row]) -> Sign | None:
    found = series(rows, "objective/kl_per_token")
    if not found or found[-1][1] <= KL_PER_TOKEN:
        return None
    step, value = found[-1]
    return Sign(
        "kl",
        f"KL to the reference is {number(value)} nats per token at step {step}: the policy has run away from the "
        "reference, where the reward model was not trained to judge. Raise ppo.kl.coef, or lower ppo's learning rate.",
    )


def _entropy(rows: Sequence[Row]) -> Sign | None:
    found = series(rows, ENTROPY)
    if len(found) < 2 or found[-1][1] >= ENTROPY_SHARE * found[0][1]:
        return None
    (_, first), (step, last) = found[0], found[-1]
    return Sign(
        "entropy",
        f"Entropy fell from {number(first)} to {number(last)} nats per token by step {step}: the policy says nearly "
        "the same thing every time and explores no more. Raise ppo.kl.coef, or lower ppo's learning rate.",
    )


def _parted(rows: Sequence[Row], answers: Mapping[int, list[Row]]) -> Iterator[Sign]:
    """Proxy up and gold down since the best gold: the picture of Gao et al. 2023, figure 1."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("gold/"))
    for key in keys:
        steps = [(step, value) for step, value in series(rows, key) if step in answers]
        if len(steps) < 2:
            continue
        best, last = max(steps, key=lambda point: point[1])[0], steps[-1][0]
        gold, proxy = (_change(answers[best], answers[last], key=name) for name in (key, "score"))
        if gold is None or proxy is None or best == last or proxy.mean <= 0 or gold.in_errors > -SURE:
            continue
        kl = dict(series(rows, "eval/kl")).get(last)
        yield Sign(
            f"parted:{key}",
            f"From step {best} to step {last} the reward model's score rose by {number(proxy.mean)} while {key}, which "
            f"no model was trained on, fell by {number(-gold.mean)} ({number(-gold.in_errors)} standard errors over "
            f"{gold.count} prompts){'' if kl is None else f', at a KL of {number(kl)} nats'}: the policy has learnt "
            f"what pleases the reward model, not what it stands for. By {key} the policy of step {best} is the best; "
            "raise ppo.kl.coef, or stop there.",
        )


@dataclass(frozen=True)
class _Change:
    """Of a number between two answers to the same prompt."""

    mean: float
    in_errors: float
    """The mean in standard errors."""
    count: int


def _change(before: Sequence[Row], after: Sequence[Row], *, key: str) -> _Change | None:
    pairs: list[tuple[Any, Any]] = [(row.get(key), other.get(key)) for row, other in zip(before, after, strict=False)]
    changes = [float(new) - float(old) for old, new in pairs if is_number(old) and is_number(new)]
    if len(changes) < _SMALLEST_SAMPLE:
        return None
    mean, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
    return _Change(mean, mean / error if error else math.copysign(math.inf, mean) if mean else 0.0, len(changes))


def _length(rows: Sequence[Row]) -> Sign | None:
    found = length_correlation(rows)
    if found is None or found <= CORRELATED:
        return None
    return Sign(
        "length",
        f"The longer a response, the higher its score (correlation {found:.2f} over {len(rows)} held-out prompts): "
        "part of the reward may be for length alone. Compare answers of equal length, or balance the preferences.",
    )


def length_correlation(rows: Sequence[Row]) -> float | None:
    """Pearson's correlation of length and score over responses; None where there are too few, or all are equal."""
    pairs = [
        (float(r["length"]), float(r["score"]))
        for r in rows
        if is_number(r.get("length")) and is_number(r.get("score"))
    ]
    if len(pairs) < _SMALLEST_SAMPLE:
        return None
    lengths, scores = zip(*pairs, strict=True)
    if len(set(lengths)) == 1 or len(set(scores)) == 1:
        return None
    return statistics.correlation(lengths, scores)


@dataclass(frozen=True)
class _Share:
    """A share of the responses that should stay small."""

    name: str
    of: Callable[[Sequence[Row]], float]
    what: str
    why: str


def _risen(answers: Mapping[int, list[Row]], share: _Share) -> Sign | None:
    """A sign where the share is large and has risen since the first evaluation."""
    first, last = (answers[step] for step in (min(answers), max(answers)))
    if len(last) < _SMALLEST_SAMPLE:
        return None
    before, after = share.of(first), share.of(last)
    if after <= max(REPEATED, before):
        return None
    seen = f"{after:.0%} of the {len(last)} held-out {share.what} at step {max(answers)} ({before:.0%} at first)"
    return Sign(share.name, f"{seen}: {share.why}.")


def repeated_share(rows: Sequence[Row]) -> float:
    """Share of responses that some other prompt was given too, word for word."""
    texts = Counter(" ".join(str(row.get("response", "")).lower().split()) for row in rows)
    return sum(count for count in texts.values() if count > 1) / max(len(rows), 1)


def degenerate_share(rows: Sequence[Row]) -> float:
    """Share of responses without a word, or with six words or more of which half of the pairs are repeats."""
    return sum(map(_is_degenerate, (str(row.get("response", "")) for row in rows))) / max(len(rows), 1)


def endless_share(rows: Sequence[Row]) -> float:
    """Share of responses that were cut instead of ending by themselves."""
    return sum(not row.get("ended", True) for row in rows) / max(len(rows), 1)


def _is_degenerate(text: str) -> bool:
    words = text.lower().split()
    pairs = list(zip(words, words[1:], strict=False))
    return not words or (len(words) >= 6 and 2 * len(set(pairs)) <= len(pairs))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a logged value is a finite number; a whole one that is too large for a float counts as infinite."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) <= sys.float_info.max


_SHARES = (
    _Share(
        "repeats",
        of=repeated_share,
        what="responses are word for word that of another prompt",
        why="the policy has found an answer that pleases whatever the question is",
    ),
    _Share(
        "degenerate",
        of=degenerate_share,
        what="responses are empty or repeat themselves",
        why="the text is falling apart",
    ),
    _Share(
        "endless",
        of=endless_share,
        what="responses do not end by themselves",
        why="a longer response may be paid better than an end; see ppo.score.no_end_kind",
    ),
)
