"""What a step decides on all ranks alike: to skip, to stop, and to go on after an interruption."""

import math

import pytest
import torch

from rlhf.config.engine_config import EngineConfig
from rlhf.config.run_config import Embedded
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig
from rlhf.deepspeed.arithmetic import OneCycle
from rlhf.engine.engine import build_engine
from rlhf.models.embedded import prepare
from rlhf.models.scalar_head import scalar_head_model
from rlhf.runtime import dist
from rlhf.runtime.dist import World
from tests.config.test_configuration import composed
from tests.engine import plain, scenarios, tiny

BOTH = [(ranks, stage) for ranks in (1, 2) for stage in scenarios.STAGES]


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(on_ranks, ranks, stage):
    for rank in on_ranks(ranks):
        skipped, good, before, after, _ = rank["spoiled"][stage]
        assert skipped.skipped
        assert not math.isfinite(skipped.grad_norm)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert not good.skipped
        assert math.isfinite(good.grad_norm)


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_too_many_skips_in_a_row_stop_every_rank_with_advice(on_ranks, ranks, stage):
    for rank in on_ranks(ranks):
        *_, message = rank["spoiled"][stage]
        assert "2 steps in a row" in message
        assert "engine.max_skipped_steps" in message


def test_the_schedule_waits_for_skipped_steps_and_the_result_tells_the_rate(on_ranks):
    for ranks, stage in BOTH:
        skipped, good, *_ = on_ranks(ranks)[0]["spoiled"][stage]
        assert skipped.lr == good.lr == pytest.approx(1.5e-3)  # 3e-3 / 2: first of two warm-up steps


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_a_frozen_engine_computes_and_does_not_learn(on_ranks, ranks, stage):
    with torch.no_grad():
        expected = tiny.reference()(tiny.batch(50)[0])
    for rank in on_ranks(ranks):
        logits, direct, _, learns, training = rank["frozen"][stage]
        for found in [*logits, direct]:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert not found.requires_grad
        assert not learns
        assert not training


def test_a_frozen_engine_at_stage_three_keeps_nothing_gathered(on_ranks):
    for rank in on_ranks(2):
        *_, whole, _, _ = rank["frozen"][3]
        assert not any(whole)


def test_a_frozen_engine_takes_no_steps():
    config = tiny.EngineConfig(zero_stage=0, precision="fp32")
    engine = tiny.build_engine(tiny.spec(), config=config, world=dist.start("cpu"))
    with pytest.raises(AssertionError, match="frozen"):
        engine.step()


def test_a_schedule_that_cycles_the_betas_reaches_the_update():
    """Value for value what `torch.optim.AdamW` does when its group's rate and betas are set before each step."""
    cycle = {"cycle_min_lr": 1e-4, "cycle_max_lr": 3e-3, "cycle_first_step_size": 3, "cycle_second_step_size": 4}
    settings = tiny.optimizer_config(schedule="one_cycle", schedule_options=cycle, warmup_steps=0, max_grad_norm=0)
    engine, model = tiny.engine(World.alone(), 0, optimizer=settings), tiny.reference()
    optimizer = plain.adamw(model)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = OneCycle(**cycle).lr_at(step), OneCycle(**cycle).betas_at(step)
        assert group["betas"][1] == 0.99
        tiny.train_step(engine, step)
        ids, counts = tiny.batch(step)
        optimizer.zero_grad()
        tiny.token_loss(model(ids), ids, counts, counts.sum()).backward()
        optimizer.step()
    for name, tensor in engine.full_tensors():
        assert torch.allclose(tensor, model.get_parameter(name), rtol=1e-4, atol=2e-6), name


def test_the_runs_own_schedule_is_a_share_of_the_rate():
    settings = tiny.optimizer_config(lr=0.5, schedule="linear", warmup_steps=0)
    updater = tiny.engine(World.alone(), 0, optimizer=settings)._updater
    updater.steps_taken = 1
    assert (updater.lr, updater.betas) == (0.5 * 0.9, None)  # 10 steps; the betas are those of the settings


def test_a_new_head_learns_at_its_rate_and_the_adapters_at_theirs(tmp_path):
    prepare(Embedded.tiny, tmp_path / "model")
    optimizer = OptimizerConfig(lr=1e-3, lora_lr=4e-3, max_grad_norm=0, schedule="constant", warmup_steps=2)
    spec = scalar_head_model(tmp_path / "model", lora=LoraConfig(rank=4), seed=1)
    config = EngineConfig(zero_stage=0, precision="fp32")
    engine = build_engine(spec, config=config, world=World.alone(), optimizer=optimizer, total_steps=4)
    before = scenarios.weights(engine)
    ids = torch.arange(20, 28)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    engine.backward(engine(ids, mask, position_ids=torch.arange(8)[None]).sum(), last=True)
    found = engine.step().metrics("critic")
    # The first of two steps of warm-up has half of each rate, and Adam's first step has the length of the rate.
    assert (found["critic/lr"], found["critic/lora_lr"]) == pytest.approx((5e-4, 2e-3))
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in scenarios.weights(engine).items()}
    assert moved["score.weight"] == pytest.approx(5e-4, rel=1e-3)
    assert {round(value, 6) for name, value in moved.items() if ".lora_B." in name} == {2e-3}
    assert max(value for name, value in moved.items() if "base_layer" in name) == 0


def test_a_rate_of_adapters_needs_adapters():
    with pytest.raises(ValueError, match=r"ppo.critic_optimizer.lora_lr=0.001: expected null without adapters"):
        composed("ppo.critic_optimizer.lora_lr=1e-3", "ppo.lora.rank=0")
    found = composed("ppo.critic_optimizer.lora_lr=1e-3", "ppo.critic_optimizer.lr=1e-4", "ppo.lora.rank=8").ppo
    assert found.critic_optimizer.lora_factor == pytest.approx(10)
