"""Generation in the middle of training: the same numbers, no other rank needed, and nothing left behind."""

import pytest
import torch

from rlhf.config.bounds import MicroBatchLimit
from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig, SamplingConfig
from rlhf.engine.engine import build_engine
from rlhf.forward_passes import all_statistics
from rlhf.generation.decode_graphs import DecodeGraphs
from rlhf.generation.generate import Decoding
from rlhf.models.causal_lm import causal_lm
from rlhf.rollout import generate_responses
from rlhf.runtime import dist
from rlhf.runtime.dist import World
from rlhf.types import PromptBatch
from tests.engine import scenarios, tiny
from tests.ranks import run_on_ranks

BOTH = [(ranks, stage) for ranks in (1, 2) for stage in scenarios.STAGES]


@pytest.fixture(scope="module")
def unwrapped():
    model = tiny.reference()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model.requires_grad_(False)


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_gathered_evaluated_sharded_and_unwrapped_forwards_are_equal(on_ranks, unwrapped, ranks, stage):
    expected = unwrapped(tiny.batch(50)[0])
    for rank in on_ranks(ranks):
        for logits in rank["hybrid"][stage]["logits"]:
            assert torch.equal(logits, expected)


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_ranks_may_stop_at_different_lengths(on_ranks, unwrapped, ranks, stage):
    expected = tiny.batch(50)[0][:2, :3]
    for _ in range(2 + 3 * (ranks - 1)):
        expected = torch.cat([expected, unwrapped(expected)[:, -1:].argmax(-1)], 1)
    for index, rank in enumerate(on_ranks(ranks)):
        tokens = rank["hybrid"][stage]["tokens"]
        assert tokens.shape[1] == 3 + 2 + 3 * index
        assert torch.equal(tokens, expected[:, : tokens.shape[1]])


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_after_generation_even_one_cut_short_training_goes_on_undisturbed(on_ranks, ranks, stage):
    for rank in on_ranks(ranks):
        found = rank["hybrid"][stage]
        sharded, training, gradients = found["state"]
        assert sharded == [ranks > 1 and stage > 0] * len(sharded)
        assert training
        assert gradients
        assert found["unchanged"]
        disturbed, undisturbed = found["curves"]
        assert disturbed == undisturbed


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_adapters_say_in_generation_what_they_say_in_training(on_ranks, ranks, stage):
    *_, steps_of_one = on_ranks(1)[0]["low_rank"][0]
    for rank in on_ranks(ranks):
        evaluated, generated, same, steps = rank["low_rank"][stage]
        assert torch.equal(generated, evaluated)
        assert same
        assert steps == pytest.approx(steps_of_one, rel=1e-5)


def gap(engine, seed=0):
    """Mean distance of the log-probabilities of generation and of the path that trains."""
    torch.manual_seed(seed)
    ids = torch.randint(0, 90, (32, 6))
    prompts = PromptBatch(
        ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(32), prompts=("",) * 32, columns=({},) * 32
    )
    decoding = Decoding(24, [100], pad_id=0, sampling=SamplingConfig(), slots=32)
    responses = generate_responses(engine, prompts, decoding=decoding, seed=seed)
    with engine.evaluating() as model:
        logprobs = all_statistics(model, responses, limit=MicroBatchLimit(32), temperature=1.0)[0]
    return (responses.generation_logprobs - logprobs)[responses.response_mask].abs().mean().item()


def train(engine):
    """A step on the prompts of `answers`."""
    ids = torch.arange(24, device=engine.world.device).view(4, 6)
    loss = torch.nn.functional.cross_entropy(engine(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    engine.backward(loss, last=True)
    engine.step()


def answers(engine, *, graphs):
    ids, there = torch.arange(24).view(4, 6), torch.ones(4, 6, dtype=torch.bool)
    prompts = PromptBatch(ids, there, torch.arange(4), prompts=("",) * 4, columns=({},) * 4)
    decoding = Decoding(20, [100, *range(0, 90, 9)], pad_id=0, sampling=SamplingConfig(), slots=3)
    engine.decode_graphs = graphs
    return generate_responses(engine, prompts.to(engine.world.device), decoding=decoding, seed=4)


def assert_fixed_steps_follow_the_weights(world, folder, **config):
    """After every update, steps of fixed shapes say what those of growing ones say, and nothing of them is kept."""
    optimizer = tiny.optimizer_config(schedule="constant", warmup_steps=0)
    config = EngineConfig(precision="fp32", **config)
    engine = build_engine(causal_lm(folder), config=config, world=world, optimizer=optimizer, total_steps=3)
    graphs, texts = DecodeGraphs(), set()
    with engine.generating() as module:
        addresses = [parameter.data_ptr() for parameter in module.parameters()]  # as a capture asks for them
    assert 0 not in addresses
    for _ in range(3):
        train(engine)
        found, expected = answers(engine, graphs=graphs), answers(engine, graphs=None)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.generation_logprobs, expected.generation_logprobs, rtol=1e-4, atol=1e-4)
        texts.add(str(found.sequences.tolist()))
        assert graphs._kept is None
    assert len(texts) == 3
    assert not graphs._refusal
    engine.close()


def fixed_steps_of_a_rank(folder, stage):
    assert_fixed_steps_follow_the_weights(dist.start("cpu"), folder, zero_stage=stage)
    dist.stop()


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_fixed_steps_follow_the_weights(tmp_path, ranks, stage):
    tiny.reference().llama.save_pretrained(tmp_path)
    run_on_ranks(fixed_steps_of_a_rank, ranks, tmp_path, stage)


def test_small_adapters_do_not_widen_the_gap_between_generation_and_training(tmp_path):
    tiny.reference().llama.save_pretrained(tmp_path)
    engines = {}
    for size in (0.0, 1e-4, 5e-4):
        plan = causal_lm(tmp_path, lora=LoraConfig(rank=4 if size else 0, alpha=4.0))
        engines[size] = build_engine(plan, config=EngineConfig(zero_stage=0, precision="bf16"), world=World.alone())
        with torch.no_grad():
            for name, parameter in engines[size].module.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0, size)
    plain, *adapted = (gap(engine) for engine in engines.values())
    assert all(found <= 1.25 * plain for found in adapted)
