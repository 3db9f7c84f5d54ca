"""Wherever gradients and optimizer state are kept, training gives the same bits, and the numbers of plain torch."""

import threading

import pytest
import torch

from rlhf.runtime import dist
from tests.engine import plain, tiny
from tests.engine.offload import optimizer_runs

RANKS = (1, 2, 4)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_store_gives_the_bits_of_the_device(on_ranks, ranks):
    for rank in on_ranks(ranks):
        found, _ = rank["offload_optimizer"]
        assert len(found) == sum(len(setting.stores) for setting in optimizer_runs.SETTINGS[ranks])
        assert not any(found.values()), found


def plain_curve(model, steps):
    return plain.train(model, steps, rate=lambda step: 3e-3, batch=lambda step: tiny.batch(step % 10))


@pytest.mark.parametrize(("ranks", "kind"), [(1, "plain"), (2, "plain"), (2, "replicas")])
def test_twenty_steps_are_those_of_plain_torch(on_ranks, ranks, kind):
    model = tiny.reference()
    expected = plain_curve(model, optimizer_runs.STEPS)
    for rank in on_ranks(ranks):
        ((points, weights),) = [
            curve
            for setting, curve in rank["offload_optimizer"][1].items()
            if (setting.kind, setting.precision) == (kind, "fp32")
        ]
        assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        assert [norm for _, norm in points] == pytest.approx([norm for _, norm in expected], rel=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("moment", ["micro-batch", "step"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failing_disk_of_one_rank_stops_all_with_a_sentence(on_ranks, ranks, moment):
    *others, broken = [rank["failing_disks"][moment] for rank in on_ranks(ranks)]
    assert "optimizer" in broken
    assert "something else cut the file short" in broken
    assert all("1 other rank" in message for message in others)


def run(steps=6, **options):
    torch.set_num_threads(1)
    with optimizer_runs.memory(own="offload_optimizer" in options):
        return optimizer_runs.train(dist.start("cpu"), steps=steps, zero_stage=1, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_micro_batch_needs_no_sum_and_gives_the_same_everywhere(precision):
    expected = run(precision=precision, accumulation=1)
    for store in optimizer_runs.STORES.values():
        assert optimizer_runs.differences(run(precision=precision, accumulation=1, **store), expected) == []


def test_bf16_moments_are_the_same_everywhere_and_close_to_fp32():
    expected, exact = run(moments="bf16"), run()
    for store in optimizer_runs.STORES.values():
        assert optimizer_runs.differences(run(moments="bf16", **store), expected) == []
    losses, exact_losses = ([loss for loss, _ in points] for points in (expected[0], exact[0]))
    assert losses != exact_losses
    assert losses == pytest.approx(exact_losses, rel=1e-2)
    moments = [shard for (_, part), shard in expected[1].items() if part != "weight"]
    assert all(torch.equal(shard, shard.bfloat16().float()) for shard in moments)


LARGER = {"buffer_size": 11_264}  # a tile of moments in 8 bits has a page of scales
SMALL = {
    "8 bits": {"moments": "int8"},
    "split": {"master_weights": "split"},
    "bf16 sums": {"grad_accum_dtype": "bf16"},
    "all": {"moments": "int8", "master_weights": "split", "grad_accum_dtype": "bf16"},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", SMALL)
def test_fewer_bytes_are_the_same_bits_in_every_store(kind, accumulation):
    options = {"accumulation": accumulation, **SMALL[kind]}
    expected = run(**options)
    for store in optimizer_runs.STORES.values():
        assert optimizer_runs.differences(run(**options, **store | LARGER), expected) == []
    exact = run(accumulation=accumulation)
    losses, exact_losses = ([loss for loss, _ in points] for points in (expected[0], exact[0]))
    assert losses == pytest.approx(exact_losses, rel=2e-2)


@pytest.mark.parametrize("store", [{}, optimizer_runs.STORES["cpu"], optimizer_runs.STORES["nvme"]])
def test_split_masters_train_as_whole_ones(store):
    """But for ties, one in 131072: none in so few roundings, on processors whose products are rounded differently."""
    whole, split = run(steps=3), run(steps=3, master_weights="split", **store)
    assert [loss for loss, _ in split[0]] == pytest.approx([loss for loss, _ in whole[0]], rel=1e-4)
    equal = [torch.isclose(split[1][key], master, rtol=1e-4, atol=1e-6).float() for key, master in whole[1].items()]
    assert torch.cat([found.flatten() for found in equal]).mean() > 0.999


def test_a_share_of_the_elements_stays_on_the_device():
    engine = tiny.engine(dist.start("cpu"), 1, offload_optimizer="nvme", nvme_path="/dev/shm", optimizer_share=0.4)
    groups, stores = engine._updater.optimizer.groups, engine._updater.optimizer.stores
    away = [name for store in stores if not store.in_memory for name in store.shards]
    sizes = [sum(parameter.numel() for parameter in group.values()) for group in groups]
    count = next(k for k in range(len(groups) + 1) if [name for group in groups[:k] for name in group] == away)
    assert 0 < count < len(groups), "the first groups leave, the last stay"
    assert sum(sizes[: count - 1]) < 0.4 * sum(sizes) <= sum(sizes[:count])
    engine._updater.optimizer.close()


def test_a_closed_engine_leaves_no_thread_behind():
    before = set(threading.enumerate())
    with optimizer_runs.memory(own=True):
        engine = tiny.engine(dist.start("cpu"), 1, offload_optimizer="cpu")
        tiny.train_step(engine, 0)
        started = " ".join(thread.name for thread in set(threading.enumerate()) - before)
        assert "gradient sums" in started
        engine.close()
    assert set(threading.enumerate()) <= before
