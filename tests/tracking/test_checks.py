"""Every check on numbers worked by hand, and silent on a run that goes well."""

import math
import random

import pytest

from rlhf.tracking.alerts import StageChecks
from rlhf.tracking.answer_statistics import degenerate_share, length_correlation, repeated_share
from rlhf.tracking.checks import CHECKS

TEXTS = [f"answer number {number}" for number in range(10)]


def answers(step, *, scores, gold=None, lengths=None, texts=TEXTS, ended=True, raw=None):
    gold, lengths, raw = gold or [0.0] * len(scores), lengths or [5, 6] * 5, raw or scores
    columns = zip(texts, scores, gold, lengths, raw, strict=True)
    return [
        {"step": step, "prompt": f"p{i}", "response": t, "score": s, "gold/rating": g, "length": n, "ended": ended}
        | {"raw_score": r}
        for i, (t, s, g, n, r) in enumerate(columns)
    ]


def results(rows, samples=(), **more):
    return StageChecks(more.pop("stage", "ppo"), rows, samples=list(samples), **more).results


def names(rows, samples=(), **more):
    return [name for name, found in results(rows, samples, **more).items() if found.is_wrong]


def evaluation(step, gold=None, **more):
    return {
        "step": step,
        "eval/score": 0.0,
        "eval/kl": float(step),
        **({} if gold is None else {"gold/rating": gold}),
    } | more


def evaluated(*samples):
    """The rows of the evaluations behind `samples`, and these."""
    return [evaluation(found[0]["step"]) for found in samples], [row for found in samples for row in found]


SCORES = [0.0, 0.0, 1.0, 1.0] * 2 + [0.5, 0.5]  # as high for short answers as for long ones


def test_nothing_is_reported_of_a_run_that_goes_well_and_everything_was_checked():
    rows = [
        evaluation(s, g, **{"objective/kl_per_token": 0.1, "objective/entropy": 2.0, "objective/clamped": 0.0})
        for s, g in ((0, 0.1), (9, 0.5))
    ]
    rows[1] |= {"reward/model/none": 0.0}
    rows[0] |= {"reward_model/accuracy": 0.75, "reward_model/pairs": 100.0, "reward_model/score_std": 0.8}
    first = answers(0, scores=SCORES, gold=[0.1] * 10)
    last = answers(9, scores=[score + 0.2 for score in SCORES], gold=[0.5] * 10)
    found = results(rows, first + last, total_steps=9)
    assert {name.partition(":")[0] for name in found} == {*CHECKS} - {"pairs"}  # which is for DPO
    assert {name for name, result in found.items() if result.is_wrong is not False} == set()


def test_nothing_is_reported_of_a_run_that_has_just_begun_and_nothing_was_checked():
    assert {found.is_wrong for found in results([]).values()} == {None}
    found = results([{"step": 1, "objective/kl": 0.0}])
    assert [name for name, result in found.items() if result.is_wrong is not None] == ["not_finite"]


def test_a_stage_has_the_checks_that_concern_it():
    assert list(results([], stage="sft")) == ["not_finite"]
    assert list(results([], stage="reward")) == ["not_finite", "coin", "flat"]
    assert list(results([], stage="dpo")) == ["not_finite", "pairs"]


def test_dpo_that_learns_nothing_about_new_pairs_is_reported_at_its_end():
    def after(accuracy):
        rows = [{"step": step, "eval/accuracy": accuracy, "eval/pairs": 100.0} for step in (0, 8)]
        return results(rows[:1], stage="dpo", total_steps=8)["pairs"], results(rows, stage="dpo", total_steps=8)[
            "pairs"
        ]

    before, end = after(0.59)  # Wilson: 0.492 to 0.681
    assert before.is_wrong is None
    assert end.is_wrong
    assert "59% of 100 held-out pairs" in end.text
    assert after(0.61)[1].is_wrong is False  # 0.512 to 0.700


