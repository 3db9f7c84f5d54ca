"""DPO on a tiny Llama, step for step beside TRL's trainer, on one rank and on two.

`tests/golden/dpo_run.json` holds what TRL found for `llama`, `pairs` and `SETTINGS`: its trainer took the rows of
`order` one after the other, without shuffling them.
"""

import json
import math
import random
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from data.loader import TrainLoader, collate_preferences, shuffled_rows
from data.samples import Preference
from rlhf.config.dpo_config import DPOConfig
from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig
from rlhf.engine.engine import build_engine
from rlhf.evaluation.metrics import evaluate_policy_on_pairs
from rlhf.models.causal_lm import causal_lm
from rlhf.runtime import dist
from rlhf.tracking.timing import Stopwatch
from rlhf.training.supervised_step import dpo_form, objective_of, take_step
from rlhf.types import EvalBatch
from stages.dpo import ReferenceLogprobs
from tests.models.tiny import FAMILIES, PAD
from tests.ranks import run_on_ranks

GOLDEN = Path(__file__).parents[1] / "golden/dpo_run.json"
SETTINGS = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
BETA, STEPS, BATCH, SEED = 0.3, 20, 8, 11


def llama():
    """A Llama whose weights follow from arithmetic alone."""
    model = LlamaForCausalLM(FAMILIES["llama"]()).eval()
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (1.7 + 0.1 * index)).float()
            parameter.copy_((0.2 * wave).view_as(parameter) + (1 if parameter.dim() == 1 else 0))
    return model


@cache
def pairs():
    """64 times the ids of a prompt, a chosen and a rejected response."""
    draw = random.Random(3)
    lengths = [[draw.randrange(1, 9) for _ in range(3)] for _ in range(64)]
    return [[[draw.randrange(100) for _ in range(size)] for size in sizes] for sizes in lengths]


def samples():
    """The pairs as a data set gives them."""

    def sample(prompt, *responses):
        chosen, rejected = (np.array(prompt + response, dtype=np.int32) for response in responses)
        targets = tuple(np.arange(len(ids)) >= len(prompt) for ids in (chosen, rejected))
        return Preference(chosen, rejected, margin=0.0, targets=targets)

    return [sample(*ids) for ids in pairs()]


def order():
    """The rows of all steps, one after the other."""
    return [shuffled_rows(len(pairs()), SEED, start=start, count=1)[0] for start in range(STEPS * BATCH)]


def config(**changes):
    optimizer = OptimizerConfig(**SETTINGS, schedule="constant")
    sizes = {"global_batch_size": BATCH, "micro_batch_size": 4, "max_prompt_tokens": 9, "max_response_tokens": 9}
    return DPOConfig(**{**sizes, "beta": BETA, "optimizer": optimizer, "lora": LoraConfig(rank=0), "seed": 0} | changes)


def trained(folder, settings, zero_stage=0):
    """The metrics of all steps, the weights after them, and the reference's log-probabilities."""
    world, rows = dist.start("cpu"), samples()
    session = SimpleNamespace(
        run=SimpleNamespace(training_config=lambda _: settings), world=world, pad_id=PAD, timer=Stopwatch(world.device)
    )
    collate = partial(collate_preferences, pad_id=PAD)
    with closing(
        build_engine(
            causal_lm(folder, lora=settings.lora),
            config=EngineConfig(zero_stage=zero_stage, precision="fp32"),
            world=world,
            optimizer=settings.optimizer,
            total_steps=STEPS,
        )
    ) as policy:
        ReferenceLogprobs(rows).ask(policy, session)
        held_out = EvalBatch(collate(rows[:8]), 8)
        before = evaluate_policy_on_pairs(policy, [held_out], form=dpo_form(settings))
        sizes = {"global_batch_size": BATCH, "limit": settings.micro_batch_limit}
        loader = TrainLoader(rows, collate, **sizes, rank=world.rank, ranks=world.size, seed=SEED, steps=STEPS)
        objective = objective_of(settings)
        metrics = [take_step(policy, batches, objective=objective) for batches in loader]
        after = evaluate_policy_on_pairs(policy, [held_out], form=dpo_form(settings))
        weights = {name: tensor.clone() for name, tensor in policy.full_tensors()}
    return SimpleNamespace(
        metrics=metrics,
        weights=weights,
        reference=torch.tensor(np.stack([row.reference for row in rows])),
        before=before,
        after=after,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    return trained(folder, config())


def assert_as_trl(found):
    golden = json.loads(GOLDEN.read_text())
    assert order() == golden["order"]
    for name, theirs in golden["metrics"].items():
        # At first both models are equal, and rounding alone decides which response is ahead.
        first = 1 if name == "accuracy" else 0
        ours = torch.tensor([row[f"train/{name}"] for row in found.metrics])[first:]
        expected = torch.tensor(theirs[first:])
        # Adam amplifies rounding, from gradients that are as close to those of fp64 as TRL's: the loss stays within
        # 1e-5 over 20 steps, sums of 20 log-probabilities and norms within 3e-5.
        bound = 1e-5 if name == "loss" else 3e-5
        assert_close(ours, expected, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}: {text}")
    for name, (total, size) in golden["weights"].items():
        weight = found.weights[name].double()
        assert weight.sum().item() == pytest.approx(total, abs=1e-5 * weight.numel() ** 0.5), name
        assert weight.abs().sum().item() == pytest.approx(size, rel=1e-5), name


def test_twenty_steps_are_those_of_trl(alone):
    assert_as_trl(alone)


BY_TOKENS = {"micro_batch_size": 8, "micro_batch_tokens": 60}  # from 1 pair to 5 at once


@pytest.mark.parametrize(
    ("zero_stage", "sizes"),
    [(0, {"micro_batch_size": 1}), (3, {"micro_batch_size": 4}), (0, BY_TOKENS), (3, BY_TOKENS)],
)
def test_two_ranks_take_the_same_steps(folder, zero_stage, sizes):
    for found in run_on_ranks(trained, 2, folder, config(**sizes), zero_stage):
        assert_as_trl(found)


def test_micro_batches_by_tokens_take_the_same_steps(folder):
    assert_as_trl(trained(folder, config(**BY_TOKENS)))


def test_the_reference_is_what_transformers_says(alone):
    model = llama()
    for (prompt, *responses), found in list(zip(pairs(), alone.reference, strict=True))[:6]:
        for response, logprob in zip(responses, found, strict=True):
            ids = torch.tensor([prompt + response])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            assert_close(logprobs[len(prompt) - 1 :].sum(), logprob, rtol=1e-5, atol=1e-5)


def test_a_run_starts_at_ln_2_and_learns_the_pairs(alone):
    assert alone.metrics[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert alone.before["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert alone.before["eval/log_ratio"] == pytest.approx(0, abs=1e-5)
    assert alone.after["eval/loss"] < 0.5
    assert alone.after["eval/accuracy"] > 0.8
    assert alone.after["eval/margin"] == pytest.approx(
        alone.after["eval/reward_chosen"] - alone.after["eval/reward_rejected"], abs=1e-6
    )
    assert alone.after["eval/pairs"] == 8


def test_adapters_that_add_nothing_yet_are_the_reference(folder, alone):
    lora = trained(folder, config(lora=LoraConfig(rank=2)))
    assert torch.equal(lora.reference, alone.reference)
    assert lora.metrics[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lora.metrics[-1]["train/loss"] < lora.metrics[0]["train/loss"]
