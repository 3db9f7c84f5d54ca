"""The bundled reviews: disjoint splits, honest preferences, and the functions that made them."""

import json

import pytest

from benchmarks.prepare_reviews import Review, clean, cut, openings, parse, preferences, share
from data.gold import REVIEWS

FILES = sorted(path.name for path in REVIEWS.glob("*.jsonl"))


def rows(name):
    return [json.loads(line) for line in (REVIEWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def sentences(name):
    return {row["prompt"] + row["completion"] for row in rows(name)}


def preferred(name):
    return {row["prompt"] + row[side] for row in rows(name) for side in ("chosen", "rejected")}


def rated(name):
    return {f"Movie review: {row['text']}" for row in rows(name)}


def test_everything_that_is_promised_is_there_and_small():
    assert [name.removesuffix(".jsonl") for name in FILES] == [
        "preferences_eval",
        "preferences_train",
        "prompts_eval",
        "prompts_train",
        "ratings_gold",
        "ratings_test",
        "sft_eval",
        "sft_train",
    ]
    assert sum(path.stat().st_size for path in REVIEWS.iterdir()) < 3_000_000
    assert "MIT" in (REVIEWS / "LICENSE.vaderSentiment.txt").read_text()
    assert "Hutto" in (REVIEWS / "NOTICE").read_text()
    assert "Pang" in (REVIEWS / "NOTICE").read_text()


def test_no_sentence_is_on_both_sides_of_a_split():
    held_out = sentences("sft_eval") | preferred("preferences_eval") | rated("ratings_test")
    assert not held_out & sentences("sft_train")
    assert not held_out & preferred("preferences_train")
    assert not held_out & rated("ratings_gold")


def test_the_judge_is_fitted_to_none_of_the_sentences_that_the_reward_model_compares():
    assert not rated("ratings_gold") & preferred("preferences_train")


def test_evaluation_prompts_are_new_to_ppo_and_all_are_distinct():
    train, held_out = ([row["prompt"] for row in rows(name)] for name in ("prompts_train", "prompts_eval"))
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out) >= 256


@pytest.mark.parametrize("name", ["preferences_train", "preferences_eval"])
def test_preferences_share_their_opening_and_differ_by_a_point(name):
    for row in rows(name):
        words = row["prompt"].removeprefix("Movie review: ").split(" ")
        assert 1 <= len(words) <= 3
        assert row["chosen"] != row["rejected"]
        assert row["margin"] >= 1.0
        for side in ("chosen", "rejected"):
            assert row[side].startswith(" ")
            assert row[side].strip()
            assert 4 <= len(words + row[side].split()) <= 20


def test_margins_are_the_difference_of_the_human_ratings():
    rating = {f"Movie review: {row['text']}": row["rating"] for row in rows("ratings_test")}
    for row in rows("preferences_eval"):
        chosen, rejected = rating[row["prompt"] + row["chosen"]], rating[row["prompt"] + row["rejected"]]
        assert row["margin"] == pytest.approx(chosen - rejected, abs=1e-9)


def test_every_evaluation_preference_uses_its_sentences_once():
    assert len(preferred("preferences_eval")) == 2 * len(rows("preferences_eval"))


def test_demonstrations_start_from_two_words():
    for row in rows("sft_eval"):
        assert row["prompt"].startswith("Movie review: ")
        assert len(row["prompt"].split(" ")) == 4
        assert row["completion"].startswith(" ")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Lovely &amp; Amazing,  both.", "Lovely & Amazing, both."),
        ("the new ''Conan'' film", 'the new "Conan" film'),
        ("all comics    even those", "all comics – even those"),
        ("...a spoof , with laughs..", "a spoof, with laughs."),
        ("well...", "well..."),
    ],
)
def test_clean_repairs_what_the_collection_broke(raw, expected):
    assert clean(raw) == expected


def test_parse_keeps_a_repeated_sentence_once():
    assert parse("1\t2.26666666667\tGood film.\r\n2\t-1.0\tgood film\r\n3\t0.5\tOther") == [
        Review("Good film.", 2.267),
        Review("Other", 0.5),
    ]


def test_cut_loses_no_character():
    assert cut("A small gem.", 2) == ("Movie review: A small", " gem.")


def test_preferences_prefer_long_openings_and_respect_the_gap_and_the_uses():
    reviews = [
        Review("It is a gem now", 3.0),
        Review("It is a mess now", -2.0),
        Review("It was fine by me", 2.5),
        Review("It was nice to me", 2.25),
    ]
    found = preferences(reviews, max_uses=1)
    assert found == [{"prompt": "Movie review: It is a", "chosen": " gem now", "rejected": " mess now", "margin": 5.0}]
    assert len(preferences(reviews, max_uses=9)) == 3  # the mess also loses to both "It was" reviews, on one word


def test_openings_are_distinct_and_a_prompt_is_either_held_out_or_not():
    reviews = [Review(f"Word{number % 50} next thing {number}", 0.0) for number in range(100)]
    train, held_out = openings(reviews, held_out=False), openings(reviews, held_out=True)
    assert len(train) + len(held_out) == 50
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_share_is_uniform_and_depends_on_the_purpose():
    values = [share("test", str(number)) for number in range(2000)]
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)
    assert share("test", "a") != share("gold", "a")