def test_what_was_wrong_once_stays_with_its_steps():
    rows = [{"step": step, "objective/kl_per_token": kl} for step, kl in ((1, 0.1), (2, 1.5), (3, 1.2), (4, 0.2))]
    over = results(rows)["kl"]
    assert (over.is_wrong, over.first, over.last, over.holds) == (True, 2, 3, False)
    assert "1.2 nats per token at step 3" in over.text
    still = results(rows[:3])["kl"]
    assert (still.first, still.last, still.holds) == (2, 3, True)
    again = results([*rows, {"step": 5, "objective/kl_per_token": 1.1}])["kl"]
    assert (again.first, again.last, again.holds) == (2, 5, True)


def test_too_few_answers_and_no_gold_metric_are_named_as_unchecked():
    few = [answers(step, scores=SCORES)[:3] for step in (0, 9)]
    found = results(*evaluated(*few), total_steps=9)
    for name in ("repeats", "degenerate", "endless", "length", "raw_fell", "not_risen"):
        assert (found[name].is_wrong, "3 held-out prompts" in found[name].text) == (None, True), name
    assert (found["parted"].is_wrong, "data.gold" in found["parted"].text) == (None, True)
    with_gold = [evaluation(step, 1.0) for step in (0, 9)]
    assert "3 held-out prompts" in results(with_gold, sum(few, []))["parted"].text
    rows, samples = evaluated(*(answers(step, scores=SCORES) for step in (0, 9)))
    found = results(rows, samples)
    assert (found["parted"].is_wrong, "data.gold" in found["parted"].text) == (None, True)
    assert found["repeats"].is_wrong is False


@pytest.mark.parametrize(
    ("accuracy", "pairs", "is_wrong"),
    [
        (0.5, 16, True),
        (0.44, 16, True),
        (0.5625, 16, True),
        (0.7, 10, True),  # Wilson: 0.397 to 0.892
        (0.7, 100, False),  # 0.604 to 0.781
        (0.59, 100, True),  # 0.492 to 0.681
        (0.61, 100, False),  # 0.512 to 0.700
        (0.2, 1000, True),  # worse than a coin is no better
    ],
)
def test_a_reward_model_that_is_no_better_than_a_coin_is_reported_at_its_end_and_before_ppo(accuracy, pairs, is_wrong):
    own = {"step": 60, "eval/accuracy": accuracy, "eval/pairs": float(pairs), "eval/score_std": 1.0}
    assert names([{**own, "step": 0}, own], stage="reward", total_steps=60) == ["coin"] * is_wrong
    before = {"step": 0, "reward_model/accuracy": accuracy, "reward_model/pairs": float(pairs)}
    assert names([before]) == ["coin"] * is_wrong
    assert f"{accuracy:.0%} of {pairs:,} held-out pairs" in results([before])["coin"].text or not is_wrong


def test_a_reward_model_is_not_checked_before_it_has_learnt():
    assert names([{"step": 0, "eval/accuracy": 0.5, "eval/pairs": 16.0, "eval/score_std": 0.001}], stage="reward") == []


@pytest.mark.parametrize(("deviation", "is_wrong"), [(0.0, True), (0.006, True), (0.09, True), (0.3, False)])
def test_scores_that_hardly_differ_are_reported(deviation, is_wrong):
    assert names([{"step": 0, "reward_model/score_std": deviation}]) == ["flat"] * is_wrong
    own = {"step": 9, "eval/score_std": deviation}
    assert names([own], stage="reward", total_steps=9) == ["flat"] * is_wrong


@pytest.mark.parametrize("key", ["eval/clamped", "objective/clamped"])
def test_scores_at_the_clamp_are_reported(key):
    assert names([{"step": 0, key: 0.2}]) == []
    found = results([{"step": 0, key: 0.69}])["clamp"]
    assert found.text.startswith("69% of the")


def test_a_score_that_did_not_rise_is_reported_at_the_end_alone():
    worse = answers(9, scores=[score - 0.5 + 0.1 * (i % 2) for i, score in enumerate(SCORES)])
    rows, samples = evaluated(answers(0, scores=SCORES), worse)
    assert names(rows, samples) == []
    assert results(rows, samples)["not_risen"].is_wrong is None
    assert names(rows, samples, total_steps=9) == ["not_risen"]
    found = results(rows, samples, total_steps=9)["not_risen"]
    assert "changed by -0.45 [" in found.text  # half of the prompts lose 0.5, half 0.4
    noise = answers(9, scores=[score + (1.0 if i % 2 else -0.9) for i, score in enumerate(SCORES)])
    assert "not_risen" in names(
        *evaluated(answers(0, scores=SCORES), noise), total_steps=9
    )  # +0.05 with a standard error of 0.3


