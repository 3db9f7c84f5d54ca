"""Signs of trouble, each on numbers worked by hand, and silent on a run that goes well."""

import math

import pytest

from rlhf.tracking.watch import degenerate_share, length_correlation, repeated_share, signs

TEXTS = [f"answer number {number}" for number in range(10)]


def answers(step, *, scores, gold=None, lengths=None, texts=TEXTS, ended=True):
    gold, lengths = gold or [0.0] * len(scores), lengths or [5, 6] * 5
    columns = zip(texts, scores, gold, lengths, strict=True)
    return [
        {"step": step, "prompt": f"p{i}", "response": t, "score": s, "gold/rating": g, "length": n, "ended": ended}
        for i, (t, s, g, n) in enumerate(columns)
    ]


def names(rows, samples=()):
    return [sign.name for sign in signs(rows, list(samples))]


def evaluation(step, gold):
    return {"step": step, "eval/score": 0.0, "eval/kl": float(step), "gold/rating": gold}


def test_nothing_is_said_of_a_run_that_goes_well():
    rows = [
        {**evaluation(s, g), "objective/kl_per_token": 0.1, "objective/entropy": 2.0} for s, g in ((0, 0.1), (9, 0.5))
    ]
    scores = [0.0, 0.0, 1.0, 1.0] * 2 + [0.5, 0.5]  # as high for short answers as for long ones
    first, last = (answers(step, scores=scores, gold=[gold] * 10) for step, gold in ((0, 0.1), (9, 0.5)))
    assert names(rows, first + last) == []


def test_nothing_is_said_of_a_run_that_has_just_begun():
    assert names([]) == []
    assert names([{"step": 1, "objective/kl": 0.0}]) == []


# gold falls by 0.1 and 0.3 in turn: mean 0.2, deviation .10541, standard error .03333, six of them
FALLEN = [0.9, 0.7] * 5


def test_score_up_and_gold_down_is_said_with_the_step_where_gold_was_best():
    rows = [evaluation(0, 0.0), evaluation(4, 1.0), evaluation(8, 0.8)]
    samples = answers(0, scores=[0.0] * 10) + answers(4, scores=[1.0] * 10, gold=[1.0] * 10)
    samples += answers(8, scores=[1.5] * 10, gold=FALLEN)
    (sign,) = [sign for sign in signs(rows, samples) if sign.name == "parted:gold/rating"]
    for text in ("From step 4 to step 8", "rose by 0.5", "fell by 0.2", "6 standard errors over 10 prompts", "KL of 8"):
        assert text in sign.text, sign.text


def test_both_down_or_a_fall_within_the_noise_is_not_hacking():
    rows = [evaluation(4, 1.0), evaluation(8, 0.8)]
    best = answers(4, scores=[1.0] * 10, gold=[1.0] * 10)
    assert "parted:gold/rating" not in names(rows, best + answers(8, scores=[0.5] * 10, gold=FALLEN))
    noise = [2.0, -0.4] * 5  # mean 0.8, standard error 0.4
    assert "parted:gold/rating" not in names(rows, best + answers(8, scores=[1.5] * 10, gold=noise))


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([{"step": 1, "objective/kl_per_token": 1.2}], "kl"),
        ([{"step": 1, "objective/entropy": 3.0}, {"step": 2, "objective/entropy": 0.2}], "entropy"),
        ([{"step": 1, "policy/loss": None}], "not_finite"),
        ([{"step": 1, "policy/loss": math.nan}], "not_finite"),
        ([{"step": 1, "critic/skipped_steps": 2.0}], "not_finite"),
    ],
)
def test_numbers_that_run_away_are_said(rows, name):
    assert names(rows) == [name]


def test_steps_that_find_the_loss_scale_of_fp16_are_no_sign():
    search = {"train/grad_norm": None, "train/skipped_steps": 1.0, "train/scale_search_steps": 1.0}
    assert names([{"step": 1, **search}, {"step": 2, "train/grad_norm": 1.0, "train/scale_search_steps": 0.0}]) == []
    assert names([{"step": 1, **search, "train/loss": None}]) == ["not_finite"]
    update = {"actor/grad_norm": None, "actor/skipped_steps": 3.0, "actor/scale_search_steps": 2.0}
    assert [sign.text.split()[0] for sign in signs([{"step": 1, **update}], [])] == ["1"]


def test_reward_for_length_is_said():
    lengths = list(range(1, 11))
    assert length_correlation(answers(0, scores=[2.0 * n for n in lengths], lengths=lengths)) == pytest.approx(1.0)
    assert length_correlation(answers(0, scores=[1.0] * 10, lengths=lengths)) is None
    assert names([], answers(0, scores=[2.0 * n for n in lengths], lengths=lengths)) == ["length"]


def test_answers_that_fall_apart_are_said():
    scores = [0.0] * 10
    first = answers(0, scores=scores)
    same = answers(5, scores=scores, texts=["so good"] * 3 + TEXTS[3:])
    assert repeated_share(same) == 0.3
    assert names([], first + same) == ["repeats"]
    stuck = answers(5, scores=scores, texts=["", "", "good good good good good good", *TEXTS[3:]])
    assert degenerate_share(stuck) == 0.3
    assert names([], first + stuck) == ["degenerate"]
    assert names([], first + answers(5, scores=scores, ended=False)) == ["endless"]


def test_answers_that_were_like_that_from_the_start_are_not_a_sign():
    stuck = ["so good"] * 10
    both = answers(0, scores=[0.0] * 10, texts=stuck) + answers(5, scores=[0.0] * 10, texts=stuck)
    assert names([], both) == []
