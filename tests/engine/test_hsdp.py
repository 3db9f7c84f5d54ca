"""Copies that two ranks share each (`engine.shard_ranks`), on four ranks: the training of plain torch in one."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig
from rlhf.engine.engine import build_engine
from rlhf.engine.fsdp_units import local_rows
from rlhf.engine.sharding import copies_of
from rlhf.runtime import dist
from tests.engine import plain, scenarios, tiny
from tests.engine.checkpoint.resharding_runs import load_and_go_on, train_and_save
from tests.engine.test_parity import assert_same_curves, assert_same_weights
from tests.ranks import run_on_ranks

HSDP = {"shard_ranks": 2}
NVME = {"buffer_size": 11_264}
STORES = {
    "on the device": {},
    "small ones whole": {"persistence_threshold": 100},
    "all on the host": {"offload_optimizer": "cpu", "offload_param": "cpu"},
    "all on disk": {"offload_optimizer": "nvme", "offload_param": "nvme", **NVME},
    "not overlapped": {"overlap_comm": False},
}
SMALL = {"moments": "int8", "master_weights": "split", "grad_accum_dtype": "bf16", "precision": "bf16"}
PAIRS = {"to all": ({"stage": 3, **HSDP}, {"stage": 3}), "from all": ({"stage": 1}, {"stage": 3, **HSDP})}


def everything(root):
    """What each of four ranks does."""
    torch.set_num_threads(1)
    world, disk = dist.start("cpu"), {"nvme_path": root}
    found = {}
    for stage in (1, 2, 3):
        engine = tiny.engine(world, stage, **HSDP)
        found["parity", stage] = scenarios.curve(engine, 6), scenarios.weights(engine)
        if stage == 3:
            engine._sharding.release()
            shards = [p for p in engine.module.parameters() if isinstance(p, DTensor)]
            found["rows"] = [(len(p), local_rows(p), len(p.to_local())) for p in shards]
    for name, settings in STORES.items():
        engine = tiny.engine(world, 3, **HSDP, **settings, **disk)
        found[name] = scenarios.curve(engine, 4), scenarios.weights(engine)
        engine.close()
    for name, shared in (("copies", HSDP), ("one copy", {})):
        for stage in (1, 3):
            settings = {"precision": "bf16", "optimizer": tiny.optimizer_config(max_grad_norm=0)} | shared
            engine = tiny.engine(world, stage, **settings)
            found["bf16", name, stage] = scenarios.curve(engine, 1), scenarios.first_gradient(engine)
        engine = tiny.engine(world, 3, **shared, **SMALL)
        found["small", name] = scenarios.curve(engine, 4)
    adapted = tiny.engine(world, 3, learns=scenarios.is_adapter, **HSDP)
    found["adapters"] = scenarios.curve(adapted, 3), scenarios.weights(adapted)
    for name, (saves, loads) in PAIRS.items():
        expected = train_and_save(tiny.engine(world, **saves), f"{root}/{name}")
        found[name] = expected, load_and_go_on(tiny.engine(world, **loads), f"{root}/{name}")
    found["follow"] = [followed(world, *pair) for pair in (({}, HSDP), (HSDP, {}), (HSDP, HSDP))]
    found["generation"] = generated(world)
    return found


def followed(world, trained, frozen):
    """Masters of an actor after a step, the reference before, and after it has moved half of the way."""
    actor = tiny.engine(world, 3, **trained)
    reference = build_engine(tiny.spec(), config=EngineConfig(zero_stage=3, precision="fp32", **frozen), world=world)
    tiny.train_step(actor, 0)
    before = scenarios.weights(reference)
    reference.follow(actor, share=0.5)
    return scenarios.weights(actor, masters=True), before, scenarios.weights(reference)


def generated(world):
    """Logits inside `generating`, of as many forwards as the rank has a number, and of the plain model."""
    engine, ids = tiny.engine(world, 3, **HSDP), tiny.batch(50)[0]
    with engine.generating() as model:
        logits = [model(ids) for _ in range(world.rank + 1)][-1]
    return logits, tiny.reference()(ids).detach(), scenarios.curve(engine, 2)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_ranks(everything, 4, str(tmp_path_factory.mktemp("hsdp")))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_six_steps_are_those_of_plain_torch(ranks, stage):
    model = tiny.reference()
    expected = plain.train(model, 6)
    for rank in ranks:
        found, weights = rank["parity", stage]
        assert_same_curves(found, expected)
        assert_same_weights(weights, model, rtol=0, atol=2e-5)


def test_two_ranks_share_a_copy(ranks):
    for number, rank in enumerate(ranks):
        for total, rows, held in rank["rows"]:
            half = -(-total // 2)
            assert (rows, held) == ((range(half), half) if number % 2 == 0 else (range(half, total), total - half))


@pytest.mark.parametrize("name", STORES)
def test_wherever_state_and_weights_are_kept(ranks, name):
    model = tiny.reference()
    expected = plain.train(model, 4)
    for rank in ranks:
        found, weights = rank[name]
        assert_same_curves(found, expected)
        assert_same_weights(weights, model, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_of_bf16_weights_are_summed_in_fp32_over_copies_too(ranks, stage):
    for rank in ranks:
        (curve, gradient), (alone, expected) = (rank["bf16", name, stage] for name in ("copies", "one copy"))
        assert curve[0] == pytest.approx(alone[0], rel=1e-5)
        for name, tensor in gradient.items():  # a sum that was rounded to bf16 would differ by up to 2^-9 of it
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_narrow_state_learns_alike(ranks):
    for rank in ranks:
        losses = [[loss for loss, _ in rank["small", name]] for name in ("copies", "one copy")]
        assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_adapters_learn_as_in_plain_torch(ranks):
    model = tiny.reference()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scenarios.is_adapter(name))
    expected = plain.train(model, 3)
    for rank in ranks:
        assert_same_curves(rank["adapters"][0], expected)
        assert_same_weights(rank["adapters"][1], model)


@pytest.mark.parametrize("name", PAIRS)
def test_a_checkpoint_goes_on_with_and_without_copies(ranks, name):
    for rank in ranks:
        (curve, weights), (rest, again) = rank[name]
        assert_same_curves(rest, curve[-len(rest) :])
        for key, tensor in again.items():
            torch.testing.assert_close(tensor, weights[key], rtol=0, atol=1e-5)


def test_a_reference_follows_an_actor_that_is_shared_otherwise(ranks):
    for rank in ranks:
        for masters, before, after in rank["follow"]:
            for name, tensor in after.items():
                torch.testing.assert_close(tensor, (before[name] + masters[name]) / 2, rtol=0, atol=1e-6)


def test_ranks_decode_without_each_other_and_learn_afterwards(ranks):
    expected = plain.train(tiny.reference(), 2)
    for rank in ranks:
        logits, of_plain, points = rank["generation"]
        torch.testing.assert_close(logits, of_plain, rtol=1e-5, atol=1e-5)
        assert_same_curves(points, expected)


def test_ranks_that_cannot_be_divided_are_refused():
    config = EngineConfig(zero_stage=3, shard_ranks=2)
    assert [copies_of(config, ranks=ranks) for ranks in (1, 2, 4)] == [1, 1, 2]
    with pytest.raises(ValueError, match=r"engine.shard_ranks=2: found 3 ranks, expected a multiple of 2"):
        copies_of(config, ranks=3)
    for wrong in ({"zero_stage": 0, "shard_ranks": 2}, {"zero_stage": 3, "shard_ranks": 1}):
        with pytest.raises(ValueError, match="expected 0, or two ranks or more at ZeRO 1, 2 or 3"):
            EngineConfig(**wrong)
