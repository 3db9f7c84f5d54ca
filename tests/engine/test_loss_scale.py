"""The fp16 loss scale: DeepSpeed's own values, and what a resumed run goes on with."""

import json
from pathlib import Path

import pytest
import torch

from rlhf.config import EngineConfig
from rlhf.dist import World
from rlhf.engine.engine import build_engine, step_together
from rlhf.engine.loss_scale import LossScale
from tests.engine import tiny

CASES = json.loads((Path(__file__).parents[1] / "golden/deepspeed_loss_scale.json").read_text())["cases"]


def scaler(case):
    names = ("window", "hysteresis", "consecutive", "minimum")
    return LossScale(case["initial"], adapts=True, **{name: case[name] for name in names})


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
    assert LossScale(4.0, adapts=True, minimum=2.0).can_fall
    assert not LossScale(2.0, adapts=True, minimum=2.0).can_fall
    assert not LossScale(4.0).can_fall


def test_settings_choose_the_scale():
    assert LossScale.of(EngineConfig(zero_stage=0, precision="bf16")).value == 1
    assert LossScale.of(EngineConfig(zero_stage=0, precision="fp16", initial_scale_power=12)).value == 4096
    fixed = LossScale.of(EngineConfig(zero_stage=0, precision="fp16", loss_scale=128))
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


def test_engines_that_share_a_scale_step_or_skip_together():
    scale = LossScale(8.0, adapts=True, hysteresis=1)
    first, second = (shared(scale) for _ in range(2))
    before = dict(second.full_tensors(masters=True))
    ids, counts = tiny.batch(0)
    for engine, factor in ((first, float("nan")), (second, 1.0)):
        engine.backward(factor * tiny.token_loss(engine(ids), ids, counts, counts.sum()), last=True)
    results = step_together(first, second)
    assert [result.skipped for result in results] == [True, True]
    assert scale.value == 4.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.full_tensors(masters=True))


def shared(scale):
    return build_engine(
        tiny.blueprint(),
        config=EngineConfig(zero_stage=0, precision="fp16"),
        world=World.alone(),
        optimizer=tiny.optimizer_config(),
        total_steps=10,
        loss_scale=scale,
    )
