"""The PPO update on real engines: the first minibatch changes nothing by itself, and sizes do not change gradients."""

import re
from dataclasses import replace

import pytest
import torch

from rlhf.config.engine_config import EngineConfig
from rlhf.config.ppo_config import AdvantageKind, KLConfig, PPOConfig
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig, SamplingConfig
from rlhf.engine.engine import build_engine
from rlhf.engine.loss_scale import LossScale
from rlhf.rollout import without_bad_rows
from rlhf.runtime.dist import World
from rlhf.training.ppo_update import _over_updates as over_updates
from rlhf.training.ppo_update import advantages_of, minibatches, share_of, take_steps
from rlhf.types import PPOBatch, Rollout
from tests.engine import tiny


def config(**changes):
    settings = {
        "engine": EngineConfig(zero_stage=0),
        "lora": LoraConfig(rank=0),
        "micro_batch_size": 2,
        "max_prompt_tokens": 8,
        "max_response_tokens": 4,
        "seed": 0,
        "actor": "actor",
        "reward": "reward",
        "iterations": 1,
        "rollout_size": 8,
        "rollout_micro_batch_size": 4,
        "minibatch_size": 4,
        "actor_optimizer": OptimizerConfig(lr=1e-3),
        "critic_optimizer": OptimizerConfig(lr=1e-3),
        "sampling": SamplingConfig(),
        "kl": KLConfig(),
    }
    return PPOConfig(**(settings | changes))


def batch(num_rows=8, num_prompt=3, num_response=4):
    lengths = torch.tensor([1 + row % num_response for row in range(num_rows)])
    response_mask = torch.arange(num_response) < lengths[:, None]
    prompt_mask = torch.ones(num_rows, num_prompt, dtype=torch.bool)
    prompt_mask[:, 0] = False
    zeros = torch.zeros(num_rows, num_response)
    return PPOBatch(
        sequences=torch.arange(num_rows * (num_prompt + num_response)).view(num_rows, -1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
        logprobs=zeros,
        reference_logprobs=zeros,
        values=zeros,
        advantages=zeros,
        returns=zeros,
    )


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own():
    first = [set(m.sequences[:, 0].tolist()) for m in minibatches(batch(), config(), seed=1)]
    again = [set(m.sequences[:, 0].tolist()) for m in minibatches(batch(), config(), seed=1)]
    other = [set(m.sequences[:, 0].tolist()) for m in minibatches(batch(), config(), seed=2)]
    assert set().union(*first) == set(batch().sequences[:, 0].tolist())
    assert first == again
    assert first != other


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_share_a_minibatch_equally_and_completely(size):
    minibatch = batch(num_rows=4)
    shares = [
        share_of(minibatch, config(), world=World(rank=rank, size=size, device=torch.device("cpu")))
        for rank in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    tokens = sum(int(micro.response_mask.sum()) for share in shares for micro in share)
    assert tokens == int(minibatch.response_mask.sum()) == 1 + 2 + 3 + 4


def test_trimming_drops_only_columns_that_are_padding_everywhere():
    short = batch(num_rows=2)  # responses of 1 and 2 tokens, prompts of 2 with one column of padding in front
    trimmed = short.trimmed()
    assert trimmed.response_mask.tolist() == [[True, False], [True, True]]
    assert trimmed.sequences.tolist() == [[1, 2, 3, 4], [8, 9, 10, 11]]
    assert trimmed.attention_mask.tolist() == [[True, True, True, False], [True, True, True, True]]


def test_a_group_of_equal_scores_learns_nothing_whatever_its_kl():
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 2.0])
    noise = torch.randn(8, 4) * batch().response_mask
    for kind in ("grpo", "dr_grpo"):
        ppo = config(advantage=AdvantageKind(kind), samples_per_prompt=4)
        estimate = advantages_of(_rollout(scores), noise, config=ppo)
        assert estimate.advantages[:4].abs().max() == 0
        # Scores 0 2 0 2: mean 1, sample deviation sqrt(4/3); the shortest response has one token.
        expected = -1 / ((4 / 3) ** 0.5 + 1e-4) if kind == "grpo" else -1.0
        assert estimate.advantages[4].tolist() == pytest.approx([expected, 0, 0, 0], abs=1e-5)


def test_leave_one_out_compares_what_the_reward_says_of_whole_responses():
    ppo = config(advantage=AdvantageKind.rloo, samples_per_prompt=4)
    rewards = torch.zeros(8, 4)
    rewards[:, 0] = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 4.0])
    estimate = advantages_of(_rollout(torch.zeros(8)), rewards, config=ppo)
    # 6 against the mean of 1, 2 and 3; and not whitened, so the number stays.
    assert estimate.advantages[3].tolist() == pytest.approx([4, 4, 4, 4])


def _rollout(scores):
    shared = batch()
    zeros = torch.zeros(8, 4)
    return Rollout(
        sequences=shared.sequences,
        attention_mask=shared.attention_mask,
        response_mask=shared.response_mask,
        sample_ids=torch.arange(8),
        logprobs=zeros,
        reference_logprobs=zeros,
        generation_logprobs=zeros,
        values=zeros,
        kl=zeros,
        entropy=zeros,
        raw_scores=scores,
        scores=scores,
        ended=torch.ones(8, dtype=torch.bool),
        prompts=tuple("abcdefgh"),
        responses=tuple("abcdefgh"),
    )


