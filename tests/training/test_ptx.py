"""Language modelling beside the policy loss, against plain autograd on the sum of both losses."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf.config.engine_config import EngineConfig
from rlhf.config.ppo_config import PtxConfig
from rlhf.config.run_config import Embedded
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig
from rlhf.engine.engine import build_engine
from rlhf.models.causal_lm import causal_lm
from rlhf.models.embedded import prepare
from rlhf.models.lora import inject
from rlhf.rollout import Models
from rlhf.runtime import dist
from rlhf.runtime.dist import World
from rlhf.training.ppo_update import text_gradient, update
from rlhf.types import SFTBatch
from tests.engine import scenarios
from tests.ranks import run_on_ranks
from tests.training.test_ppo_update import config, experience, spread

COEF, LENGTH = 0.7, 9
TEXT_TOKENS = (9, 2, 5, 3)  # of each sequence; the first of each is not predicted
RESPONSE_TOKENS = (4, 1, 2, 3)
KINDS = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2 optimizer on the host": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3": {"zero_stage": 3},
    "zero3 weights on the host": {"zero_stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"},
    "zero2 recomputed": {"zero_stage": 2, "activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    prepare(Embedded.tiny, path)
    return path


def texts():
    """Four sequences of text of very different lengths."""
    ids = torch.randint(20, 60, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(LENGTH) < torch.tensor(TEXT_TOKENS)[:, None]
    return SFTBatch(input_ids=ids, attention_mask=mask, target_mask=mask & (torch.arange(LENGTH) > 0))


def responses():
    """Four responses to prompts of three tokens, with the old log-probabilities of another policy."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(20, 60, (4, 7), generator=generator)
    mask = torch.arange(4) < torch.tensor(RESPONSE_TOKENS)[:, None]
    numbers = torch.randn(4, 4, generator=generator) * mask
    return experience(
        sequences=ids,
        attention_mask=torch.cat([torch.ones(4, 3, dtype=torch.bool), mask], dim=1),
        response_mask=mask,
        logprobs=-5 + 0.1 * numbers,
        reference_logprobs=None,
        values=torch.zeros(4, 4),
        advantages=numbers,
        returns=torch.zeros(4, 4),
    )


