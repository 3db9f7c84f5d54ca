"""Copies that a device makes as late as it may: nobody reads what has not arrived, or reuses what has not left."""

import random

import pytest
import torch
from torch import nn

from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adam_kernel import AdamKernel
from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.grad_accumulation import HostGradAccumulator, PinnedStaging
from rlhf.engine.offload.optimizer_state import InMemoryStateStore, ParameterShard, Update
from rlhf.engine.offload.optimizer_state_nvme import NvmeResources, NvmeStateStore
from rlhf.engine.offload.tiles import lay_out_tiles
from rlhf.engine.offload.transfers import BufferPool, CopyStream
from rlhf.engine.offload.weight_stores import HostWeights, NvmeWeights, file_bytes
from rlhf.engine.offload.working_weights import StagedWeights
from rlhf.engine.state_format import StateFormat
from tests.engine.late_device import DEVICE, LateDevice

CPU = torch.device("cpu")
SIZES = [64, 20_032, 0, 9_000, 4096]  # bytes of units: smaller and larger than a buffer, none at all


@pytest.fixture
def late(monkeypatch):
    with LateDevice(monkeypatch) as device:
        yield device


def test_the_device_is_late(late):
    stream, into = CopyStream(DEVICE), torch.zeros(3)
    copied = stream.copy(into, torch.ones(3))
    assert not into.any()
    copied.wait()
    assert into.all()