NAN = float("nan")


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_one_response_with_a_nan_is_left_out_and_many_stop_the_run(kind):
    clean = without_bad_rows(_rollout(torch.tensor([3.0, 3.0, 3.0, NAN, 1.0, 2.0, 3.0, 6.0])))
    assert clean.scores.tolist() == [3, 3, 3, 1, 2, 3, 6]
    assert clean.responses == tuple("abcefgh")
    ppo = config(advantage=AdvantageKind(kind), samples_per_prompt=4)
    rewards = torch.zeros(7, 4)
    rewards[:, 0] = clean.scores
    found = advantages_of(clean, rewards, config=ppo).advantages[:, 0]
    assert found[:3].tolist() == [0, 0, 0]  # the others of its group agree
    # 6 over the mean of 1, 2, 3 and 6, whose deviations -2, -1, 0, 3 have the sample variance 14 / 3.
    assert found[6].item() == pytest.approx({"grpo": 3 / (14 / 3) ** 0.5, "dr_grpo": 3, "rloo": 4}[kind], rel=1e-4)
    with pytest.raises(RuntimeError, match="5 of 8 responses"):
        without_bad_rows(_rollout(torch.tensor([NAN] * 5 + [1.0] * 3)))


@pytest.mark.parametrize("name", ["logprobs", "reference_logprobs", "generation_logprobs", "values", "kl", "entropy"])
def test_any_number_of_a_token_that_is_not_finite_leaves_its_response_out(name):
    rollout = _rollout(torch.ones(8))
    numbers = torch.zeros(8, 4)
    numbers[5, 2] = float("inf")
    assert without_bad_rows(replace(rollout, **{name: numbers})).responses == tuple("abcdegh")


@pytest.mark.parametrize("left", range(1, 9))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_have_equally_many_micro_batches_of_what_is_left(left, size):
    ppo = config(minibatch_size=8, micro_batch_size=2)
    minibatch = batch().rows(torch.arange(left))
    ranks = [World(rank=rank, size=size, device=torch.device("cpu")) for rank in range(size)]
    shares = [share_of(minibatch, ppo, world=world) for world in ranks]
    assert len({len(share) for share in shares}) == 1
    micros = [micro for share in shares for micro in share]
    assert all(1 <= len(micro) <= 2 for micro in micros)  # each can be computed
    counted = [int(tokens) for micro in micros for tokens in micro.response_mask.sum(-1) if tokens]
    assert sorted(counted) == sorted(minibatch.response_mask.sum(-1).tolist())


def test_what_is_left_of_a_rollout_makes_as_many_minibatches_of_nearly_equal_size():
    sizes = [len(each) for each in minibatches(batch().rows(torch.arange(7)), config(minibatch_size=2), seed=1)]
    assert sorted(sizes) == [1, 2, 2, 2]
    assert [len(each) for each in minibatches(batch(), config(minibatch_size=4), seed=1)] == [4, 4]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dual_clip": 0.5}, "dual_clip=0.5"),
        ({"clip_range": -1.0}, "clip_range=-1.0"),
        ({"value_clip_range": 0.0}, "value_clip_range=0.0"),
        ({"gamma": 2.0}, "gamma=2.0"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"kl": KLConfig(target=6.0, coef=0.0)}, "ppo.kl.target=6.0 adapts"),
        ({"kl": KLConfig(target=6.0, horizon=1)}, "ppo.kl.horizon=1 above a fifth"),
        ({"critic_warmup": 1}, "ppo.critic_warmup=1: expected fewer than ppo.iterations=1"),
        ({"iterations": 3, "critic_warmup": 1, "advantage": AdvantageKind.rloo, "samples_per_prompt": 2}, "without a"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        config(**changes)


def test_schedules_count_the_updates_of_each_model():
    ppo = config(iterations=5, critic_warmup=2, epochs=3, minibatch_size=4)
    assert (ppo.updates_per_iteration, ppo.critic_steps, ppo.actor_steps) == (6, 30, 18)


def test_a_step_of_actor_and_critic_logs_their_loss_scale_and_what_the_search_for_it_skipped():
    settings = EngineConfig(zero_stage=0, precision="fp16", initial_scale_power=40, hysteresis=1)
    scale = LossScale(settings)
    engines = {}
    for name in ("actor", "critic"):
        engine = build_engine(
            tiny.spec(),
            config=EngineConfig(zero_stage=0, precision="fp16"),
            world=World.alone(),
            optimizer=tiny.optimizer_config(),
            total_steps=10,
            loss_scale=scale,
        )
        ids, counts = tiny.batch(0)
        engine.backward(tiny.token_loss(engine(ids), ids, counts, counts.sum()), last=True)
        engines[name] = engine
    first = take_steps(**engines)
    for name in engines:
        assert first[f"{name}/loss_scale"] == 2.0**40
        assert first[f"{name}/skipped_steps"] == first[f"{name}/scale_search_steps"] == 1
    later = {key: 2.0**39 if key.endswith("loss_scale") else value for key, value in first.items()}
    combined = over_updates([first, later])
    assert combined["actor/loss_scale"] == 2.0**39
    assert combined["critic/scale_search_steps"] == combined["critic/skipped_steps"] == 2
    assert all(engine.steps_taken == 0 for engine in engines.values())
