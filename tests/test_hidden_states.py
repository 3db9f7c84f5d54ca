"""Frozen layers computed once for a rollout: the same logits, gradients and iterations as when every pass does."""

import tempfile
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, LlamaConfig, LlamaForCausalLM

from rlhf.algorithms.ppo import token_rewards
from rlhf.config.bounds import MicroBatchLimit
from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig
from rlhf.engine.engine import build_engine
from rlhf.forward_passes import agreed_pieces, all_statistics, critic_values, response_statistics
from rlhf.hidden_states import KeptStates, after_frozen_layers, may_begin_late
from rlhf.models.causal_lm import causal_lm, position_ids
from rlhf.models.scalar_head import scalar_head_model
from rlhf.reward_calls import RewardFunctions
from rlhf.rewards import RewardScorer, ScoredSource, ScoreShaping
from rlhf.rollout import Collector, GeneratedResponses, Models
from rlhf.row_exchange import fetched
from rlhf.runtime import dist
from rlhf.runtime.dist import World
from rlhf.tracking.timing import Stopwatch
from rlhf.training.minibatches import share_of
from rlhf.training.ppo_update import advantages_of, training_batch, update_policy
from rlhf.types import PromptBatch
from stages.ppo import begin_late
from tests.models import tiny
from tests.ranks import run_on_ranks
from tests.training.test_ppo_update import config

ADAPTERS = LoraConfig(rank=2, top_layers=1)


def logprobs(model, batch):
    return response_statistics(model, batch, temperature=1.0).logprobs


def learner(spec, *, precision="fp32", **engine):
    """A trainable engine, whose adapters do something from the beginning."""
    ppo = config()
    settings = EngineConfig(**({"zero_stage": 0, "precision": precision} | engine))
    made = build_engine(
        spec, config=settings, world=World.alone(), optimizer=replace(ppo.actor_optimizer, lr=1e-2), total_steps=8
    )
    shake(made)
    return made


def shake(engine):
    """Give every adapter's second matrix values of its own."""
    for name, parameter in engine.module.named_parameters():
        if ".lora_B." in name:
            rows = torch.arange(parameter.shape[0])[:, None] + torch.arange(parameter.shape[1])
            engine._sharding.write_shard(name, torch.sin(rows.float())[: parameter.shape[0]])


def responses(lengths=((4, 3), (2, 5), (4, 1), (3, 2))):
    """Sequences with padding on both sides, as (prompt, response)."""
    prompt, response = (max(column) for column in zip(*lengths, strict=True))
    ids, mask = tiny.padded([prompt + response] * len(lengths), side="right", seed=2)
    for row, (before, after) in enumerate(lengths):
        mask[row, : prompt - before] = False
        mask[row, prompt + after :] = False
    return GeneratedResponses(
        sequences=ids,
        attention_mask=mask,
        response_mask=mask[:, prompt:],
        sample_ids=torch.arange(10, 10 + len(lengths)),
        generation_logprobs=torch.zeros(len(lengths), response),
        ended=torch.ones(len(lengths), dtype=torch.bool),
        prompts=("",) * len(lengths),
    )


def kept_states(engine, generated, size=2):
    states = KeptStates(engine, used=True)
    with engine.evaluating() as model:
        found = all_statistics(model, generated, limit=MicroBatchLimit(size), temperature=1.0, around=states.kept)[0]
    return states, found