def gradients(count, step, dtype):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(1000, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_on_the_host_are_complete_when_they_are_taken(late, monkeypatch, dtype):
    monkeypatch.setattr("rlhf.engine.offload.grad_accumulation._STAGED", 64)
    sums = HostGradAccumulator(PinnedStaging(DEVICE, pin=False))
    for step, count in enumerate((1, 2, 5, 1, 3)):
        for name in ("v", "w"):
            for gradient in gradients(count, step, dtype):
                sums.add(name, gradient)
        if step == 2:  # one that is skipped
            sums.clear()
            continue
        expected = sum(gradient.float() for gradient in gradients(count, step, dtype))
        squares = sums.squared_norms()
        for name, total in sums.take().items():
            assert torch.equal(total.float(), expected)
            assert squares[name].item() == pytest.approx(expected.double().square().sum().item(), rel=1e-6)
    sums.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_there_once_they_were_flushed(late, monkeypatch, dtype):
    monkeypatch.setattr("rlhf.engine.offload.working_weights._STAGED", 64)
    parameter = nn.Parameter(torch.zeros(30, 40, dtype=dtype))
    weights = StagedWeights([{"w": parameter}], DEVICE, pin=False)
    for step in range(3):
        (values,) = gradients(1, step, torch.float32)
        weights.write("w", 128, values=values)
        weights.flush()
        assert torch.equal(parameter.detach().flatten()[128:1128], values.to(dtype))
    weights.close()


def test_split_masters_are_put_together_from_weights_that_have_arrived(late, monkeypatch):
    """Split and whole masters of the same weights on a device, in more chunks than there are buffers."""
    monkeypatch.setattr("rlhf.engine.offload.working_weights._STAGED", 512)
    start, found = torch.randn(90, 100, generator=torch.Generator().manual_seed(9)), []
    for is_split in (False, True):
        parameter = nn.Parameter(torch.zeros(90, 100, dtype=torch.bfloat16))
        weights = StagedWeights([{"w": parameter}], DEVICE, pin=False)
        store = InMemoryStateStore(
            [ParameterShard("w", parameter.shape, True)],
            HostGradAccumulator(PinnedStaging(DEVICE, pin=False)),
            kernel=AdamKernel(OptimizerConfig(lr=1e-2, weight_decay=0.1), CPU, limit=1024),
            weights=weights,
            format_=StateFormat(is_split=is_split),
        )
        store.write("w", "weight", shard=start)
        for step in range(3):
            (gradient,) = gradients(1, step, torch.bfloat16)
            store.gradients.add("w", gradient.repeat(9))
            store.step(Update({"w"}, 1e-2, 1.0))
            weights.flush()
        found.append((store.read("w", "weight").clone(), parameter.detach().clone()))
        store.close()
        weights.close()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.fixture(params=["host", 1, 3])
def store(request, late, tmp_path):
    if request.param == "host":
        made = HostWeights(SIZES, device=DEVICE, pin=False)
    else:
        pool = BufferPool(request.param, nbytes=8192)
        file = DirectFile(tmp_path, nbytes=file_bytes(SIZES), pool=pool, label="weights")
        made = NvmeWeights(SIZES, file=file, device=DEVICE)
    yield made
    made.close()


def test_units_that_are_fetched_have_arrived_and_are_those_written_last(store):
    expected = [bytearray(size) for size in SIZES]
    for unit, size in enumerate(SIZES):
        store.write(unit, 0, values=torch.zeros(size, dtype=torch.uint8))
    draw = random.Random(5)
    for _ in range(200):
        unit = draw.choice([0, 1, 3, 4])
        if draw.random() < 0.3:
            values = draw.randbytes(SIZES[unit])
            store.write(unit, 0, values=torch.frombuffer(bytearray(values), dtype=torch.uint8))
            expected[unit][:] = values
            continue
        following = [other for other in draw.sample([0, 1, 3, 4], 3) if other != unit]
        fetched = store.fetch(unit, following)
        assert torch.equal(fetched[: SIZES[unit]], torch.frombuffer(expected[unit], dtype=torch.uint8))
        store.release()


def test_a_unit_that_was_prefetched_and_is_written_is_fetched_again(store):
    for unit in (0, 1):
        store.write(unit, 0, values=torch.zeros(SIZES[unit], dtype=torch.uint8))
    store.fetch(0, [1])
    store._stream.synchronize()  # the device may as well be early
    store.write(1, 0, values=torch.ones(SIZES[1], dtype=torch.uint8))
    assert store.fetch(1, [])[: SIZES[1]].all()


def test_a_buffer_is_read_into_again_only_when_the_device_has_its_bytes(late, monkeypatch, tmp_path):
    monkeypatch.setattr(CopyStream, "hand_over", lambda *_: None)  # what computes may be later than the host
    file = DirectFile(tmp_path, nbytes=40_960, pool=BufferPool(2, nbytes=8192), label="weights")
    store, values = NvmeWeights([40_960], file=file, device=DEVICE), torch.randint(256, (40_960,), dtype=torch.uint8)
    store.write(0, 0, values=values)
    fetched = store.fetch(0, [])
    store._stream.synchronize()
    assert torch.equal(fetched, values)
    store.close()


def nvme_store(folder, weights, pool):
    shards = [ParameterShard("v", torch.Size((5000,)), False), ParameterShard("w", torch.Size((70, 100)), True)]
    tiles = lay_out_tiles(shards, 2048, format_=StateFormat())
    resources = NvmeResources(
        file=DirectFile(folder, nbytes=sum(tile.nbytes for tile in tiles), pool=pool, label="states", device=DEVICE),
        tiles=tiles,
        stream=CopyStream(DEVICE),
        reads_ahead=True,
        writes_behind=True,
    )
    kernel = AdamKernel(OptimizerConfig(lr=1e-2, weight_decay=0.1), CPU)
    return NvmeStateStore(shards, resources, kernel=kernel, weights=weights, format_=StateFormat()), shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_gradients_reach_the_disk_whole_and_update_weights_as_in_plain_torch(late, tmp_path, count, dtype):
    parameters = {"v": nn.Parameter(torch.ones(5000)), "w": nn.Parameter(torch.ones(70, 100))}
    weights = StagedWeights([parameters], DEVICE, pin=False)
    store, shards = nvme_store(tmp_path, weights, BufferPool(count, nbytes=2048 * 16))
    plain = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    groups = [{"params": [plain["v"]], "weight_decay": 0.0}, {"params": [plain["w"]], "weight_decay": 0.1}]
    adam = torch.optim.AdamW(
        groups, lr=1e-2, betas=tuple(OptimizerConfig(lr=1e-2).betas), eps=OptimizerConfig(lr=1e-2).eps
    )
    for shard in shards:
        store.write(shard.name, "weight", shard=torch.ones(shard.shape))
    for step in range(3):
        for name, parameter in plain.items():
            parameter.grad = torch.zeros(parameter.shape)
            for micro in range(step + 1):
                gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(micro)).to(dtype)
                parameter.grad += gradient
                store.gradients.add(name, gradient.flatten())
        store.step(Update(plain.keys(), 1e-2, 1.0))
        weights.flush()
        adam.step()
        assert store.failure is None
        for name, parameter in plain.items():
            torch.testing.assert_close(parameters[name], parameter, rtol=1e-5, atol=1e-6)
    store.close()
    weights.close()


def test_closing_waits_for_gradients_on_their_way_to_page_locked_memory(late, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise RuntimeError("no space")

    pool = BufferPool(3, nbytes=2048 * 16)
    store, _ = nvme_store(tmp_path, None, pool)
    monkeypatch.setattr(DirectFile, "write", refuse)
    store.gradients.add("v", torch.ones(5000))
    assert str(store.failure) == "no space"
    arrived = pool._buffers[0][: 4 * 2048].view(torch.float32)  # a copy that no write waits for
    assert not arrived.any()
    store.close()
    assert arrived.all()

    sums = HostGradAccumulator(PinnedStaging(DEVICE, pin=False))
    sums.add("w", torch.ones(1000))
    arrived = sums._sums["w"].total.zero_()
    sums.close()
    assert arrived.all()
