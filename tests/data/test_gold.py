"""The independent judges: the fit against least squares, and what they say of real reviews."""

import numpy as np
import pytest

from data.gold import (
    REVIEWS,
    RidgeJudge,
    lexicon,
    predicted_rating,
    read_ratings,
    reviews,
    ridge_judge,
    terms,
)

TEXTS = ["good film", "good good story", "bad film", "bad story", "a bad bad story", "a good film"]
RATINGS = [2.0, 3.0, -2.0, -1.0, -3.0, 1.0]


def test_terms_are_lower_case_words_and_neighbouring_pairs():
    assert terms("It's good, good!") == {"it's": 1, "good": 2, "it's good": 1, "good good": 1}


def test_the_dual_solution_is_the_least_squares_solution_of_the_augmented_system():
    judge = RidgeJudge(TEXTS, RATINGS, penalty=0.7)
    vocabulary = ["good", "bad", "film", "story", "a", "good film", "bad story"]  # every term of two or more texts
    frequency = {"good": 3, "bad": 3, "film": 3, "story": 3, "a": 2, "good film": 2, "bad story": 2}
    rows = np.array([[terms(text)[t] * np.log(1 + 6 / frequency[t]) for t in vocabulary] for text in TEXTS])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    augmented = np.vstack([rows, np.sqrt(0.7) * np.eye(len(vocabulary))])
    target = np.concatenate([RATINGS, np.zeros(len(vocabulary))])  # the ratings have mean 0
    weights, *_ = np.linalg.lstsq(augmented, target, rcond=None)
    np.testing.assert_allclose(judge(TEXTS), rows @ weights, rtol=1e-10)


def test_an_unknown_text_gets_the_mean_rating():
    judge = RidgeJudge(TEXTS, [rating + 0.5 for rating in RATINGS])
    assert judge(["zebra"])[0] == pytest.approx(0.5)


def test_the_judge_agrees_with_people_on_reviews_it_never_saw():
    texts, ratings = read_ratings(REVIEWS / "ratings_test.jsonl")
    predicted = ridge_judge()(texts)
    assert np.corrcoef(predicted, ratings)[0, 1] > 0.58
    assert np.mean((predicted > 0) == (np.array(ratings) > 0)) > 0.7


def test_the_lexicon_agrees_with_people_and_keeps_to_its_range():
    texts, ratings = read_ratings(REVIEWS / "ratings_test.jsonl")
    scores = lexicon([""] * len(texts), texts)
    assert np.corrcoef(scores, ratings)[0, 1] > 0.4
    assert np.abs(scores).max() <= 1.0


def test_the_lexicon_scores_the_published_example():
    # The package's README gives this compound score.
    assert lexicon([""], ["VADER is smart, handsome, and funny."])[0] == pytest.approx(0.8316)


def test_a_review_is_its_opening_and_its_continuation_without_the_instruction():
    assert reviews(["Movie review: A small"], [" gem, never dull."]) == ["A small gem, never dull."]


def test_both_metrics_judge_the_finished_review_and_put_praise_above_scorn():
    prompts, responses = ["Movie review: A"] * 2, [" wonderful, moving film.", " dull, stupid mess."]
    whole = ["A wonderful, moving film.", "A dull, stupid mess."]
    assert (lexicon(prompts, responses) == lexicon(["", ""], whole)).all()
    assert (predicted_rating(prompts, responses) == ridge_judge()(whole)).all()
    praise, scorn = predicted_rating(prompts, responses)
    assert praise > 1 > -1 > scorn
