"""What held-out answers come to, on numbers worked by hand."""

import pytest

from rlhf.evaluation.metrics import distinct_ngrams, policy_metrics
from rlhf.tracking.metric_registry import check

ROWS = [
    {"response": "a b a b", "score": 1.0, "raw_score": -2.0, "gold/x": 3.0, "kl": 0.5, "length": 4, "ended": True},
    {"response": "a", "score": 2.0, "raw_score": -4.0, "gold/x": 5.0, "kl": 1.5, "length": 2, "ended": False},
]


def test_every_number_of_an_answer_has_a_mean_that_the_registry_knows():
    found = policy_metrics(ROWS)
    assert found == {
        "eval/score": 1.5,
        "eval/raw_score": -3.0,
        "eval/kl": 1.0,
        "eval/response_length": 3.0,
        "eval/eos_rate": 0.5,
        "gold/x": 4.0,
        "eval/distinct_2": pytest.approx(2 / 3),  # ab, ba, ab
    }
    check("ppo", list(found))


def test_answers_without_a_word_pair_have_no_share_of_different_ones():
    assert distinct_ngrams(["one", "word", ""], length=2) is None
    assert distinct_ngrams(["one", "word", ""], length=1) == 1.0
    assert "eval/distinct_2" not in policy_metrics([row | {"response": "one"} for row in ROWS])
