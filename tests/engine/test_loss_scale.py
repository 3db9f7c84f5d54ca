"""The fp16 loss scale: DeepSpeed's own values, and what a resumed run goes on with."""

import json
from pathlib import Path

import pytest

from rlhf.config import EngineConfig
from rlhf.engine.loss_scale import LossScale

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
