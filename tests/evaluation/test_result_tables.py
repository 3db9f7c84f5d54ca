"""Results become tables, and what is missing or odd becomes a dash."""

import pytest

from rlhf.evaluation.result_tables import interval, tables

SHARE = {"mean": 0.625, "low": 0.25, "high": 0.875, "count": 8}
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
            "difference": None,
        }
    ],
    "judges": {
        "reward": {"win_rate": SHARE, "wins": 5, "ties": 0, "losses": 3, "judged": 8, "pairs": 8},
        "mine.judges:longest": {"win_rate": SHARE, "judged": 3, "pairs": 8, "first_wins": SHARE, "inconsistent": SHARE},
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
    assert judges.rows[1][0] == "longest"
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
    calibration = RESULTS["reward_model"]["calibration"] | {"temperature": None}
    found = by_title({"reward_model": {"calibration": calibration}})
    assert "no temperature would correct it" in found["Calibration of the reward model"].note


@pytest.mark.parametrize("odd", [None, 3, "text", [1], {"mean": "x"}, {"mean": float("nan")}, {"mean": None}])
def test_odd_values_are_dashes(odd):
    assert interval(odd) == "–"
    broken = {"model": "m", "measures": [odd, {"name": "kl", "model": odd}], "judges": {"x": odd}, "reward_model": odd}
    for found in tables(broken, meanings=True):
        assert all(isinstance(cell, str) for row in found.rows for cell in row)
