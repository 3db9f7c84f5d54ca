"""A sign is said once, as soon as it shows, and by a resumed stage again."""

import logging

import pytest

from rlhf.tracking.journal import Journal
from tests.tracking.test_tracker import tracker

AT_FIRST = {"objective/entropy": 2.0, "objective/kl_per_token": 0.0}


@pytest.fixture
def said(caplog):
    """The warnings so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_collapse_between_evaluations_is_said_once(tmp_path, said):
    with tracker(tmp_path / "ppo") as track:
        track.log(1, AT_FIRST)
        track.log(2, {**AT_FIRST, "objective/entropy": 0.3})
        assert said() == []
        for step in (3, 4):
            track.log(step, {**AT_FIRST, "objective/entropy": 0.1})
    (text,) = said()
    assert text.startswith("ppo: Entropy fell from 2 to 0.1 nats per token by step 3")


def test_a_resumed_stage_knows_how_it_began(tmp_path, said):
    with tracker(tmp_path / "ppo") as track:
        track.log(1, AT_FIRST)
    with tracker(tmp_path / "ppo") as track:
        track.log(2, {**AT_FIRST, "objective/entropy": 0.1})
    assert "Entropy fell" in said()[0]


def test_what_only_evaluations_show_is_said_after_one(tmp_path, said):
    rows = [{"prompt": str(i), "response": "all the same", "score": i / 9, "kl": 0.0, "length": 3} for i in range(9)]
    other = [row | {"response": row["prompt"] * 3} for row in rows]
    with tracker(tmp_path / "ppo") as track:
        for step, answers in ((0, other), (5, rows)):
            track.samples(step, answers)
            track.log(step, {"eval/score": 0.0})
    assert [text for text in said() if "word for word" in text]
    assert len(Journal(tmp_path / "ppo/samples.jsonl").rows()) == 18


def test_a_number_that_is_none_is_said_in_every_stage_and_on_the_main_rank_alone(tmp_path, said):
    for rank in (0, 1):
        with tracker(tmp_path / "ppo", rank=rank) as track:
            track.log(1, {"policy/loss": float("nan")})
    assert [text[:46] for text in said()] == ["ppo: policy/loss was not finite at step 1. Low"]