def gradient_by_hand(folder, coef=COEF, *, mixed=False, adapters=None):
    """The gradient of the whole loss on one process; `mixed` divides text by the policy's tokens, which is wrong."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapters is not None:
        inject(model, LoraConfig(rank=4), blocks=list(model.model.layers))
        for name, _ in list(model.named_parameters()):
            owner, _, key = name.rpartition(".")
            learns = ".lora_" in name
            setattr(model.get_submodule(owner), key, nn.Parameter(adapters[name].clone(), requires_grad=learns))
    batch, text = responses(), texts()
    own = batch.held.own

    def logprobs(ids, mask):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)

    ratio = (logprobs(own.sequences, own.attention_mask)[:, -4:] - batch.logprobs).exp()
    clipped = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    policy = -clipped[batch.response_mask].sum() / sum(RESPONSE_TOKENS)
    found = -logprobs(text.input_ids, text.attention_mask)[text.target_mask[:, 1:]]
    language = found.sum() / (sum(RESPONSE_TOKENS) if mixed else sum(TEXT_TOKENS) - 4)
    (policy + coef * language).backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return named, float(found.mean().detach())


def gradients(folder, kinds, lora=0):
    """The gradient of one update and `ptx/loss` on this rank, by kind of engine; two sequences at once."""
    world = dist.start("cpu") if "RANK" in os.environ else World.alone()
    return {name: gradient(folder, world, EngineConfig(precision="fp32", **kind), lora) for name, kind in kinds.items()}


def gradient(folder, world, engine, lora):
    optimizer = OptimizerConfig(lr=1e-9, max_grad_norm=0, betas=[0.9, 0.95], schedule="constant")
    spec = causal_lm(folder, lora=LoraConfig(rank=lora))
    actor = build_engine(spec, config=engine, world=world, optimizer=optimizer, total_steps=4)
    started = scenarios.weights(actor) if lora else None
    size = 1 if world.size == 2 else 2
    ppo = config(minibatch_size=4, rollout_size=4, micro_batch_size=size, ptx=PtxConfig(coef=COEF, batch_size=4))
    whole = texts()
    mine = torch.arange(4).split(size)[world.rank :: world.size]  # long and short ones on different ranks
    rows = [
        SFTBatch(whole.input_ids[own], whole.attention_mask[own], target_mask=whole.target_mask[own]) for own in mine
    ]
    models = Models(actor=actor, rewards={}, reference=None, critic=None)
    measured = update(
        models, {"actor": actor}, minibatch=spread(responses(), world), config=ppo, kl_coef=0.0, text=rows
    )
    found = scenarios.first_gradient(actor)
    actor.close()
    return found, measured["ptx/loss"], measured["ptx/tokens"], started


def assert_same(found, expected):
    assert set(found) == set(expected)
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradient_is_that_of_the_sum_of_both_losses_wherever_tensors_are(folder, ranks):
    expected, loss = gradient_by_hand(folder)
    found = run_on_ranks(gradients, ranks, folder, KINDS) if ranks > 1 else [gradients(folder, KINDS)]
    for rank in found:
        for gradient, measured, tokens, _ in rank.values():
            assert_same(gradient, expected)
            assert measured == pytest.approx(loss, rel=1e-5)
            assert tokens == sum(TEXT_TOKENS) - 4 == 15


def test_text_has_a_denominator_of_its_own(folder):
    wrong, _ = gradient_by_hand(folder, mixed=True)  # 15 tokens of text over 10 of responses
    found = gradients(folder, {"zero0": {"zero_stage": 0}})["zero0"][0]
    with pytest.raises(AssertionError):
        assert_same(found, wrong)
    without, _ = gradient_by_hand(folder, coef=0.0)
    right, _ = gradient_by_hand(folder)
    name = "model.norm.weight"
    # What text adds is too large by 15 / 10 with the wrong one, whatever the policy's part is.
    torch.testing.assert_close(
        (wrong[name] - without[name]) * 10 / 15, right[name] - without[name], rtol=1e-3, atol=1e-7
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_learn_text_too(folder, ranks):
    kinds = {"zero0": KINDS["zero0"], "zero3": KINDS["zero3"]}
    found = run_on_ranks(gradients, ranks, folder, kinds, 4) if ranks > 1 else [gradients(folder, kinds, 4)]
    for rank in found:
        for gradient, _, _, started in rank.values():
            expected, _ = gradient_by_hand(folder, adapters=started)
            assert_same(gradient, expected)


class Uniform:
    """An actor that finds all of 8 tokens equally likely, and remembers the losses of its backward passes."""

    world = World.alone()

    def __init__(self):
        self.losses = []

    def __call__(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, 8, requires_grad=True)
        return type("Output", (), {"logits": logits})

    def backward(self, loss, *, last):
        assert not last
        self.losses.append(loss.item())


def test_each_micro_batch_counts_by_its_tokens():
    lengths, actor = (4, 2), Uniform()
    masks = [torch.ones(1, length, dtype=torch.bool) for length in lengths]
    batches = [SFTBatch(input_ids=mask.long(), attention_mask=mask, target_mask=mask) for mask in masks]
    measured = text_gradient(actor, batches, coef=0.5)
    # 3 and 1 predicted tokens of ln 8 nats each: half the mean, three quarters of it from the first.
    assert actor.losses == pytest.approx([0.5 * 0.75 * math.log(8), 0.5 * 0.25 * math.log(8)])
    assert measured == {"ptx/loss": pytest.approx(math.log(8)), "ptx/tokens": 4}
