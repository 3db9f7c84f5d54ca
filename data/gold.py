"""Metrics of a movie review that are independent of the reward model, so that its rising score can be checked.

Neither shares a label or a weight with the reward model: `predicted_rating` is a bag-of-words regression fitted to
human ratings that the reward model never saw, `lexicon` is VADER's word list and rules. Left out: any judge of fluency,
which is why length and distinct bigrams are reported beside these.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

REVIEWS = Path(__file__).parent / "reviews"
PROMPT = "Movie review: "

Floats = NDArray[np.float64]


def predicted_rating(prompts: Sequence[str], responses: Sequence[str]) -> Floats:
    """The rating that people would give each review, prompt and response together, as `ridge_judge` predicts it."""
    return ridge_judge()(reviews(prompts, responses))


def lexicon(prompts: Sequence[str], responses: Sequence[str]) -> Floats:
    """VADER compound sentiment of each review, prompt and response together, -1 to +1 (Hutto & Gilbert, ICWSM-14)."""
    return np.array([_vader().polarity_scores(text)["compound"] for text in reviews(prompts, responses)])


def reviews(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
    """The reviews that prompts and responses make together, without the words that introduce every prompt."""
    return [prompt.removeprefix(PROMPT) + response for prompt, response in zip(prompts, responses, strict=True)]


@functools.cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


@functools.cache
def ridge_judge() -> RidgeJudge:
    """The judge of the bundled reviews, fitted once per process to `ratings_gold.jsonl`."""
    return RidgeJudge(*read_ratings(REVIEWS / "ratings_gold.jsonl"))


def read_ratings(path: Path) -> tuple[list[str], list[float]]:
    """The texts and the mean human ratings (-4 to +4) of a JSONL file with rows `text, rating`."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [row["text"] for row in rows], [row["rating"] for row in rows]


def terms(text: str) -> Counter[str]:
    """How often each lower-case word and each pair of neighbouring words occurs in `text`."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return Counter(words + [f"{one} {other}" for one, other in zip(words, words[1:], strict=False)])


class RidgeJudge:
    """Predicts the human rating of a review, -4 to +4, by ridge regression on TF-IDF words and bigrams.

    Weights are log(1 + n / document frequency), rows have unit length; terms of a single document are dropped.
    The normal equations are solved in their dual by conjugate gradients on the sparse features (Hestenes & Stiefel
    1952), to the last digits. The default penalty is where the leave-one-out error on the bundled gold ratings is flat.
    """

    def __init__(self, texts: Sequence[str], ratings: Sequence[float], *, penalty: float = 0.5) -> None:
        counts = [terms(text) for text in texts]
        document_frequency = Counter(term for document in counts for term in document)
        kept = sorted(term for term, documents in document_frequency.items() if documents > 1)
        self._column = {term: column for column, term in enumerate(kept)}
        self._idf = np.array([np.log1p(len(texts) / document_frequency[term]) for term in kept])
        self._mean = float(np.mean(ratings))
        features = self._features(counts)
        targets = np.asarray(ratings) - self._mean
        solved = _solve(lambda x: features.times(features.transposed_times(x)) + penalty * x, targets)
        self._weights = features.transposed_times(solved)

    def _features(self, counts: Sequence[Counter[str]]) -> _Sparse:
        entries = [
            (row, column, count)
            for row, document in enumerate(counts)
            for term, count in document.items()
            if (column := self._column.get(term)) is not None
        ]
        rows, columns, occurrences = np.array(entries, dtype=int).reshape(-1, 3).T
        values = occurrences * self._idf[columns]
        norms = np.sqrt(_sums(values**2, rows, count=len(counts)))
        return _Sparse(rows, columns, values / norms[rows], (len(counts), len(self._column)))

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Predicted ratings, `[len(texts)]`; a text without a known term gets the mean rating."""
        return self._mean + self._features([terms(text) for text in texts]).times(self._weights)


class _Sparse(NamedTuple):
    """A matrix as its entries that are not zero."""

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    values: Floats
    shape: tuple[int, int]

    def times(self, vector: Floats) -> Floats:
        return _sums(self.values * vector[self.columns], self.rows, count=self.shape[0])

    def transposed_times(self, vector: Floats) -> Floats:
        return _sums(self.values * vector[self.rows], self.columns, count=self.shape[1])


def _sums(values: Floats, places: NDArray[np.intp], *, count: int) -> Floats:
    """The sum of the values of each place."""
    return np.asarray(np.bincount(places, weights=values, minlength=count), dtype=np.float64)


def _solve(matrix: Callable[[Floats], Floats], targets: Floats) -> Floats:
    """The `x` with `matrix(x) == targets`, for a symmetric positive definite matrix."""
    x, residual, direction = np.zeros_like(targets), targets, targets
    while (squared := residual @ residual) > 1e-26 * (targets @ targets):
        product = matrix(direction)
        step = squared / (direction @ product)
        x, residual = x + step * direction, residual - step * product
        direction = residual + (residual @ residual) / squared * direction
    return x
