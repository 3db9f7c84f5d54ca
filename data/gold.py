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
from collections.abc import Sequence
from pathlib import Path

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
    Fitted in closed form in its dual, so the cost is one solve of (documents x documents). The default penalty is
    where the leave-one-out error on the bundled gold ratings is flat.
    """

    def __init__(self, texts: Sequence[str], ratings: Sequence[float], *, penalty: float = 0.5) -> None:
        document_frequency = Counter(term for text in texts for term in set(terms(text)))
        kept = sorted(term for term, documents in document_frequency.items() if documents > 1)
        self._column = {term: column for column, term in enumerate(kept)}
        self._idf = np.array([np.log1p(len(texts) / document_frequency[term]) for term in kept])
        self._mean = float(np.mean(ratings))
        features = self._features(texts)
        gram = features @ features.T + penalty * np.eye(len(texts))
        self._weights: Floats = features.T @ np.linalg.solve(gram, np.asarray(ratings) - self._mean)

    def _features(self, texts: Sequence[str]) -> Floats:
        features = np.zeros((len(texts), len(self._column)))
        for row, text in enumerate(texts):
            for term, count in terms(text).items():
                if term in self._column:
                    features[row, self._column[term]] = count
        features *= self._idf
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        return features

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Predicted ratings, `[len(texts)]`; a text without a known term gets the mean rating."""
        return self._mean + self._features(texts) @ self._weights
