"""The moving average of weights, against the same sum by hand on one rank and on two."""

import pytest
import torch

from rlhf.runtime import dist
from rlhf.runtime.dist import World
from tests.engine import scenarios, tiny
from tests.ranks import run_on_ranks

DECAY = 0.8
KINDS = {
    "zero0": {"stage": 0},
    "zero3": {"stage": 3},
    "zero3 bf16": {"stage": 3, "precision": "bf16"},
    "zero2 cpu": {"stage": 2, "offload_optimizer": "cpu"},
    "zero3 weights on the host": {"stage": 3, "offload_param": "cpu", "precision": "bf16"},
}


def averaged(world, settings):
    """Masters after each of three steps, the average and what the model computes with it, and that all comes back."""
    engine = tiny.engine(world, **settings, optimizer=tiny.optimizer_config(ema_decay=DECAY))
    ids = tiny.batch(50)[0]
    masters = [scenarios.weights(engine, masters=True)]
    for step in range(3):
        tiny.train_step(engine, step)
        masters.append(scenarios.weights(engine, masters=True))
    with engine.evaluating() as model:
        before = model(ids).clone()
    with engine.averaged():
        average = scenarios.weights(engine, masters=True)
        with engine.evaluating() as model:
            during = model(ids).clone()
    with engine.evaluating() as model:
        after = model(ids).clone()
    again = scenarios.weights(engine, masters=True)
    moved = not torch.equal(before, during)
    same = torch.equal(before, after) and all(torch.equal(again[name], masters[-1][name]) for name in again)
    return masters, average, moved, same


def on_this_rank(kinds):
    world = dist.start("cpu")
    return {name: averaged(world, settings) for name, settings in kinds.items()}


def by_hand(masters):
    expected = masters[0]
    for later in masters[1:]:
        expected = {name: DECAY * value + (1 - DECAY) * later[name] for name, value in expected.items()}
    return expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_average_is_that_of_the_masters_and_goes_in_and_out_of_the_model(ranks):
    found = run_on_ranks(on_this_rank, ranks, KINDS) if ranks > 1 else [on_this_rank(KINDS)]
    for rank in found:
        for name, (masters, average, moved, same) in rank.items():
            for key, expected in by_hand(masters).items():
                torch.testing.assert_close(average[key], expected, rtol=1e-6, atol=1e-7, msg=f"{name} {key}")
            assert moved, name
            assert same, name


def test_it_is_part_of_a_checkpoint():
    engine = tiny.engine(World.alone(), 0, optimizer=tiny.optimizer_config(ema_decay=DECAY))
    tiny.train_step(engine, 0)
    stored = {tensor.key: tensor for tensor in engine.checkpoint_tensors()}
    averages = {key: tensor.read().clone() for key, tensor in stored.items() if key.endswith("/ema")}
    assert len(averages) == len(stored) / 4  # beside master and two moments
    again = tiny.engine(World.alone(), 0, optimizer=tiny.optimizer_config(ema_decay=DECAY))
    for tensor in again.checkpoint_tensors():
        tensor.write(stored[tensor.key].read())
    for tensor in again.checkpoint_tensors():
        if tensor.key in averages:
            assert torch.equal(tensor.read(), averages[tensor.key])


def test_without_a_decay_none_is_kept():
    engine = tiny.engine(World.alone(), 0)
    assert not engine.has_average
    assert not [tensor for tensor in engine.checkpoint_tensors() if tensor.key.endswith("/ema")]
