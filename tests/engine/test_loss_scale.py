"""The fp16 loss scale: DeepSpeed's own values, and what a resumed run goes on with."""

import json
import logging
from pathlib import Path

import pytest
import torch

from rlhf.config.engine_config import EngineConfig
from rlhf.engine.engine import build_engine, step_together
from rlhf.engine.loss_scale import LossScale
from rlhf.runtime.dist import World
from rlhf.tracking.metric_registry import METRICS
from tests.engine import scenarios, tiny

CASES = json.loads((Path(__file__).parents[1] / "golden/deepspeed_loss_scale.json").read_text())["cases"]


def adaptive(power, **settings):
    """An adaptive scale that starts at two to this power."""
    return LossScale(EngineConfig(zero_stage=0, precision="fp16", initial_scale_power=power, **settings))


def scaler(case):
    return adaptive(
        case["initial"].bit_length() - 1,
        loss_scale_window=case["window"],
        hysteresis=case["hysteresis"],
        consecutive_hysteresis=case["consecutive"],
        min_loss_scale=case["minimum"],
    )


@pytest.mark.parametrize("case", CASES)
def test_an_adaptive_scale_takes_the_values_of_deepspeed(case):
    scale, values = scaler(case), []
    for mark in case["overflows"]:
        scale.update(overflow=mark == "x")
        values.append(scale.value)
    assert values == case["scales"]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_scale_goes_on_as_if_nothing_had_happened(case):
    first, second = scaler(case), scaler(case)
    for mark in case["overflows"][:17]:
        first.update(overflow=mark == "x")
    second.load_state_dict(first.state_dict())
    for mark, expected in zip(case["overflows"][17:], case["scales"][17:], strict=True):
        second.update(overflow=mark == "x")
        assert second.value == expected


def test_only_an_adaptive_scale_above_its_minimum_can_fall():
    assert adaptive(2, min_loss_scale=2.0).can_fall
    assert not adaptive(1, min_loss_scale=2.0).can_fall
    assert not adaptive(2, loss_scale=4.0).can_fall


def test_settings_choose_the_scale():
    assert LossScale(EngineConfig(zero_stage=0, precision="bf16")).value == 1
    assert LossScale(EngineConfig(zero_stage=0, precision="fp16", initial_scale_power=12)).value == 4096
    fixed = LossScale(EngineConfig(zero_stage=0, precision="fp16", loss_scale=128))
    fixed.update(overflow=True)
    assert fixed.value == 128
    assert not fixed.can_fall


def fp16(**scaling):
    return tiny.engine(World.alone(), 0, precision="fp16", max_skipped_steps=2, **scaling)


def test_fp16_learns_what_fp32_learns_whatever_the_scale():
    exact = [tiny.train_step(engine, step)[0] for engine in [tiny.engine(World.alone(), 0)] for step in range(5)]
    for scale in (1.0, 1024.0):
        engine = fp16(loss_scale=scale)
        steps = [tiny.train_step(engine, step) for step in range(5)]
        assert [loss for loss, _ in steps] == pytest.approx(exact, rel=3e-3)
        assert not any(result.skipped for _, result in steps)


