import math

import pytest
import torch

from rlhf.algorithms.schedules import learning_rate_multiplier

KINDS = ("constant", "linear", "cosine")


def multipliers(kind, steps, **settings):
    return [learning_rate_multiplier(step, kind=kind, **settings) for step in range(steps)]


def test_constant_by_hand():
    assert multipliers("constant", 3, total_steps=3) == [1.0, 1.0, 1.0]


def test_linear_by_hand():
    # 1 - step / 4: as in the TL;DR replication, the first step is whole and the last one not lost.
    assert multipliers("linear", 4, total_steps=4) == [1.0, 0.75, 0.5, 0.25]


def test_linear_to_a_minimum_by_hand():
    # At step s: 0.2 + 0.8 (1 - s / 4).
    assert multipliers("linear", 4, total_steps=4, min_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_by_hand():
    # (1 + cos(pi step / 4)) / 2 with cos = 1, sqrt(1/2), 0, -sqrt(1/2)
    half = math.sqrt(0.5)
    assert multipliers("cosine", 4, total_steps=4) == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_cosine_to_a_minimum_by_hand():
    # 0.1 + 0.9 / 2 half-way
    assert multipliers("cosine", 3, total_steps=4, min_ratio=0.1)[2] == pytest.approx(0.55)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_by_hand(kind):
    found = multipliers(kind, 5, total_steps=8, warmup_steps=4)
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 10])
def test_every_step_learns(kind, warmup_steps):
    found = multipliers(kind, 10, total_steps=10, warmup_steps=warmup_steps)
    assert min(found) > 0
    assert max(found) == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_decay_never_rises_and_stays_where_it_arrived(kind):
    found = multipliers(kind, 40, total_steps=20, warmup_steps=3, min_ratio=0.1)
    assert found[2:] == sorted(found[2:], reverse=True)
    assert found[19] > 0.1
    assert found[20:] == pytest.approx([0.1] * 20)


def test_linear_without_warm_up_is_torch_linear_lr():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.3, total_iters=7)
    for step in range(10):
        found = learning_rate_multiplier(step, kind="linear", total_steps=7, min_ratio=0.3)
        assert found == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match='found schedule "step"'):
        learning_rate_multiplier(0, kind="step", total_steps=3)
    with pytest.raises(ValueError, match="found step -1"):
        learning_rate_multiplier(-1, kind="linear", total_steps=3)
    with pytest.raises(ValueError, match="found warmup_steps 4, expected 0 to total_steps = 3"):
        learning_rate_multiplier(0, kind="linear", total_steps=3, warmup_steps=4)
    with pytest.raises(ValueError, match="found min_ratio 1.5"):
        learning_rate_multiplier(0, kind="linear", total_steps=3, min_ratio=1.5)
