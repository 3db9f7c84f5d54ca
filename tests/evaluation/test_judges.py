"""Judges see two responses and not whose they are; what they say is checked, balanced, and kept."""

import io
import sys

import numpy as np
import pytest
import torch

from rlhf.evaluation.judges import (
    PAIRS_PER_CALL,
    HumanJudge,
    Judgement,
    Pairs,
    Question,
    both_orders,
    judge_by_function,
    judge_by_scores,
    load_judges,
    parse_preferences,
    random_order,
)
from rlhf.runtime.errors import RunError
from rlhf.tracking.jsonl_log import JsonlLog

PAIRS = Pairs(("p0", "p1", "p2", "p3"), ("m0", "m1", "same", "m3"), ("a0", "a1", "same", "a3"))
QUESTIONS = [Question(0, True), Question(1, False), Question(2, True), Question(3, False)]
SHOWN = {"p0": ("m0", "a0"), "p1": ("a1", "m1"), "p3": ("a3", "m3")}


def test_the_model_comes_first_in_a_random_half_of_the_pairs():
    for count in (1, 7, 100):
        questions = random_order(count, seed=5)
        assert [question.row for question in questions] == list(range(count))
        assert sum(question.model_is_a for question in questions) == (count + 1) // 2
        assert questions == random_order(count, seed=5)
    assert random_order(100, seed=5) != random_order(100, seed=6)
    assert [q.model_is_a for q in random_order(100, seed=5)] != [True] * 50 + [False] * 50


def test_every_pair_is_asked_in_both_orders_a_few_at_a_time():
    questions = random_order(PAIRS_PER_CALL + 3, seed=1)
    calls = both_orders(questions)
    assert max(map(len, calls)) == PAIRS_PER_CALL
    asked = [question for call in calls for question in call]
    assert sorted(asked) == sorted((row, side) for row in range(len(questions)) for side in (True, False))
    assert asked[: len(questions)] == questions


def test_a_function_sees_texts_alone_and_its_answer_is_brought_to_the_model_view():
    seen = []

    def judge(prompts, first, second):
        seen.extend(zip(prompts, first, second, strict=True))
        return ["a", "b", 0.25, "TIE"]

    found = judge_by_function("x", judge, pairs=PAIRS, questions=QUESTIONS)
    assert seen == [("p0", "m0", "a0"), ("p1", "a1", "m1"), ("p2", "same", "same"), ("p3", "a3", "m3")]
    assert found == [
        Judgement(0, 1.0, True),
        Judgement(1, 1.0, False),
        Judgement(2, 0.25, True),
        Judgement(3, 0.0, False),
    ]


@pytest.mark.parametrize(
    "answers", [["a", "b", "tie"], (1, -1, 0), np.array([1.0, -1.0, 0.0]), torch.tensor([1, -1, 0])]
)
def test_words_and_numbers_are_preferences(answers):
    assert parse_preferences(answers, count=3, name="x") == [1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["a", "b"], "2 answers to 3 pairs"),
        ("aab", "returned 'aab';"),
        (None, "returned None"),
        (["a", "b", "c"], "'c' for pair 2 of 3"),
        ([0.1, 1.5, 0.2], "1.5 for pair 1"),
        ([float("nan"), 0, 0], "nan for pair 0"),
        ([True, 0, 0], "True for pair 0"),
        ([None, 0, 0], "None for pair 0"),
        ([{}, 0, 0], "{} for pair 0"),
    ],
)
def test_anything_else_is_refused_with_the_name_of_the_judge(answers, said):
    with pytest.raises(RunError, match=r"judge me:x returned .*expected 3 preferences, each a, b, tie") as error:
        parse_preferences(answers, count=3, name="me:x")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("rewrd", "'rewrd' is no judge; expected reward, human, or module:function"),
        ("math:nothing", "no such function"),
        ("no.such:thing", "no such function"),
        (":x", "no such function"),
        ("math:pi", "found a float; expected a function"),
    ],
)
def test_a_judge_that_is_none_is_named(name, sentence):
    with pytest.raises(ValueError, match=r"eval\.judges") as error:
        load_judges(["reward", name])
    assert sentence in str(error.value)


def test_the_higher_score_wins_equal_responses_tie_and_what_is_not_finite_is_not_judged():
    found = judge_by_scores([1.0, 2.0, 3.001, float("nan")], [2.0, 1.0, 3.0, 0.0], pairs=PAIRS)
    assert found == [Judgement(0, -1.0), Judgement(1, 1.0), Judgement(2, 0.0)]  # of the third, both said the same
    assert judge_by_scores([2.0] * 4, [2.0] * 4, pairs=PAIRS)[0] == Judgement(0, 0.0)