def test_the_reported_norm_is_that_of_the_loss_itself():
    norms = [tiny.train_step(fp16(loss_scale=scale), 0)[1].grad_norm for scale in (1.0, 1024.0)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert norms[0] == pytest.approx(tiny.train_step(tiny.engine(World.alone(), 0), 0)[1].grad_norm, rel=1e-2)


def test_an_overflow_skips_the_step_and_lowers_the_scale_and_only_the_lowest_scale_counts_as_broken():
    engine = fp16(initial_scale_power=24, hysteresis=1)  # 2**24 times a gradient of fp16 overflows
    results = [tiny.train_step(engine, step)[1] for step in range(12)]
    skipped = [result.skipped for result in results]
    assert skipped[:3] == [True] * 3  # more in a row than max_skipped_steps
    assert not skipped[-1]
    assert engine.loss_scale.value == 2.0 ** (24 - sum(skipped))
    engine = fp16(initial_scale_power=1, min_loss_scale=2.0)
    tiny.train_step(engine, 0, spoil=True)
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        tiny.train_step(engine, 1, spoil=True)


def test_the_search_for_a_scale_uses_no_warm_up_and_is_said_to_be_normal(caplog):
    caplog.set_level(logging.INFO)
    engine = fp16(initial_scale_power=32, optimizer=tiny.optimizer_config(warmup_steps=4))
    caplog.clear()
    results = [tiny.train_step(engine, step)[1] for step in range(24)]
    skipped = sum(result.skipped for result in results)
    assert skipped > 10
    assert [result.is_search for result in results] == [result.skipped for result in results]
    assert [result.loss_scale for result in results[:3]] == [2.0**32, 2.0**32, 2.0**31]  # hysteresis is 2
    rates = [result.lr for result in results if not result.skipped]
    assert rates[:4] == pytest.approx([3e-3 * n / 4 for n in (1, 2, 3, 4)])
    assert engine.steps_taken == 24 - skipped
    records = [record for record in caplog.records if record.name.startswith("rlhf")]
    assert len(records) == skipped
    assert {record.levelno for record in records} == {logging.INFO}
    assert (
        records[0]
        .getMessage()
        .startswith("fp16: the loss scale 4294967296 overflowed; trying it again (step skipped; n")
    )
    assert (
        records[1]
        .getMessage()
        .startswith("fp16: the loss scale 4294967296 overflowed; trying 2147483648 (step skipped")
    )
    assert not any("learning rate" in record.getMessage() for record in records)


def test_an_overflow_is_trouble_only_at_a_scale_that_has_fitted_for_a_while(caplog):
    caplog.set_level(logging.INFO)
    scale = adaptive(20, loss_scale_window=20, hysteresis=1)
    good = "." * 11
    for mark in f"xx.x.x{good}xx{good}xxx" + "." * 21 + f"x.x{good}x":
        scale.update(overflow=mark == "x")
    searched, trouble, after_growth = ["INFO"] * 4, ["WARNING"] * 5, ["INFO"] * 2
    assert [record.levelname for record in caplog.records] == [*searched, *trouble, *after_growth, "WARNING"]
    assert ["lower the learning rate" in text for text in caplog.messages] == [False] * 4 + [True] * 5 + [False] * 2 + [
        True
    ]


def test_a_scale_that_cannot_fall_is_named_when_the_run_stops():
    for scaling, words in (
        ({"initial_scale_power": 1, "min_loss_scale": 2.0}, "at a loss scale of 2, the lowest"),
        ({"loss_scale": 64}, "at a loss scale of 64, which engine.loss_scale fixes"),
    ):
        engine = fp16(**scaling)
        tiny.train_step(engine, 0, spoil=True)
        with pytest.raises(RuntimeError, match=words):
            tiny.train_step(engine, 1, spoil=True)


def test_what_is_logged_of_a_step_is_registered_and_has_the_scale_in_fp16_alone():
    result = tiny.train_step(fp16(initial_scale_power=24, hysteresis=1), 0)[1]
    for name in ("train", "actor", "critic"):
        found = result.metrics(name)
        assert found.keys() <= METRICS.keys()
        assert (found[f"{name}/loss_scale"], found[f"{name}/scale_search_steps"]) == (2.0**24, 1.0)
        assert found[f"{name}/skipped_steps"] == 1.0
    assert "train/loss_scale" not in tiny.train_step(tiny.engine(World.alone(), 0), 0)[1].metrics("train")


def test_a_resumed_engine_is_where_its_schedule_was():
    """The position is a counter of its own: skipped steps are not in it, spared ones are."""
    first, second = (fp16(initial_scale_power=24, hysteresis=1) for _ in range(2))
    for step in range(12):
        tiny.train_step(first, step)
    first.advance(2)
    second.load_counters(first.counters())
    assert second.steps_taken == first.steps_taken < 14
    assert tiny.train_step(second, 12)[1].lr == tiny.train_step(first, 12)[1].lr


def test_engines_that_share_a_scale_step_or_skip_together():
    scale = adaptive(3, hysteresis=1)
    first, second = (shared(scale) for _ in range(2))
    before = scenarios.weights(second, masters=True)
    ids, counts = tiny.batch(0)
    for engine, factor in ((first, float("nan")), (second, 1.0)):
        engine.backward(factor * tiny.token_loss(engine(ids), ids, counts, counts.sum()), last=True)
    results = step_together(first, second)
    assert [result.skipped for result in results] == [True, True]
    assert scale.value == 4.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in scenarios.weights(second, masters=True).items())


def shared(scale):
    return build_engine(
        tiny.spec(),
        config=EngineConfig(zero_stage=0, precision="fp16"),
        world=World.alone(),
        optimizer=tiny.optimizer_config(),
        total_steps=10,
        loss_scale=scale,
    )
