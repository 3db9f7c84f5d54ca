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
@pytest.mark.parametrize("count", [1, 2, 5])
def test_host_and_device_sums_are_the_same(host, dtype, count):
    here = DeviceGradAccumulator()
    expected = torch.zeros(1000)
    for gradient in gradients(count, dtype):
        expected += gradient
        host.add("w", gradient.clone())
        here.add("w", gradient.clone())
    assert host.squared_norms()["w"] == here.squared_norms()["w"]
    (ours,), (on_device,) = host.take().values(), here.take().values()
    assert ours.dtype == on_device.dtype == (dtype if count == 1 else torch.float32)
    assert torch.equal(ours, on_device)
    assert torch.equal(ours.float(), expected)


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
