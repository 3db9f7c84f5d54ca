"""A problem is reported once, as soon as it shows, and not again by a resumed stage."""

import logging

import pytest

from rlhf.tracking.alerts import StageChecks
from rlhf.tracking.jsonl_log import JsonlLog
from rlhf.tracking.report.run_folder import FolderReader, read_stage
from tests.tracking.test_tracker import tracker

AT_FIRST = {"objective/entropy": 2.0, "objective/kl_per_token": 0.0}


@pytest.fixture
def warned(caplog):
    """The warnings so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_collapse_between_evaluations_is_reported_once(tmp_path, warned):
    with tracker(tmp_path / "ppo") as track:
        track.log(1, AT_FIRST)
        track.log(2, {**AT_FIRST, "objective/entropy": 0.3})
        assert warned() == []
        for step in (3, 4):
            track.log(step, {**AT_FIRST, "objective/entropy": 0.1})
    (text,) = warned()
    assert text.startswith("ppo: Entropy fell from 2 to 0.1 nats per token by step 3")


def test_a_resumed_stage_knows_how_it_began(tmp_path, warned):
    with tracker(tmp_path / "ppo") as track:
        track.log(1, AT_FIRST)
    with tracker(tmp_path / "ppo") as track:
        track.log(2, {**AT_FIRST, "objective/entropy": 0.1})
    assert "Entropy fell" in warned()[0]


def test_what_only_evaluations_show_is_reported_after_one(tmp_path, warned):
    rows = [{"prompt": str(i), "response": "all the same", "score": i / 9, "kl": 0.0, "length": 3} for i in range(9)]
    other = [row | {"response": row["prompt"] * 3} for row in rows]
    with tracker(tmp_path / "ppo") as track:
        for step, answers in ((0, other), (5, rows)):
            track.samples(step, answers)
            track.log(step, {"eval/score": 0.0})
    assert [text for text in warned() if "word for word" in text]
    assert len(JsonlLog(tmp_path / "ppo/samples.jsonl").rows()) == 18


def test_a_row_with_an_alert_is_recorded_so_that_the_report_shows_it_too(tmp_path, warned):
    with tracker(tmp_path / "ppo", log_every=100) as track:
        for step, kl in ((1, 0.1), (2, 1.5), (3, 1.5), (4, 0.1)):
            track.log(step, {"objective/kl_per_token": kl})
    assert len(warned()) == 1
    rows = JsonlLog(tmp_path / "ppo/metrics.jsonl").rows()
    assert [row["step"] for row in rows] == [2]
    (verdict,) = [found for found in StageChecks("ppo", rows, samples=[]).results.values() if found.is_wrong]
    assert warned() == [f"ppo: {verdict.text}"]


def test_a_resumed_stage_does_not_repeat_its_alerts(tmp_path, warned):
    for steps in ((1, 2), (3, 4)):
        with tracker(tmp_path / "ppo") as track:
            for step in steps:
                track.log(step, {"objective/kl_per_token": 1.5})
    assert len(warned()) == 1


def test_later_rows_are_not_compared_with_a_row_that_was_not_recorded(tmp_path, warned):
    entropies = {1: 100.0, 2: 3.0, 3: 2.0, 4: 1.0, 6: 0.25, 7: 0.1}  # of which 2, 4 and 6 are recorded
    with tracker(tmp_path / "ppo", log_every=2) as track:
        for step, entropy in entropies.items():
            track.log(step, {"objective/entropy": entropy})
    assert [text[:38] for text in warned()] == ["ppo: Entropy fell from 3 to 0.25 nats p"[:38]]
    rows = JsonlLog(tmp_path / "ppo/metrics.jsonl").rows()
    (verdict,) = [found for found in StageChecks("ppo", rows, samples=[]).results.values() if found.is_wrong]
    assert (verdict.first, [row["step"] for row in rows]) == (6, [2, 4, 6])


def test_checks_of_the_end_are_in_the_report_of_a_stage_that_has_not_finished_too(tmp_path, warned):
    with tracker(tmp_path / "ppo", total_steps=5) as track:
        for step, score in ((0, 1.0), (3, 0.5), (5, 0.5)):
            track.samples(step, [{"prompt": str(i), "response": f"r{i}", "score": score + i} for i in range(9)])
            track.log(step, {"eval/score": score})
    (text,) = warned()
    assert "has changed by -0.5" in text
    assert "end at step 5" in text
    stage = read_stage(FolderReader(tmp_path), "ppo")
    assert stage.summary == {"steps": 5}
    found = StageChecks("ppo", stage.rows, samples=stage.samples, total_steps=stage.total_steps).results
    assert [text] == [f"ppo: {result.text}" for result in found.values() if result.is_wrong]


def test_a_value_that_is_not_finite_is_reported_on_the_main_rank_alone(tmp_path, warned):
    for rank in (0, 1):
        with tracker(tmp_path / "ppo", rank=rank) as track:
            track.log(1, {"actor/loss": float("nan")})
    assert [text[:45] for text in warned()] == ["ppo: actor/loss was not finite at step 1. Low"]
