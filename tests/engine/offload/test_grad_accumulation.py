"""Gradient sums on the host, in more pieces than there are buffers."""

import pytest
import torch

from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator, HostGradAccumulator, PinnedStaging

CPU = torch.device("cpu")


@pytest.fixture
def host(monkeypatch):
    """`host(sides)`: sums that are staged 64 elements at a time."""
    monkeypatch.setattr("rlhf.engine.offload.grad_accumulation._STAGED", 64)
    staging = PinnedStaging(CPU, pin=False)
    return lambda sides=1: HostGradAccumulator(staging, sides=sides)


def gradients(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1000, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_host_and_resident_sums_are_the_same(host, dtype, count):
    there, here = host(), DeviceGradAccumulator()
    expected = torch.zeros(1000)
    for gradient in gradients(count, dtype):
        expected += gradient
        there.add("w", gradient.clone())
        here.add("w", gradient.clone())
    assert there.squared_norms()["w"] == here.squared_norms()["w"]
    (ours,), (resident,) = there.take().values(), here.take().values()
    assert ours.dtype == resident.dtype == (dtype if count == 1 else torch.float32)
    assert torch.equal(ours, resident)
    assert torch.equal(ours.float(), expected)


def test_a_gradient_may_be_overwritten_as_soon_as_it_was_added(host):
    sums = host()
    expected = torch.zeros(1000)
    for gradient in gradients(4, torch.float32):
        expected += gradient
        sums.add("w", gradient)
        gradient.fill_(torch.nan)
    assert torch.equal(sums.take()["w"], expected)


def test_with_two_sides_sums_that_were_taken_stay_while_others_come(host):
    sums, taken = host(2), []
    steps = [gradients(2, torch.float32, seed) for seed in range(3)]
    for first, second in steps:
        sums.add("w", first)
        sums.add("w", second)
        taken.append(sums.take()["w"])
        for old, (a, b) in zip(taken[-2:], steps[len(taken[:-2]) :], strict=False):
            assert torch.equal(old, a + b)
