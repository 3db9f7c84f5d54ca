"""Statistics of a policy's answers to the held-out prompts, which are the same every time.

See also: `checks.py`, which concludes from them that something goes wrong.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf.algorithms.intervals import Interval
from rlhf.tracking.jsonl_log import Row, is_number

SMALLEST_SAMPLE = 8  # responses below which nothing is concluded from their distribution


def change(before: Sequence[Row], after: Sequence[Row], *, key: str) -> Interval | None:
    """Mean change of a column between two answers to the same prompts; None when too few answers have it."""
    pairs: list[tuple[Any, Any]] = [
        (row.get(key), other.get(key))
        for row, other in zip(before, after, strict=False)
        if row.get("prompt") == other.get("prompt")
    ]
    changes = [
        float(new) - float(old)
        for old, new in pairs
        if all(isinstance(value, bool) or is_number(value) for value in (old, new))
    ]
    if len(changes) < SMALLEST_SAMPLE:
        return None
    # Imported here: the report of a stage without answers need not wait for torch.
    import torch

    from rlhf.algorithms.statistics import bootstrap_mean

    return bootstrap_mean(torch.tensor(changes, dtype=torch.float64), seed=0)


def length_correlation(rows: Sequence[Row]) -> float | None:
    """Pearson's correlation of length and score; None with too few responses or when either is constant."""
    pairs = [(row.get("length"), row.get("score")) for row in rows]
    numbers = [(float(length), float(score)) for length, score in pairs if is_number(length) and is_number(score)]
    if len(numbers) < SMALLEST_SAMPLE:
        return None
    lengths, scores = zip(*numbers, strict=True)
    if len(set(lengths)) == 1 or len(set(scores)) == 1:
        return None
    return statistics.correlation(lengths, scores)


def repeated_share(rows: Sequence[Row]) -> float:
    """Share of responses given word for word to some other prompt too."""
    texts = Counter(" ".join(str(row.get("response", "")).lower().split()) for row in rows)
    return sum(count for count in texts.values() if count > 1) / max(len(rows), 1)


def degenerate_share(rows: Sequence[Row]) -> float:
    """Share of responses without a word, or with six words or more where half of the word pairs are repeats."""
    return sum(_is_degenerate(str(row.get("response", ""))) for row in rows) / max(len(rows), 1)


def endless_share(rows: Sequence[Row]) -> float:
    """Share of responses that were cut instead of ending by themselves."""
    return sum(not row.get("ended", True) for row in rows) / max(len(rows), 1)


def _is_degenerate(text: str) -> bool:
    words = text.lower().split()
    pairs = list(zip(words, words[1:], strict=False))
    return not words or (len(words) >= 6 and 2 * len(set(pairs)) <= len(pairs))
