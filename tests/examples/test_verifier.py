"""The example of a verifier: its format is TRL's, its answers are compared by value, and both kinds of data work."""

import json
from pathlib import Path

import pytest

from examples.verifier import correct, formatted, given_answer, same
from rlhf.config.reward_config import RewardSettings
from rlhf.reward_calls import RewardFunctions
from rlhf.reward_functions import RewardRows

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/think_format.json").read_text())


def test_the_format_is_that_of_trl():
    assert [float(right) for right in formatted(GOLDEN["texts"])] == GOLDEN["rewards"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4", "4"),
        ("<think>2 + 2\nis 5</think>\nSo:\n 4 ", "4"),
        (r"<think>\boxed{5}</think> It is \boxed{4}, as \boxed{ 4.0} says.", "4.0"),
        ("", ""),
        ("</think>", ""),
        ("<think>4", "<think>4"),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(text, answer):
    assert given_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "right", "is_same"),
    [
        *[("4", "4", True), ("4.0", "4", True), ("1,000", "1000", True), ("5", "4", False), ("", "4", False)],
        *[("Paris.", "paris", True), ("the  cat", "The cat", True), ("Rome", "Paris", False), ("nan", "nan", False)],
        *[("snan", "4", False), ("1e9999999", "4", False), ("é", "É", True)],
    ],
)
def test_answers_are_compared_by_value(given, right, is_same):
    assert same(given, right) is is_same


@pytest.mark.parametrize("conversation", [False, True])
def test_both_are_reward_functions_for_text_and_for_conversations(conversation):
    prompt = [{"role": "user", "content": "2 + 2 ="}] if conversation else "2 + 2 ="
    columns = [{"prompt": prompt, "answer": answer} for answer in ("4", 4, None)]
    texts = ("<think>so</think>4", "5", "4")
    sources = [f"{ROOT}/examples/verifier.py:{name}" for name in ("correct", "formatted")]
    functions = RewardFunctions.load(RewardSettings(rewards=sources), stage="ppo")
    right, well_formed = functions.score(RewardRows.of(columns, texts=texts, token_ids=[[1]] * 3)).T.tolist()
    assert right[:2] == [1, 0]
    assert right[2] != right[2]  # NaN: no answer is known
    assert well_formed == [1, 0, 0]


def test_a_row_more_than_there_are_responses_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        correct(["4"], ["4", "5"])
