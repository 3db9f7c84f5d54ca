"""A frozen engine that follows one in training: the mix by hand, wherever the weights of both are kept."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from rlhf.config.engine_config import EngineConfig
from rlhf.engine.checkpoint.checkpoints import Checkpoints
from rlhf.engine.engine import build_engine
from rlhf.runtime import dist
from rlhf.runtime.dist import World
from tests.engine import scenarios, tiny
from tests.ranks import run_on_ranks

SHARE = 0.6
ACTORS = {
    "zero0": {"stage": 0},
    "zero1 bf16": {"stage": 1, "precision": "bf16"},
    "zero2 nvme": {"stage": 2, "offload_optimizer": "nvme"},
    "zero3 weights on the host": {"stage": 3, "offload_param": "cpu", "precision": "bf16"},
}
REFERENCES = {
    "zero0": {"zero_stage": 0},
    "zero0 bf16": {"zero_stage": 0, "precision": "bf16"},
    "zero3": {"zero_stage": 3, "persistence_threshold": 40},
    "zero3 bf16 on the host": {"zero_stage": 3, "offload_param": "cpu", "precision": "bf16"},
    "zero3 on disk": {"zero_stage": 3, "offload_param": "nvme"},
}


def frozen(world, *, precision="fp32", **config):
    return build_engine(tiny.spec(), config=EngineConfig(precision=precision, **config), world=world)


def followed(world, actor, reference):
    """Masters of the actor, and the reference before and after, twice; with what it computes then."""
    actor = tiny.engine(world, **actor)
    reference = frozen(world, **reference)
    ids, found = tiny.batch(50)[0], []
    for step in range(2):
        with reference.evaluating() as model:
            model(ids)  # leaves gathered weights, or prefetched ones, that the update outdates
        tiny.train_step(actor, step)
        before = scenarios.weights(reference)
        reference.follow(actor, share=SHARE)
        with reference.evaluating() as model:
            logits = model(ids).clone()
        found.append((scenarios.weights(actor, masters=True), before, scenarios.weights(reference), logits))
    actor.close()
    reference.close()
    return found


def on_this_rank(folder, ranks):
    world = dist.start("cpu") if ranks > 1 else World.alone()
    disk = {"nvme_path": folder, "buffer_size": 8192}
    pairs = itertools.product(ACTORS, REFERENCES)
    return {pair: followed(world, ACTORS[pair[0]] | disk, REFERENCES[pair[1]] | disk) for pair in pairs}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_reference_is_the_mix_by_hand_however_both_are_sharded(ranks, tmp_path):
    arguments = (str(tmp_path), ranks)
    found = run_on_ranks(on_this_rank, ranks, *arguments) if ranks > 1 else [on_this_rank(*arguments)]
    ids = tiny.batch(50)[0]
    for rank in found:
        for pair, updates in rank.items():
            for masters, before, after, logits in updates:
                plain = tiny.reference()
                for name, weight in plain.named_parameters():
                    mixed = (SHARE * masters[name] + (1 - SHARE) * before[name].float()).to(before[name].dtype)
                    narrow = before[name].dtype is torch.bfloat16  # the mix by lerp may round the other way
                    bounds = {"rtol": 2**-7 if narrow else 1e-6, "atol": 1e-7}
                    torch.testing.assert_close(after[name], mixed, **bounds, msg=f"{pair} {name}")
                    weight.data = after[name].float()
                    assert narrow or not torch.equal(after[name], before[name]), (pair, name)
                if logits.dtype is torch.float32:
                    torch.testing.assert_close(logits, plain(ids), rtol=1e-4, atol=1e-5, msg=str(pair))


def test_a_share_of_1_copies_and_a_worked_number():
    actor, reference = tiny.engine(World.alone(), 0), frozen(World.alone(), zero_stage=0)
    name = "llama.model.norm.weight"  # 1 everywhere at first
    weights, own = (engine.module.get_parameter(name).data for engine in (actor, reference))
    weights.fill_(3.0)
    reference.follow(actor, share=0.25)
    assert set(own.tolist()) == {1.5}  # 0.25 x 3 + 0.75 x 1
    reference.follow(actor, share=0.25)
    assert set(own.tolist()) == {1.875}  # 0.25 x 3 + 0.75 x 1.5
    weights.fill_(0.1)
    reference.follow(actor, share=1.0)
    assert torch.equal(own, weights)


@pytest.mark.parametrize("kind", ["zero0", "zero3 bf16 on the host", "zero3 on disk"])
def test_it_goes_into_a_checkpoint_and_back(kind, tmp_path):
    settings = REFERENCES[kind] | {"nvme_path": str(tmp_path), "buffer_size": 8192}
    reference, actor = frozen(World.alone(), **settings), tiny.engine(World.alone(), 0)
    tiny.train_step(actor, 0)
    reference.follow(actor, share=SHARE)
    stored = {tensor.key: tensor for tensor in reference.checkpoint_tensors()}
    assert {tensor.in_memory for tensor in stored.values()} == {kind != "zero3 on disk"}
    again = frozen(World.alone(), **settings)
    for tensor in again.checkpoint_tensors():
        tensor.write(stored[tensor.key].read())
    expected = scenarios.weights(reference)
    for name, weight in scenarios.weights(again).items():
        assert torch.equal(weight, expected[name]), name
    reference.close()
    again.close()


def test_the_mix_is_trls():
    golden = json.loads((Path(__file__).parents[1] / "golden/reference_update.json").read_text())
    actor, reference = tiny.engine(World.alone(), 0), frozen(World.alone(), zero_stage=0)
    weights, own = (engine.module.get_parameter("llama.model.norm.weight").data for engine in (actor, reference))
    weights[:6] = torch.tensor(golden["actor"])
    for share, after in golden["after"].items():
        own[:6] = torch.tensor(golden["reference"])
        reference.follow(actor, share=float(share))
        torch.testing.assert_close(own[:6], torch.tensor(after), rtol=1e-6, atol=1e-7)


def save_on_this_rank(folder):
    """A checkpoint of a bf16 reference that two ranks share, and its weights."""
    world = dist.start("cpu")
    actor, reference = tiny.engine(world, 2), frozen(world, zero_stage=3, precision="bf16")
    tiny.train_step(actor, 0)
    reference.follow(actor, share=SHARE)
    checkpoints = Checkpoints(Path(folder), world, keep=1, asynchronous=True)
    checkpoints.save(1, reference.checkpoint_tensors(), state={}, protected=set())
    stored = scenarios.weights(reference)
    reference.follow(actor, share=1.0)  # while a thread may still write the copy that was taken
    checkpoints.finish_save()
    return stored


def test_a_checkpoint_of_two_ranks_is_resumed_by_one(tmp_path):
    stored = run_on_ranks(save_on_this_rank, 2, str(tmp_path))[0]
    reference = frozen(World.alone(), zero_stage=0, precision="bf16")
    start = scenarios.weights(reference)
    checkpoints = Checkpoints(tmp_path, World.alone(), keep=1, asynchronous=False)
    checkpoints.load(checkpoints.newest(), reference.checkpoint_tensors())
    for name, weight in scenarios.weights(reference).items():
        assert torch.equal(weight, stored[name]), name
    assert not torch.equal(stored["llama.lm_head.weight"], start["llama.lm_head.weight"])
