"""The PPO update on real engines: the first minibatch changes nothing by itself, and sizes do not change gradients."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlhf.algorithms.ppo import Advantages
from rlhf.config.engine_config import EngineConfig
from rlhf.config.objective_config import (
    AdvantageKind,
    AdvantageScale,
    KLConfig,
    MismatchConfig,
    MismatchCorrection,
    PolicyLossKind,
)
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig, SamplingConfig
from rlhf.engine.engine import build_engine
from rlhf.engine.loss_scale import LossScale
from rlhf.rollout import Models, replace_equal_groups, without_bad_rows
from rlhf.row_exchange import concatenated, texts_of
from rlhf.runtime.dist import World
from rlhf.training.minibatches import dealt, minibatches, share_of
from rlhf.training.ppo_update import _over_updates as over_updates
from rlhf.training.ppo_update import (
    advantages_of,
    mismatch_metrics,
    take_steps,
    training_batch,
    update_reference,
)
from rlhf.types import Experience, HeldRows, Responses, Rollout, Sequences
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
        "rewards": ["reward"],
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


def held_rows(sequences, attention_mask, texts=None):
    texts = texts or ("",) * len(sequences)
    own = Sequences(sequences, attention_mask, prompts=texts, responses=texts)
    return HeldRows.of(own, attention_mask.sum(-1))


def experience(sequences, attention_mask, **numbers):
    """What an update needs, all of it on this rank."""
    return Experience(held=held_rows(sequences, attention_mask), **numbers)


def spread(whole, world):
    """The same experience with sequences that are on the ranks in equal parts."""
    held, each = whole.held, len(whole) // world.size
    mine = held.own.rows(torch.arange(each) + world.rank * each)
    return replace(whole, held=HeldRows.of(mine, held.num_tokens, rank=world.rank, ranks=world.size))


def first_tokens(rows):
    return set(rows.held.own.sequences[rows.held.places, 0].tolist())


def batch(num_rows=8, num_prompt=3, num_response=4):
    lengths = torch.tensor([1 + row % num_response for row in range(num_rows)])
    response_mask = torch.arange(num_response) < lengths[:, None]
    prompt_mask = torch.ones(num_rows, num_prompt, dtype=torch.bool)
    prompt_mask[:, 0] = False
    zeros = torch.zeros(num_rows, num_response)
    return experience(
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
    first = [first_tokens(m) for m in minibatches(batch(), config(), seed=1)]
    again = [first_tokens(m) for m in minibatches(batch(), config(), seed=1)]
    other = [first_tokens(m) for m in minibatches(batch(), config(), seed=2)]
    assert set().union(*first) == first_tokens(batch())
    assert first == again
    assert first != other


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_share_a_minibatch_equally_and_completely(size):
    minibatch = batch(num_rows=4)
    shares = dealt(minibatch, config(), ranks=size)
    assert len({len(share) for share in shares}) == 1
    tokens = sum(int(minibatch.response_mask[rows].sum()) for share in shares for rows in share)
    assert tokens == int(minibatch.response_mask.sum()) == 1 + 2 + 3 + 4


def test_trimming_drops_only_columns_that_are_padding_everywhere(monkeypatch):
    monkeypatch.setattr("rlhf.types.WIDTHS", 1)
    short = batch(num_rows=2)  # responses of 1 and 2 tokens, prompts of 2 with one column of padding in front
    (trimmed,) = share_of(short, config())
    assert trimmed.response_mask.tolist() == [[True, True], [True, False]]  # the longest first
    assert trimmed.sequences.tolist() == [[8, 9, 10, 11], [1, 2, 3, 4]]
    assert trimmed.attention_mask.tolist() == [[True, True, True, True], [True, True, True, False]]


def test_trimming_leaves_widths_that_are_multiples_of_8_where_there_are_columns(monkeypatch):
    mask = torch.zeros(2, 20, dtype=torch.bool)  # prompts of 12 columns, responses of 8
    mask[:, 7:15] = True  # prompts of 5, responses of 3
    response = torch.zeros(2, 8, dtype=torch.bool)
    response[:, :3] = True
    found = Responses(torch.arange(40).view(2, 20), mask, response).trimmed()
    assert found.sequences[0].tolist() == list(range(7, 15))
    response[:, :4] = mask[:, 15] = True
    found = Responses(torch.arange(40).view(2, 20), mask, response).trimmed()
    assert found.sequences[0].tolist() == list(range(16))  # of 9 needed
    assert found.response_mask.shape == (2, 4)


def test_a_group_of_equal_rewards_learns_nothing():
    rewards = torch.zeros(8, 4)
    rewards[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 2.0])
    for scale in ("group", "none"):
        estimate = advantages_of(_rollout(torch.zeros(8)), rewards, config=grouped("grpo", scale))
        assert estimate.advantages[:4].abs().max() == 0
        # Scores 0 2 0 2: mean 1, sample deviation sqrt(4/3); the shortest response has one token.
        expected = -1 / ((4 / 3) ** 0.5 + 1e-4) if scale == "group" else -1.0
        assert estimate.advantages[4].tolist() == pytest.approx([expected, 0, 0, 0], abs=1e-5)


def test_leave_one_out_compares_what_the_reward_says_of_whole_responses():
    rewards = torch.zeros(8, 4)
    rewards[:, 0] = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 4.0])
    estimate = advantages_of(_rollout(torch.zeros(8)), rewards, config=grouped("rloo", "none"))
    # 6 against the mean of 1, 2 and 3; and not whitened, so the number stays.
    assert estimate.advantages[3].tolist() == pytest.approx([4, 4, 4, 4])


def test_without_a_critic_the_advantage_of_a_token_is_its_whitened_return():
    rewards = torch.zeros(8, 4)
    rewards[3] = torch.tensor([1.0, 0.0, 0.0, 4.0])
    ppo = config(advantage=AdvantageKind.reinforce_pp, gamma=0.5, lam=0.1)
    estimate = advantages_of(_rollout(torch.zeros(8)), rewards, config=ppo)
    assert estimate.returns[3].tolist() == [1.5, 1.0, 2.0, 4.0]  # 1 + 4 / 8, 4 / 4, 4 / 2, 4
    counted = estimate.advantages[batch().response_mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-6)
    assert counted.var(correction=0).item() == pytest.approx(1, rel=1e-5)


def grouped(advantage, scale, **changes):
    return config(
        advantage=AdvantageKind(advantage), scale_advantages=AdvantageScale(scale), samples_per_prompt=4, **changes
    )


def estimate_of(rollout):
    zeros = torch.zeros(len(rollout), 4)
    return Advantages(advantages=zeros, returns=zeros)


def test_truncated_responses_count_for_the_critic_but_not_for_the_actor():
    rollout = replace(_rollout(torch.ones(8)), ended=torch.arange(8) != 3)
    kept = training_batch(rollout, estimate_of(rollout), config=config(), dtype=torch.float32)
    assert kept.loss_mask is None
    masked = training_batch(rollout, estimate_of(rollout), config=config(mask_truncated=True), dtype=torch.float32)
    assert masked.loss_mask.sum(-1).tolist() == [1, 2, 3, 0, 1, 2, 3, 4]
    assert torch.equal(masked.response_mask, rollout.response_mask)


@pytest.mark.parametrize(
    ("correction", "dtype", "backend", "weight"),
    [
        ("auto", torch.float32, None, None),
        ("auto", torch.bfloat16, None, 2.0),
        ("auto", torch.float32, "my.py:Mine", 2.0),
        ("none", torch.float32, "my.py:Mine", None),
        ("token_mask", torch.float32, None, 0.0),
    ],
)
def test_the_mismatch_is_corrected_where_the_paths_differ(correction, dtype, backend, weight):
    generated = torch.zeros(8, 4)
    generated[7, 3] = -1.0  # training finds that token e times as likely
    rollout = replace(_rollout(torch.ones(8)), generation_logprobs=generated)
    ppo = config(mismatch=MismatchConfig(correction=MismatchCorrection(correction)), generation_backend=backend)
    found = training_batch(rollout, estimate_of(rollout), config=ppo, dtype=dtype)
    metrics = mismatch_metrics(rollout, found)
    assert metrics["rollout/mismatch_max"] == pytest.approx(math.e)
    assert metrics["rollout/mismatch_mean"] == pytest.approx((19 + math.e) / 20)  # 20 tokens
    if weight is None:
        assert found.correction is None
        assert "rollout/mismatch_weight" not in metrics
        return
    assert found.correction[7].tolist() == [1, 1, 1, weight]
    assert metrics["rollout/mismatch_weight"] == pytest.approx((19 + weight) / 20)
    assert metrics["rollout/mismatch_left_out"] == pytest.approx(0 if weight else 1 / 20)


def test_groups_of_equal_scores_are_replaced_by_further_prompts():
    ppo = grouped("grpo", "group", rollout_size=12, minibatch_size=4, dynamic_sampling=3)

    def rollout(first, scores):
        rows = torch.tensor(scores)
        parts = [_rollout(rows[:8]), _rollout(torch.cat([rows[8:], torch.zeros(4)])).rows(torch.arange(4))]
        found = concatenated(parts)
        return replace(found, sample_ids=torch.arange(first, first + 12))

    more = iter([rollout(12, [5.0] * 12), rollout(24, [0.0, 1, 0, 0, 2, 2, 2, 2, 3, 3, 3, 4])])
    first = rollout(0, [1.0, 1, 1, 1, 0, 0, 0, 1, 2, 2, 2, 2])
    found, metrics = replace_equal_groups(first, lambda: next(more), config=ppo, pad_id=0)
    assert found.sample_ids.tolist() == [4, 5, 6, 7, 24, 25, 26, 27, 32, 33, 34, 35]
    assert metrics == {"rollout/groups_equal": pytest.approx(2 / 3), "rollout/further_rollouts": 2}
    # A limit that is reached leaves fewer groups, and where none differ the first rollout stays.
    short = replace(ppo, dynamic_sampling=1)
    found, metrics = replace_equal_groups(first, lambda: rollout(12, [5.0] * 12), config=short, pad_id=0)
    assert found.sample_ids.tolist() == [4, 5, 6, 7]
    same = rollout(0, [1.0] * 12)
    found, metrics = replace_equal_groups(same, lambda: rollout(12, [5.0] * 12), config=ppo, pad_id=0)
    assert found.sample_ids.tolist() == list(range(12))
    assert metrics["rollout/further_rollouts"] == 3


def test_a_group_at_the_border_is_left_out_whole():
    ppo = grouped("grpo", "group", dynamic_sampling=1)
    seven = replace(_rollout(torch.arange(8.0)), sample_ids=torch.arange(8)).rows(torch.tensor([0, 1, 2, 4, 5, 6, 7]))
    further = replace(_rollout(torch.arange(8.0)), sample_ids=torch.arange(8, 16))
    found, _ = replace_equal_groups(seven, lambda: further, config=ppo, pad_id=0)
    assert found.sample_ids.tolist() == [0, 1, 2, 4, 5, 6, 7]  # one row was free, and a group has four


def _rollout(scores):
    shared = batch()
    zeros = torch.zeros(8, 4)
    return Rollout(
        held=held_rows(shared.held.own.sequences, shared.held.own.attention_mask, tuple("abcdefgh")),
        response_mask=shared.response_mask,
        sample_ids=torch.arange(8),
        logprobs=zeros,
        reference_logprobs=zeros,
        generation_logprobs=zeros,
        values=zeros,
        kl=zeros,
        entropy=zeros,
        source_scores=scores[:, None],
        raw_scores=scores,
        scores=scores,
        ended=torch.ones(8, dtype=torch.bool),
    )


def responses_of(rollout):
    return "".join(response for _, response in texts_of(rollout.held))


NAN = float("nan")


@pytest.mark.parametrize(("kind", "scale"), [("grpo", "group"), ("grpo", "none"), ("rloo", "none")])
def test_one_response_with_a_nan_is_left_out_and_many_stop_the_run(kind, scale):
    clean = without_bad_rows(_rollout(torch.tensor([3.0, 3.0, 3.0, NAN, 1.0, 2.0, 3.0, 6.0])))
    assert clean.scores.tolist() == [3, 3, 3, 1, 2, 3, 6]
    assert responses_of(clean) == "abcefgh"
    rewards = torch.zeros(7, 4)
    rewards[:, 0] = clean.scores
    found = advantages_of(clean, rewards, config=grouped(kind, scale)).advantages[:, 0]
    assert found[:3].tolist() == [0, 0, 0]  # the others of its group agree
    # 6 over the mean of 1, 2, 3 and 6, whose deviations -2, -1, 0, 3 have the sample variance 14 / 3.
    expected = {"grpo": 3 / ((14 / 3) ** 0.5 if scale == "group" else 1), "rloo": 4}[kind]
    assert found[6].item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(RuntimeError, match="5 of 8 responses"):
        without_bad_rows(_rollout(torch.tensor([NAN] * 5 + [1.0] * 3)))


@pytest.mark.parametrize("name", ["logprobs", "reference_logprobs", "generation_logprobs", "values", "kl", "entropy"])
def test_any_number_of_a_token_that_is_not_finite_leaves_its_response_out(name):
    rollout = _rollout(torch.ones(8))
    numbers = torch.zeros(8, 4)
    numbers[5, 2] = float("inf")
    assert responses_of(without_bad_rows(replace(rollout, **{name: numbers}))) == "abcdegh"


@pytest.mark.parametrize("left", range(1, 9))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_have_equally_many_micro_batches_of_what_is_left(left, size):
    ppo = config(minibatch_size=8, micro_batch_size=2)
    minibatch = batch().rows(torch.arange(left))
    shares = dealt(minibatch, ppo, ranks=size)
    assert len({len(share) for share in shares}) == 1
    pieces = [rows for share in shares for rows in share]
    assert all(len(rows) <= 2 for rows in pieces)
    assert sorted(torch.cat(pieces).tolist()) == list(range(left))


def test_what_is_left_of_a_rollout_makes_as_many_minibatches_of_nearly_equal_size():
    sizes = [len(each) for each in minibatches(batch().rows(torch.arange(7)), config(minibatch_size=2), seed=1)]
    assert sorted(sizes) == [1, 2, 2, 2]
    assert [len(each) for each in minibatches(batch(), config(minibatch_size=4), seed=1)] == [4, 4]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dual_clip": 0.5}, "dual_clip=0.5"),
        ({"clip_range": -1.0}, "clip_range=-1.0"),
        ({"dual_clip": 3.0, "policy_loss": PolicyLossKind.cispo}, "ppo.dual_clip=3.0 bounds the clipped surrogate"),
        ({"scale_advantages": AdvantageScale.group}, "ppo.scale_advantages=group divides by the deviation"),
        ({"dynamic_sampling": 2}, "ppo.dynamic_sampling=2 replaces groups of equal scores"),
        ({"mismatch": MismatchConfig(high=0.5)}, "ppo.mismatch: found low=0.0 and high=0.5"),
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


def test_the_reference_moves_every_few_iterations():
    calls = []
    reference = SimpleNamespace(follow=lambda actor, share: calls.append((actor, share)))
    models = Models(actor="actor", rewards={}, reference=reference, critic=None)
    ppo = config(reference_update_every=3, reference_update_mix=0.25)
    moved = [update_reference(models, ppo, iteration=step)["objective/reference_updated"] for step in range(1, 8)]
    assert moved == [0, 0, 1, 0, 0, 1, 0]
    assert calls == [("actor", 0.25)] * 2
    assert update_reference(models, config(), iteration=3) == {}