def test_a_raw_score_that_fell_while_the_paid_one_rose_is_reported():
    first = answers(0, scores=SCORES, raw=SCORES)
    up, down = ([score + by for score in SCORES] for by in (0.5, -0.25))
    assert names(*evaluated(first, answers(9, scores=up, raw=down))) == ["raw_fell"]
    text = results(*evaluated(first, answers(9, scores=up, raw=down)))["raw_fell"].text
    assert "rose by 0.5" in text
    assert "fell by 0.25 [0.25, 0.25] over 10" in text
    assert names(*evaluated(first, answers(9, scores=up, raw=up))) == []
    assert names(*evaluated(first, answers(9, scores=down, raw=down))) == []
    rows, samples = evaluated(first, answers(9, scores=up, raw=down))
    alone = [{"reward/mine" if name == "raw_score" else name: row[name] for name in row} for row in samples]
    assert names(rows, alone) == ["raw_fell"]  # a single source has no sum beside it
    assert "that of its sources, reward/mine, fell by 0.25" in results(rows, alone)["raw_fell"].text


# gold falls by 0.1 and 0.3 in turn: of ten draws the mean falls between 0.14 and 0.26 in 95 of 100 cases
FALLEN = [0.9, 0.7] * 5


def test_score_up_and_gold_down_is_reported_with_the_step_where_gold_was_best():
    rows = [evaluation(0, 0.0), evaluation(4, 1.0), evaluation(8, 0.8)]
    samples = answers(0, scores=[0.0] * 10) + answers(4, scores=[1.0] * 10, gold=[1.0] * 10)
    samples += answers(8, scores=[1.5] * 10, gold=FALLEN)
    found = results(rows, samples)["parted:gold/rating"]
    assert found.is_wrong
    for text in ("From step 4 to step 8", "rose by 0.5", "fell by 0.2 [0.14, 0.26] over 10 prompts", "KL of 8"):
        assert text in found.text, found.text


def test_a_policy_that_stays_what_it_is_is_rarely_called_hacking_however_often_it_is_evaluated():
    generator, called = random.Random(0), 0
    for _ in range(100):  # gold metrics of 64 answers that are drawn anew in each of ten evaluations; the score creeps
        rows, samples = [], []
        for step in range(10):
            gold = [float(generator.random() < 0.5) for _ in range(64)]
            rows.append(evaluation(step, sum(gold) / 64))
            texts = [str(n) for n in range(64)]
            samples += answers(step, scores=[step / 10] * 64, gold=gold, texts=texts, lengths=[5, 6] * 32)
        called += "parted:gold/rating" in names(rows, samples)
    assert called <= 12  # 5 in 100 are allowed, and 12 or more of them are one chance in 200; uncorrected, it is half


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
        ([{"step": 1, "actor/loss": None}], "not_finite"),
        ([{"step": 1, "actor/loss": math.nan}], "not_finite"),
        ([{"step": 1, "critic/skipped_steps": 2.0}], "not_finite"),
    ],
)
def test_numbers_that_run_away_are_reported(rows, name):
    assert names(rows) == [name]


def test_steps_that_find_the_loss_scale_of_fp16_are_no_problem():
    search = {"train/grad_norm": None, "train/skipped_steps": 1.0, "train/scale_search_steps": 1.0}
    assert names([{"step": 1, **search}, {"step": 2, "train/grad_norm": 1.0, "train/scale_search_steps": 0.0}]) == []
    assert names([{"step": 1, **search, "train/loss": None}]) == ["not_finite"]
    update = {"actor/grad_norm": None, "actor/skipped_steps": 3.0, "actor/scale_search_steps": 2.0}
    assert results([{"step": 1, **update}])["not_finite"].text.split()[0] == "1"


