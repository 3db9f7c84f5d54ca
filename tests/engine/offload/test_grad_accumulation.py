"""Gradient sums on the host, in more pieces than there are buffers; squared norms against fp64, wherever cut."""

import pytest
import torch

from rlhf.engine.offload.grad_accumulation import (
    BLOCK,
    DeviceGradAccumulator,
    HostGradAccumulator,
    PinnedStaging,
    squared_norm,
)

CPU = torch.device("cpu")


@pytest.fixture
def host(monkeypatch):
    """Sums that are staged 64 elements at a time."""
    monkeypatch.setattr("rlhf.engine.offload.grad_accumulation._STAGED", 64)
    sums = HostGradAccumulator(PinnedStaging(CPU, pin=False))
    yield sums
    sums.close()


def gradients(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1000, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (5, 1), (1, 5, 1)])
def test_host_and_device_sums_are_the_same(host, dtype, counts):
    for step, count in enumerate(counts):
        here = DeviceGradAccumulator()
        expected = torch.zeros(1000)
        for gradient in gradients(count, dtype, seed=step):
            expected += gradient
            host.add("w", gradient.clone())
            here.add("w", gradient.clone())
        assert host.squared_norms()["w"] == here.squared_norms()["w"]
        (ours,), (on_device,) = host.take().values(), here.take().values()
        several = count > 1
        assert on_device.dtype == (torch.float32 if several else dtype)
        assert ours.dtype == (torch.float32 if several or max(counts[: step + 1]) > 1 else dtype)
        assert torch.equal(ours.float(), on_device.float())
        assert torch.equal(ours.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sums_in_bf16_are_rounded_each_time(monkeypatch, dtype, count):
    monkeypatch.setattr("rlhf.engine.offload.grad_accumulation._STAGED", 64)
    host = HostGradAccumulator(PinnedStaging(CPU, pin=False), torch.bfloat16)
    here = DeviceGradAccumulator(torch.bfloat16)
    first, *others = gradients(count, dtype)
    expected = first.bfloat16()
    for gradient in others:
        expected = (expected.float() + gradient.bfloat16().float()).bfloat16()
    for gradient in (first, *others):
        host.add("w", gradient.clone())
        here.add("w", gradient.clone())
    assert host.squared_norms()["w"] == here.squared_norms()["w"] == squared_norm(expected)
    assert torch.equal(host.take()["w"], expected)
    assert torch.equal(here.take()["w"], expected)
    host.close()


@pytest.mark.parametrize(
    ("sums", "dtype", "count", "width"),
    [
        (torch.float32, torch.bfloat16, 1, 2),
        (torch.float32, torch.bfloat16, 2, 4),
        (torch.float32, torch.float32, 3, 4),
        (torch.bfloat16, torch.float32, 3, 2),
    ],
)
def test_the_host_keeps_one_copy_of_a_sum(sums, dtype, count, width):
    host = HostGradAccumulator(PinnedStaging(CPU, pin=False), sums)
    for _ in range(2):
        for gradient in gradients(count, dtype):
            host.add("w", gradient)
        host.take()
        held = [thing for thing in vars(host).values() if isinstance(thing, dict)]
        assert sum(tensor.nbytes for found in held for tensor in found.values()) == width * 1000
    host.close()


def test_a_gradient_may_be_overwritten_as_soon_as_it_was_added(host):
    expected = torch.zeros(1000)
    for gradient in gradients(4, torch.float32):
        expected += gradient
        host.add("w", gradient)
        gradient.fill_(torch.nan)
    assert torch.equal(host.take()["w"], expected)


def test_memory_is_used_again_by_the_next_step(host):
    seen = set()
    for seed in range(3):
        first, second = gradients(2, torch.float32, seed)
        host.add("w", first)
        host.add("w", second)
        total = host.take()["w"]
        assert torch.equal(total, first + second)
        seen.add(total.data_ptr())
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 300 * BLOCK + 17])
def test_a_squared_norm_is_the_sum_of_squares(dtype, count):
    shard = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert squared_norm(shard).item() == pytest.approx(shard.double().square().sum().item(), rel=1e-6)


def test_cuts_at_blocks_change_nothing_that_fp32_can_see():
    shard = torch.randn(200 * BLOCK + 5, generator=torch.Generator().manual_seed(2))
    whole = squared_norm(shard).sqrt().float()
    for blocks in (1, 3, 64):
        parts = sum(squared_norm(part) for part in shard.split(blocks * BLOCK))
        assert parts.sqrt().float() == whole


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_norm_shows_what_is_not_finite(value):
    shard = torch.zeros(3 * BLOCK)
    shard[BLOCK + 3] = value
    assert not squared_norm(shard).isfinite()