def person(folder, lines):
    """Somebody who types `lines`, and what they have seen."""
    screen, keys = io.StringIO(), io.StringIO(lines)
    return HumanJudge(keys, screen, JsonlLog(folder / "judgements.jsonl", steps=False)), screen


def test_a_person_is_asked_blind_and_equal_responses_are_a_tie(tmp_path):
    somebody, screen = person(tmp_path, "a\na\na\n")
    found = somebody.judge(PAIRS, questions=QUESTIONS, seed=0)
    # A is the model's for row 0 and the other's for rows 1 and 3
    assert {v.row: v.preference for v in found} == {0: 1.0, 1: -1.0, 2: 0.0, 3: -1.0}
    shown = screen.getvalue()
    for prompt, (first, second) in SHOWN.items():
        assert f"| {prompt}\n--- A\n  | {first}\n--- B\n  | {second}\n" in shown
    assert "same" not in shown
    assert "model" not in shown


def test_a_person_may_stop_and_go_on_later(tmp_path):
    first, _ = person(tmp_path, "t\nq\nb\n")
    begun = first.judge(PAIRS, questions=QUESTIONS, seed=0)
    assert len(begun) == 2  # one tie said, one that is the same
    second, screen = person(tmp_path, "b\n")  # and then the lines end
    more = second.judge(PAIRS, questions=QUESTIONS, seed=0)
    assert "2 pairs to judge" in screen.getvalue()
    assert len(more) == 3
    assert set(begun) <= set(more)
    third, screen = person(tmp_path, "")
    assert (
        len(third.judge(PAIRS, questions=[Question(row, not side) for row, side in QUESTIONS], seed=9)) == 3
    )  # the end of lines is no answer


def test_what_was_judged_of_other_responses_does_not_count(tmp_path):
    somebody, _ = person(tmp_path, "a\na\na\n")
    somebody.judge(PAIRS, questions=QUESTIONS, seed=0)
    others = Pairs(PAIRS.prompts, PAIRS.baseline, PAIRS.model)
    nobody, screen = person(tmp_path, "")
    assert [v.row for v in nobody.judge(others, questions=QUESTIONS, seed=0)] == [2]
    assert "3 pairs to judge" in screen.getvalue()


def test_a_half_written_judgement_is_forgotten(tmp_path):
    somebody, _ = person(tmp_path, "a\na\na\n")
    somebody.judge(PAIRS, questions=QUESTIONS, seed=0)
    file = tmp_path / "judgements.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    again, screen = person(tmp_path, "t\n")
    assert len(again.judge(PAIRS, questions=QUESTIONS, seed=0)) == 4
    assert "1 pairs to judge" in screen.getvalue()


def test_a_word_that_is_no_answer_is_asked_again(tmp_path):
    somebody, screen = person(tmp_path, "maybe\x1b[31m\nA\n")
    found = somebody.judge(Pairs(("p",), ("m",), ("a",)), questions=[Question(0, True)], seed=0)
    assert found == [Judgement(0, 1.0, True)]
    assert "is no answer" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()


def test_responses_cannot_steer_the_terminal_or_pass_for_the_other(tmp_path):
    evil = "\x1b[2Jfine\n--- B\n  | \u202ebad"
    somebody, screen = person(tmp_path, "b\n")
    somebody.judge(Pairs(("p",), (evil,), ("honest",)), questions=[Question(0, True)], seed=0)
    shown = screen.getvalue()
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert [line for line in shown.split("\n") if line.startswith("---")] == ["--- 1 of 1: prompt", "--- A", "--- B"]


def test_a_judge_is_found_where_the_run_was_started_and_stands_in_for_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_of_mine.py").write_text("def prefer(prompts, a, b):\n    return ['a'] * len(prompts)\n")
    (tmp_path / "broken_judge.py").write_text("def prefer(:\n")
    (tmp_path / "data.py").write_text("def prefer(prompts, a, b):\n    return ['a'] * len(prompts)\n")
    assert load_judges(["judge_of_mine:prefer"])["judge_of_mine:prefer"](["p"], ["x"], ["y"]) == ["a"]
    for name in ("data:prefer", "no_such_judge:prefer"):
        with pytest.raises(ValueError, match=r"no such function"):
            load_judges([name])
    with pytest.raises(
        ValueError, match=r"cannot be imported: SyntaxError: invalid syntax \(broken_judge.py, line 1\)"
    ):
        load_judges(["broken_judge:prefer"])