def test_the_first_number_that_was_none_and_all_skipped_steps_are_reported():
    rows = [{"step": 1, "actor/loss": None}, {"step": 2, "actor/skipped_steps": 2.0}, {"step": 3, "critic/loss": 1.0}]
    found = results([*rows, {"step": 4, "actor/skipped_steps": 1.0, "critic/loss": math.nan}, rows[2]])["not_finite"]
    assert found.text.startswith("actor/loss was not finite at step 1; 3 optimizer steps were skipped")
    assert (found.first, found.last, found.holds) == (1, 4, False)


def test_reward_for_length_is_reported():
    lengths = list(range(1, 11))
    assert length_correlation(answers(0, scores=[2.0 * n for n in lengths], lengths=lengths)) == pytest.approx(1.0)
    assert length_correlation(answers(0, scores=[1.0] * 10, lengths=lengths)) is None
    assert names(*evaluated(answers(0, scores=[2.0 * n for n in lengths], lengths=lengths))) == ["length"]
    equal = results(*evaluated(answers(0, scores=[1.0] * 10, lengths=lengths)))["length"]
    assert equal.is_wrong is None
    verdicts = [0.0] * 5 + [1.0] * 5  # what is worked out is longer, and right; the first one does not end
    verified = answers(0, scores=[-1.0, *verdicts[1:]], lengths=lengths)
    assert results(*evaluated(verified))["length"].is_wrong
    for row, verdict in zip(verified, verdicts, strict=True):
        row.pop("raw_score", None)
        row["reward/correct"] = verdict
    assert results(*evaluated(verified))["length"].is_wrong is None


def test_answers_that_fall_apart_are_reported():
    first = answers(0, scores=SCORES)
    same = answers(5, scores=SCORES, texts=["so good"] * 3 + TEXTS[3:])
    assert repeated_share(same) == 0.3
    assert names(*evaluated(first, same)) == ["repeats"]
    stuck = answers(5, scores=SCORES, texts=["", "", "good good good good good good", *TEXTS[3:]])
    assert degenerate_share(stuck) == 0.3
    assert names(*evaluated(first, stuck)) == ["degenerate"]
    assert names(*evaluated(first, answers(5, scores=SCORES, ended=False))) == ["endless"]
    recovered = results(*evaluated(first, same, answers(9, scores=SCORES)))["repeats"]
    assert (recovered.first, recovered.holds) == (5, False)


def test_answers_that_were_like_that_from_the_start_are_not_a_problem():
    stuck = ["so good"] * 10
    assert names(*evaluated(*(answers(step, scores=SCORES, texts=stuck) for step in (0, 5)))) == []


def test_short_answers_that_repeat_by_themselves_are_no_problem_until_many_more_do():
    def texts(alike):
        return ["5"] * alike + TEXTS[alike:]

    first = answers(0, scores=SCORES, texts=texts(5))
    assert names(*evaluated(first, answers(5, scores=SCORES, texts=texts(6)))) == []  # 0.5 + 0.2 of the other half
    assert names(*evaluated(first, answers(5, scores=SCORES, texts=texts(7)))) == ["repeats"]


@pytest.mark.parametrize("stage", ["grpo", "rloo", "dr_grpo", "dapo"])
def test_a_policy_without_a_critic_is_watched_like_one_of_ppo(stage):
    rows = [{"step": 1, "objective/kl_per_token": 1.2}]
    assert names(rows, stage=stage) == names(rows) == ["kl"]
    assert results(rows, stage=stage).keys() == results(rows).keys()


def test_a_reward_source_that_never_applied_is_reported_once_it_had_the_chance():
    def row(step, **none):
        return {"step": step, "reward/log/none": 1.0} | {f"reward/{name}/none": share for name, share in none.items()}

    early = [row(1, brief=1.0, right=1.0), row(2, brief=1.0, right=0.5)]
    assert names(early) == []
    found = results([*early, row(3, brief=1.0, right=1.0)])["silent"]
    assert found.is_wrong
    assert found.text.startswith("Up to step 3 no response had a score of reward/brief:")
    assert "right" not in found.text
    assert names([*early, row(3, brief=0.9, right=1.0)]) == []
    assert names(early[:1], total_steps=1) == ["silent"]