def gradients(engine, batch, forward, states):
    """Values of the counted tokens, and the gradients of a loss in which each has a share of its own."""
    with after_frozen_layers(engine, batch, states=states):
        values = forward(engine, batch)
    weights = torch.linspace(1, 2, values.numel()).view_as(values) * batch.response_mask
    learns = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((values * weights).sum(), list(learns.values()))
    return values.detach() * batch.response_mask, dict(zip(learns, found, strict=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logprobs_and_gradients_are_those_of_a_pass_through_every_layer(family, tmp_path):
    engine = learner(causal_lm(tiny.save(family, tmp_path), lora=ADAPTERS))
    assert len(engine.frozen_layers) == 2
    assert may_begin_late(engine, logprobs, name="actor")
    generated = responses()
    states, _ = kept_states(engine, generated)
    kept = agreed_pieces(generated, MicroBatchLimit(2))[0]
    other = torch.tensor([3, 1, 2])  # the second in other company than when it was kept
    for rows, tolerance in ((kept, 0), (other, 1e-4)):
        batch = generated.rows(rows).trimmed()
        expected, every_layer = gradients(engine, batch, logprobs, None)
        found, later_layers = gradients(engine, batch, logprobs, states.of(batch.sample_ids))
        assert (found - expected).abs().max() <= tolerance
        assert later_layers.keys() == every_layer.keys()
        for name, gradient in later_layers.items():
            assert gradient.norm() > 0
            assert (gradient - every_layer[name]).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_values_and_gradients_of_a_critic(family, tmp_path):
    engine = learner(scalar_head_model(tiny.save(family, tmp_path), lora=ADAPTERS))
    forward = partial(critic_values, shift=0.5)
    assert may_begin_late(engine, forward, name="critic")
    batch = responses()
    states = KeptStates(engine, used=True)
    with engine.evaluating() as model, states.kept(batch):
        forward(model, batch)
    batch = batch.rows(torch.tensor([2, 0]))  # with columns that are padding in both
    expected, every_layer = gradients(engine, batch, forward, None)
    found, later_layers = gradients(engine, batch, forward, states.of(batch.sample_ids))
    assert (found - expected).abs().max() <= 1e-4
    assert "score.weight" in later_layers
    for name, gradient in every_layer.items():
        assert (later_layers[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_what_is_kept_are_the_hidden_states_that_transformers_returns(family, tmp_path):
    engine = learner(causal_lm(tiny.save(family, tmp_path), lora=ADAPTERS))
    generated = responses()
    states, _ = kept_states(engine, generated)
    plain, mask = tiny.model(family), generated.attention_mask
    with torch.no_grad():
        expected = plain(
            generated.sequences, attention_mask=mask, position_ids=position_ids(mask), output_hidden_states=True
        ).hidden_states[2]
    for row, found in enumerate(states.of(generated.sample_ids)):
        torch.testing.assert_close(found, expected[row][mask[row]], rtol=1e-4, atol=1e-4)


def test_the_reference_begins_where_the_actor_was_and_nothing_below_is_computed(tmp_path):
    engine = learner(causal_lm(tiny.save("llama", tmp_path), lora=ADAPTERS))
    states, _ = kept_states(engine, responses())
    calls = []
    for index, block in enumerate(engine.module.model.layers):
        block.mlp.register_forward_hook(partial(lambda index, *_: calls.append(index), index))
    with after_frozen_layers(engine, responses(), states=states.of(responses().sample_ids)):
        logprobs(engine, responses())
    assert calls == [2]
    logprobs(engine, responses())
    assert calls == [2, 0, 1, 2]


def test_adapters_below_or_everywhere_leave_nothing_to_keep(tmp_path):
    folder = tiny.save("llama", tmp_path)
    assert len(learner(causal_lm(folder)).frozen_layers) == 0
    assert len(learner(causal_lm(folder, lora=LoraConfig(rank=2))).frozen_layers) == 0
    everywhere = learner(causal_lm(folder, lora=LoraConfig(rank=2)))
    assert not may_begin_late(everywhere, logprobs, name="actor")
    assert kept_states(learner(causal_lm(folder, lora=ADAPTERS)), responses())[0].of(torch.tensor([10]))[0].ndim == 2


def test_a_model_whose_later_layers_read_earlier_keys_is_computed_whole(tmp_path, caplog):
    torch.manual_seed(0)
    shape = Gemma3nTextConfig(
        vocab_size=tiny.VOCAB,
        vocab_size_per_layer_input=tiny.VOCAB,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
        pad_token_id=tiny.PAD,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    engine = learner(causal_lm(tmp_path, lora=LoraConfig(rank=2, top_layers=1)))
    assert len(engine.frozen_layers) == 3
    caplog.set_level("INFO", logger="rlhf.hidden_states")
    assert not may_begin_late(engine, logprobs, name="actor")
    assert "computed in every pass" in caplog.text
    with engine.evaluating() as model:  # nothing of the trial is left
        assert logprobs(model, responses()).isfinite().all()


def test_a_row_that_keeps_ranks_in_step_needs_the_states_of_its_prompt_alone(tmp_path):
    engine = learner(causal_lm(tiny.save("llama", tmp_path), lora=ADAPTERS))
    generated = responses()
    states, _ = kept_states(engine, generated)
    batch = replace(generated.rows(torch.tensor([1])), response_mask=torch.zeros(1, 5, dtype=torch.bool)).trimmed()
    assert batch.attention_mask.sum() < generated.attention_mask[1].sum()
    with after_frozen_layers(engine, batch, states=states.of(torch.tensor([11]))):
        found = logprobs(engine, batch)
    torch.testing.assert_close(found, logprobs(engine, batch), rtol=1e-5, atol=1e-5)


# ---- whole iterations


def iteration(folder, world, *, reuse, trains=True, **engine):
    """Two iterations on this rank's prompts: the last metrics, the rollout, and what was learnt."""
    settings = EngineConfig(**({"precision": "fp32"} | engine))
    ppo = config(
        engine=settings, lora=ADAPTERS, max_response_tokens=6, rollout_size=8, minibatch_size=4, epochs=2, iterations=2
    )
    build = partial(build_engine, config=settings, world=world)
    optimizer = {"optimizer": replace(ppo.actor_optimizer, lr=1e-2), "total_steps": 16}
    models = Models(
        actor=build(causal_lm(folder, lora=ADAPTERS), **optimizer),
        rewards={"model": build(scalar_head_model(folder, seed=3))},
        reference=None,
        critic=build(scalar_head_model(folder, seed=3, lora=ADAPTERS), **optimizer),
    )
    if reuse:
        models = replace(models, begin_late=begin_late({"actor": models.actor, "critic": models.critic}))
        assert models.begin_late == {"actor", "critic"}
    collector = Collector(
        models=models,
        config=ppo,
        decode=str,
        pad_id=tiny.PAD,
        stop_token_ids=tuple(range(0, 60, 3)),
        scorer=RewardScorer(["model"], models.rewards, RewardFunctions.load(ppo, stage="ppo"), ppo.micro_batch_limit),
        shaping=ScoreShaping(ppo.score, [ScoredSource("model")], ppo.max_response_tokens),
        timer=Stopwatch(torch.device("cpu")),
    )
    with closing(models):
        for step in range(2 if trains else 0):
            rollout, metrics = one_iteration(collector, step, world)
        if not trains:
            rollout, metrics = collector.collect(some_prompts(0, world), seed=0, step=0, trains=False), {}
        return metrics, rollout, {name: p for name, p in models.actor.full_tensors() if ".lora_B." in name}


def some_prompts(step, world):
    ids = torch.randint(1, 100, (8, 5), generator=torch.Generator().manual_seed(step))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::2, :2] = False
    mine = torch.arange(8).tensor_split(world.size)[world.rank]
    ids_of = torch.arange(8 * step, 8 * step + 8)
    return PromptBatch(ids, mask, sample_ids=ids_of, prompts=("x",) * 8, columns=({},) * 8).rows(mine)


def one_iteration(collector, step, world):
    models, ppo = collector.models, collector.config
    rollout = collector.collect(some_prompts(step, world), seed=0, step=step)
    rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=0.1)
    estimate = advantages_of(rollout, rewards, config=ppo)
    batch = training_batch(rollout, estimate, config=ppo, dtype=models.actor.dtype)
    assert len(share_of(batch, ppo)) > 1
    return rollout, update_policy(models, batch, config=ppo, iteration=step + 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return five_layers(tmp_path_factory.mktemp("llama"))


def five_layers(folder):
    """Deep enough that at ZeRO 3 a layer below the frozen ones is not the one that is gathered next."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**tiny._IDS, **(tiny._SHAPE | {"num_hidden_layers": 5}), initializer_range=0.2))
    made.save_pretrained(folder)
    return folder


def compare(found, expected, tolerance=1e-4):
    (metrics, rollout, learnt), (others, whole, wanted) = found, expected
    assert torch.equal(rollout.held.num_tokens, whole.held.num_tokens)
    if whole.held.ranks == 1:  # which has them all
        mine = rollout.held.holders == rollout.held.rank
        assert torch.equal(rollout.held.own.sequences, whole.held.own.sequences[mine])
    for name in ("logprobs", "reference_logprobs", "values"):
        torch.testing.assert_close(getattr(rollout, name), getattr(whole, name), rtol=tolerance, atol=tolerance)
    assert metrics == pytest.approx(others, rel=50 * tolerance, abs=tolerance)
    assert learnt.keys() == wanted.keys()
    for name, tensor in learnt.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=tolerance, atol=tolerance)


VARIANTS = {
    "zero0": {"zero_stage": 0},
    "padded": {"zero_stage": 0, "padding_free": False},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "buckets": {"zero_stage": 2, "reduce_bucket_size": 30_000},  # units of several layers, one of them half frozen
    "zero3": {"zero_stage": 3},
    "far_ahead": {"zero_stage": 3, "prefetch_bucket_size": 60_000},
    "one_by_one": {"zero_stage": 3, "overlap_comm": False},
    "cpu": {"zero_stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"},
    "nvme": {"zero_stage": 3, "offload_param": "nvme", "offload_optimizer": "nvme"},
    "recomputed": {"zero_stage": 3, "activation_checkpointing": True},
}


def every_variant(names, reuse=True):
    """On a rank that has joined the others, or on a single one."""
    torch.set_num_threads(1)
    world = dist.start("cpu")
    found = {}
    with tempfile.TemporaryDirectory() as mine:
        folder = Path(dist.broadcast_object(mine))
        if world.is_main:
            five_layers(folder / "model")
        dist.barrier()
        for name in names:
            disk = {"nvme_path": str(folder)} if "nvme" in name else {}
            found[name] = iteration(folder / "model", world, reuse=reuse, **VARIANTS[name], **disk)
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def whole():
    """An iteration on one rank in which every pass computes every layer."""
    return every_variant(["zero0"], reuse=False)["zero0"]


def test_an_iteration_on_one_rank_learns_the_same(whole):
    metrics, rollout, _ = whole
    assert rollout.held.own.actor_states is None
    assert metrics["actor/clipfrac_avg"] > 0  # it has moved
    for found in every_variant(VARIANTS).values():
        assert [len(states) for states in found[1].held.own.actor_states] == found[1].held.num_tokens.tolist()
        compare(found, whole)


def test_an_iteration_on_two_ranks_learns_the_same(whole):
    first, second = run_on_ranks(every_variant, 2, list(VARIANTS))
    for name, found in first.items():
        compare(found, whole)
        compare(second[name], found, tolerance=0)


def test_with_16_bit_weights_the_frozen_layers_are_not_rounded_again(llama):
    engine = learner(causal_lm(llama, lora=ADAPTERS), precision="bf16")
    assert may_begin_late(engine, logprobs, name="actor")
    generated = responses()
    states, whole = kept_states(engine, generated, size=4)
    kept = states.of(generated.sample_ids)
    assert {rows.dtype for rows in kept} == {torch.bfloat16}
    # The same rows in the same shape give the same bits.
    piece = generated.rows(agreed_pieces(generated, MicroBatchLimit(4))[0]).trimmed()
    with engine.evaluating() as model, after_frozen_layers(engine, piece, states=states.of(piece.sample_ids)):
        found = logprobs(model, piece) * piece.response_mask
    expected = whole[agreed_pieces(generated, MicroBatchLimit(4))[0], : found.shape[1]]
    assert torch.equal(found, expected)


def test_rows_of_a_rollout_take_their_states_along_and_an_evaluation_keeps_none(llama):
    _, rollout, _ = iteration(llama, World.alone(), reuse=True, zero_stage=0)
    picked = fetched(rollout.held, [torch.tensor([5, 2])])
    for states in ("actor_states", "critic_states"):
        held = getattr(rollout.held.own, states)
        assert [id(row) for row in getattr(picked, states)] == [id(held[row]) for row in (5, 2)]
    _, rollout, _ = iteration(llama, World.alone(), reuse=True, trains=False, zero_stage=0)
    assert rollout.held.own.actor_states is None
    assert rollout.held.own.critic_states is None
    assert rollout.kl.abs().max() == 0  # the adapters are new, and the reference is the actor
