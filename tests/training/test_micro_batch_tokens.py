"""SFT in micro-batches by tokens, beside plain PyTorch that takes one row after the other, without padding."""

from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from data.loader import TrainLoader, collate_demonstrations, shuffled_rows
from data.samples import Demonstration
from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig, SFTConfig
from rlhf.engine.engine import build_engine
from rlhf.models.causal_lm import causal_lm
from rlhf.runtime import dist
from rlhf.training.supervised_step import objective_of, take_step
from tests.models import tiny
from tests.ranks import run_on_ranks

STEPS, BATCH, SEED, LONGEST = 4, 12, 5, 40
RATE, BETAS = 3e-3, [0.9, 0.95]


def samples():
    """Rows of 2 to 40 tokens, of which the last ones are learnt."""
    draw = np.random.default_rng(3)
    lengths = draw.integers(2, LONGEST + 1, 48)
    rows = [draw.integers(1, 100, length).astype(np.int32) for length in lengths]
    return [Demonstration(ids, np.arange(len(ids)) >= draw.integers(1, len(ids))) for ids in rows]


def settings(**sizes):
    optimizer = OptimizerConfig(lr=RATE, betas=BETAS, max_grad_norm=0.5, schedule="constant")
    return SFTConfig(
        engine=EngineConfig(zero_stage=0),
        optimizer=optimizer,
        lora=LoraConfig(rank=0),
        seed=SEED,
        init_from="-",
        global_batch_size=BATCH,
        max_prompt_tokens=LONGEST // 2,
        max_response_tokens=LONGEST // 2,
        **sizes,
    )


def trained(folder, sizes, engine):
    """Losses, gradient norms, the weights after all steps, and the shapes of this rank's micro-batches by step."""
    world, config = dist.start("cpu"), settings(**sizes)
    loader = TrainLoader(
        samples(),
        partial(collate_demonstrations, pad_id=tiny.PAD),
        global_batch_size=BATCH,
        limit=config.micro_batch_limit,
        rank=world.rank,
        ranks=world.size,
        seed=SEED,
        steps=STEPS,
    )
    made = build_engine(
        causal_lm(folder),
        config=EngineConfig(precision="fp32", **engine),
        world=world,
        optimizer=config.optimizer,
        total_steps=STEPS,
    )
    with closing(made) as policy:
        steps = list(loader)
        metrics = [take_step(policy, batches, objective=objective_of(config)) for batches in steps]
        weights = {name: tensor.clone() for name, tensor in policy.full_tensors()}
    shapes = [[tuple(batch.input_ids.shape) for batch in batches] for batches in steps]
    return [(step["train/loss"], step["train/grad_norm"]) for step in metrics], weights, shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(folder):
    """Loss and gradient norm of each step, and the weights, by transformers and torch alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=tuple(BETAS), eps=1e-8, weight_decay=0.0)
    rows, curve = samples(), []
    for step in range(STEPS):
        mine = [rows[row] for row in shuffled_rows(len(rows), SEED, start=step * BATCH, count=BATCH)]
        count, total = sum(int(row.target_mask[1:].sum()) for row in mine), 0.0
        optimizer.zero_grad()
        for row in mine:
            ids = torch.from_numpy(row.input_ids).long()
            losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            loss = losses[torch.from_numpy(row.target_mask[1:])].sum() / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        curve.append((total, norm.item()))
    return curve, dict(model.named_parameters())


SIZES = {"micro_batch_size": 12, "micro_batch_tokens": 64}


@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        (1, {"zero_stage": 0}),
        (1, {"zero_stage": 0, "padding_free": False}),
        (2, {"zero_stage": 0}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2, "offload_optimizer": "cpu"}),
        (2, {"zero_stage": 3}),
        (2, {"zero_stage": 3, "activation_checkpointing": True}),
    ],
)
def test_steps_are_those_of_rows_one_after_the_other(folder, expected, ranks, engine):
    found = run_on_ranks(trained, ranks, folder, SIZES, engine)
    shapes = [shapes for _, _, shapes in found]
    assert len({len(step) for step in shapes[0]}) > 1 or ranks > 1  # steps differ in their number of micro-batches
    assert all(list(map(len, rank)) == list(map(len, shapes[0])) for rank in shapes)
    assert all(rows * width <= 64 for rank in shapes for step in rank for rows, width in step)
    for curve, weights, _ in found:
        assert np.array(curve) == pytest.approx(np.array(expected[0]), rel=1e-5)
        for name, value in expected[1].items():
            torch.testing.assert_close(weights[name], value.detach(), rtol=1e-4, atol=2e-5, msg=name)


def test_rows_longer_than_the_limit_are_alone(folder, expected):
    curve, _, shapes = trained(folder, {"micro_batch_size": 12, "micro_batch_tokens": 20}, {"zero_stage": 0})
    assert max(width for step in shapes for _, width in step) > 20
    assert all(rows == 1 or rows * width <= 20 for step in shapes for rows, width in step)
    assert np.array(curve) == pytest.approx(np.array(expected[0]), rel=1e-5)


@pytest.mark.parametrize(("size", "tokens"), [(4, 160), (4, 400), (1, 40)])
def test_a_limit_that_is_never_reached_is_refused(size, tokens):
    with pytest.raises(
        ValueError, match=rf"micro_batch_tokens={tokens}: micro_batch_size={size} sequences of at most 40"
    ):
        settings(micro_batch_size=size, micro_batch_tokens=tokens)
    settings(micro_batch_size=size, micro_batch_tokens=size * 40 - 1)
