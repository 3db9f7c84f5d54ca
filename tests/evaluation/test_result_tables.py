"""Results become tables, and what is missing or odd becomes a dash."""

import pytest

from rlhf.evaluation.result_tables import interval, means, tables

SHARE = {"mean": 0.625, "low": 0.25, "high": 0.875, "count": 8}
NONE = {"mean": None, "low": None, "high": None, "count": 0}
JUDGED = {"pairs": 8, "judged": 8, "wins": 5, "ties": 0, "losses": 3, "win_rate": SHARE}
JUDGED |= {"win_rate_when_longer": SHARE, "win_rate_when_shorter": SHARE, "longer_wins": NONE}
RESULTS = {
    "model": "ppo/actor",
    "baseline": "sft/model",
    "prompts": 8,
    "measures": [
        {
            "name": "kl",
            "unit": "nats",
            "meaning": "far away",
            "model": SHARE,
            "baseline": {"mean": 0.5},
            "difference": {"mean": None},
        }
    ],
    "judges": {
        "reward": JUDGED,
        "mine.judges:longest": JUDGED | {"judged": 3, "first_wins": SHARE, "inconsistent": SHARE},
    },
    "reward_model": {
        "accuracy": SHARE,
        "margin": SHARE,
        "subsets": {"hard": {"accuracy": SHARE, "margin": SHARE}},
        "calibration": {
            "error": 0.125,
            "temperature": 2.5,
            "error_at_temperature": 0.0625,
            "bins": [{"from": 0.5, "to": 0.55, "confidence": 0.52, "right": SHARE}],
        },
    },
}


def by_title(results, **more):
    return {found.title: found for found in tables(results, meanings=more.get("meanings", False))}


def test_every_part_is_a_table():
    answers, judges, places, quality, calibration = tables(RESULTS, meanings=False)
    assert answers.columns == ["measure", "model", "baseline", "difference", "unit"]
    assert answers.rows == [["kl", "0.625 [0.25, 0.875]", "0.5", "–", "nats"]]
    assert "model is ppo/actor; baseline is sft/model" in answers.note
    assert judges.rows[0][:6] == ["reward", "0.625 [0.25, 0.875]", "5", "0", "3", "8 of 8"]
    assert judges.rows[0][-1] == "–"
    assert (judges.rows[1][0], judges.rows[1][5]) == ("longest", "3 of 8")
    assert places.rows == [["longest", "0.625 [0.25, 0.875]", "0.625 [0.25, 0.875]"]]
    assert [row[0] for row in quality.rows] == ["all", "hard"]
    assert quality.rows[0][-1] == "8"
    assert calibration.rows == [["0.5 to 0.55", "0.52", "0.625 [0.25, 0.875]", "8"]]
    assert "temperature of 2.5" in calibration.note
    assert "too sure of itself" in calibration.note


def test_a_page_has_room_for_what_measures_mean():
    assert by_title(RESULTS, meanings=True)["Answers to held-out prompts"].rows[0][-1] == "far away"


def test_every_row_has_as_many_cells_as_there_are_headings():
    for meanings in (True, False):
        for found in tables(RESULTS, meanings=meanings):
            assert {len(row) for row in found.rows} == {len(found.columns)}, found.title


def test_what_is_not_there_has_no_table():
    assert tables({}, meanings=True) == []
    alone = RESULTS | {"baseline": None, "judges": {}, "reward_model": None}
    (only,) = tables(alone, meanings=False)
    assert only.columns == ["measure", "model", "unit"]


def test_a_reward_model_beyond_help_is_said_to_be():
    quality = RESULTS["reward_model"]
    calibration = {"error": 0.125, "temperature": None, "bins": quality["calibration"]["bins"]}
    found = by_title(RESULTS | {"reward_model": quality | {"calibration": calibration}})
    assert "no temperature would correct it" in found["Calibration of the reward model"].note


@pytest.mark.parametrize("missing", [None, {}, {"mean": None}, {"mean": float("nan"), "low": 0.0, "high": 1.0}])
def test_a_number_that_is_missing_is_a_dash(missing):
    assert interval(missing) == "–"


def test_means_have_names_and_those_that_are_missing_have_none():
    judges = RESULTS["judges"] | {"nobody": JUDGED | {"win_rate": NONE}}
    expected = {"model/kl": 0.625, "baseline/kl": 0.5, "win_rate/reward": 0.625, "win_rate/mine.judges:longest": 0.625}
    expected |= {"reward_model/accuracy": 0.625, "reward_model/calibration_error": 0.125}
    assert means(RESULTS | {"judges": judges}) == expected
    assert set(means(RESULTS | {"reward_model": None})) == {name for name in expected if "reward_model" not in name}
