"""DeepSpeed's schedules, step by step, against the values that DeepSpeed's own classes gave."""

import json
from pathlib import Path

import pytest

from rlhf.deepspeed.deepspeed_schedules import SHAPES, deepspeed_schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/deepspeed_schedules.json").read_text())["cases"]
LR = 3e-4


def schedule_of(kind, options, *, lr=LR, warmup_steps=0, total_steps=999):
    return deepspeed_schedule(kind, lr=lr, warmup_steps=warmup_steps, total_steps=total_steps, options=options)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['kind']}-{len(case['options'])}-{len(case['lr'])}")
def test_every_step_has_deepspeeds_rate_and_betas(case):
    options = {"warmup_num_steps": 1000, **case["options"]} if "warmup" in case["kind"] else case["options"]
    schedule, steps = schedule_of(case["kind"], options), range(len(case["lr"]))
    assert [schedule.lr_at(step) for step in steps] == pytest.approx(case["lr"], rel=1e-12, abs=1e-18)
    found = [schedule.betas_at(step) for step in steps]
    if case["betas"]:
        expected = [value for pair in case["betas"] for value in pair]
        assert [value for pair in found for value in pair] == pytest.approx(expected)
    else:
        assert set(found) == {None}


def test_every_shape_is_covered():
    assert {case["kind"] for case in GOLDEN} == set(SHAPES)


def test_a_warm_up_loses_two_steps_as_deepspeeds_does():
    schedule = schedule_of("warmup_lr", {}, lr=1.0, total_steps=9, warmup_steps=4)
    found = [schedule.lr_at(step) for step in range(7)]
    assert found == pytest.approx([0, 0, 0.5, 0.7924812503605781, 1, 1, 1])  # log_4 of 1, 2, 3, 4


def test_what_the_options_leave_out_is_the_runs():
    explicit = {"warmup_num_steps": 5, "total_num_steps": 12, "warmup_max_lr": 1e-3}
    own = schedule_of("warmup_decay_lr", {"warmup_max_lr": 1e-3}, total_steps=12, warmup_steps=5)
    assert own == schedule_of("warmup_decay_lr", explicit, total_steps=99)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("warmup_lr", {"warmup_steps": 3}, "found warmup_steps, expected some of lr, warmup_num_steps"),
        ("lr_range_test", {"lr_range_test_step_size": 0}, "found lr_range_test_step_size 0, expected 1 or more"),
        ("one_cycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 0}, "cycle_first_step_size 0"),
        ("one_cycle", {"cycle_min_lr": 0}, "one_cycle: lacks cycle_max_lr"),
    ],
)
def test_options_that_make_no_sense_are_refused(kind, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        deepspeed_schedule(kind, lr=LR, warmup_steps=0, total_steps=10, options=options)
