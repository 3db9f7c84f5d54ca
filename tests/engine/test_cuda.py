"""What only a CUDA device can show: every store trains there as plain torch does, and nothing comes too early.

`pytest -m gpu` on one device runs these. Gradients of one kind of kernel are the same bits wherever they go, so
stores whose steps the CPU takes agree bit for bit; the device's own AdamW and norms round otherwise.
Left out: several devices, and speed (`python -m benchmarks.zero offload`).
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf.engine.checkpoint.checkpoints import Checkpoints
from rlhf.engine.offload.transfers import BufferPool, CopyStream
from rlhf.engine.offload.weight_stores import HostWeights
from rlhf.engine.offload.working_weights import StagedWeights
from rlhf.runtime import dist
from tests.engine import plain, scenarios, tiny
from tests.engine.test_hybrid import assert_fixed_steps_follow_the_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 6
STATES = {"buffer_size": 8192}  # tiles of 2048 elements
WEIGHTS = {"buffer_size": 8192, "buffer_count": 3}
WHOLE = {  # working weights on the device, nothing wrapped
    "device": {},
    "cpu": {"offload_optimizer": "cpu"},
    "pageable": {"offload_optimizer": "cpu", "pin_memory": False},
    "nvme": {"offload_optimizer": "nvme", **STATES},
    "one buffer": {"offload_optimizer": "nvme", **STATES, "buffer_count": 1},
    "half": {"offload_optimizer": "cpu", "optimizer_share": 0.5},
}
OFFLOADED = {  # working weights elsewhere: FSDP2, on its own streams, fetches each unit
    "weights": {"offload_param": "cpu"},
    "cpu cpu": {"offload_param": "cpu", "offload_optimizer": "cpu"},
    "pageable cpu cpu": {"offload_param": "cpu", "offload_optimizer": "cpu", "pin_memory": False},
    "nvme nvme": {"offload_param": "nvme", "offload_optimizer": "nvme", **WEIGHTS},
    "both": {"offload_param": "nvme", "parameters_in_cpu": 12_000, "offload_optimizer": "cpu", **WEIGHTS},
}
SMALL = {"small kept": {"offload_param": "cpu", "offload_optimizer": "cpu", "persistence_threshold": 100}}
SAME_BITS = {
    "whole": [WHOLE[name] for name in ("cpu", "pageable", "nvme", "one buffer")],
    "offloaded": [OFFLOADED[name] for name in ("cpu cpu", "pageable cpu cpu", "nvme nvme", "both")],
}
CYCLES = 100_000_000  # of a kernel that only waits: some 50 ms, far longer than any copy here


@pytest.fixture(scope="module")
def world():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dist.stop()  # a group of CPU tests has no NCCL
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield dist.start("cuda")
    torch.use_deterministic_algorithms(False)
    dist.stop()


def engine(world, folder, **config):
    steady = tiny.optimizer_config(schedule="constant", warmup_steps=0)
    return tiny.engine(world, 3, nvme_path=str(folder), **{"optimizer": steady} | config)


def train(world, *, steps=STEPS, accumulation=2, **config):
    """Losses and norms, masters, and working weights."""
    with tempfile.TemporaryDirectory() as folder:
        trained = engine(world, folder, **config)
        points = scenarios.curve(trained, steps, accumulation=accumulation)
        found = points, scenarios.weights(trained, masters=True), scenarios.weights(trained)
        trained.close()
        assert not list(Path(folder).iterdir()), "files are removed"
    return found


def same(found, expected):
    assert found[0] == expected[0]
    for part in (1, 2):
        assert all(torch.equal(tensor, expected[part][name]) for name, tensor in found[part].items())


@pytest.fixture(scope="module")
def plain_run(world):
    """The same steps without an engine, on the device; close to those on the CPU."""
    model = tiny.reference().to(world.device)
    curve = plain.train(
        model, STEPS, rate=lambda step: 3e-3, batch=lambda step: [x.to(world.device) for x in tiny.batch(step)]
    )
    on_cpu = plain.train(tiny.reference(), STEPS, rate=lambda step: 3e-3)
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in on_cpu], rel=1e-4)
    return curve, {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("store", [*WHOLE, *OFFLOADED, *SMALL])
def test_every_store_trains_as_plain_torch(world, plain_run, store):
    points, masters, weights = train(world, precision="fp32", **(WHOLE | OFFLOADED | SMALL)[store])
    curve, expected = plain_run
    assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in curve], rel=1e-5)
    assert [norm for _, norm in points] == pytest.approx([norm for _, norm in curve], rel=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(masters[name], tensor, rtol=0, atol=1e-4)
        assert torch.equal(weights[name], masters[name])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("where", SAME_BITS)
def test_stores_that_step_on_the_cpu_agree_bit_for_bit(world, where, accumulation, precision):
    options = {"precision": precision, "accumulation": accumulation, "initial_scale_power": 6}
    expected, *others = (train(world, **options, **store) for store in SAME_BITS[where])
    for found in others:
        same(found, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_host_and_the_device_are_close_and_so_are_fp32_and_less(world, precision):
    exact, _, _ = train(world, precision="fp32")
    for store in (WHOLE["device"], WHOLE["cpu"], OFFLOADED["cpu cpu"]):
        points, masters, weights = train(world, precision=precision, initial_scale_power=6, **store)
        assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in exact], rel=2e-2)
        for name, tensor in masters.items():
            assert torch.equal(weights[name], tensor.to(weights[name].dtype))


def test_a_model_that_keeps_the_device_busy_trains_the_same_in_every_store(world):
    options = {"kind": {"scale": 32}, "precision": "bf16", "steps": 3, "buffer_size": 500_000}
    device, host, disk = (train(world, offload_optimizer=store, **options) for store in ("none", "cpu", "nvme"))
    same(disk, host)
    assert [loss for loss, _ in host[0]] == pytest.approx([loss for loss, _ in device[0]], rel=1e-2)
    fetched, read = (
        train(world, offload_optimizer=store, offload_param=store, **options, buffer_count=3)
        for store in ("cpu", "nvme")
    )
    same(read, fetched)
    assert [loss for loss, _ in fetched[0]] == pytest.approx([loss for loss, _ in device[0]], rel=1e-2)


@pytest.mark.parametrize("store", ["device", "cpu", "nvme", "cpu cpu"])
def test_an_overflow_in_fp16_halves_the_scale_and_changes_nothing_else(world, tmp_path, store):
    settings = {"precision": "fp16", "hysteresis": 1, "initial_scale_power": 6, **(WHOLE | OFFLOADED)[store]}
    trained = engine(world, tmp_path, **settings)
    tiny.train_step(trained, 0)
    before = scenarios.weights(trained, masters=True)
    assert tiny.train_step(trained, 1, spoil=True)[1].skipped
    assert trained.loss_scale.value == 32
    after = scenarios.weights(trained, masters=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not tiny.train_step(trained, 1)[1].skipped
    after = scenarios.weights(trained, masters=True)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    trained.close()


@pytest.mark.parametrize("store", ["device", "cpu", "cpu cpu", "nvme nvme"])
def test_generation_in_the_middle_of_training_changes_nothing(world, tmp_path, store):
    settings = {"precision": "bf16", **(WHOLE | OFFLOADED)[store]}
    busy, calm = (engine(world, tmp_path, **settings) for _ in range(2))
    ids = tiny.batch(50)[0].to(world.device)
    found = []
    for step in range(3):
        with busy.generating() as model:
            gathered = model(ids)
        with busy.evaluating() as model:
            assert torch.equal(model(ids), gathered)
        busy._streams = True
        with busy.generating() as model:
            assert torch.equal(model(ids), gathered)
        busy._streams = False
        found += scenarios.curve(busy, 1, first=step)
    assert found == scenarios.curve(calm, 3)
    for trained in (busy, calm):
        trained.close()


@pytest.mark.parametrize("store", ["device", "cpu", "weights", "cpu cpu", "nvme nvme"])
def test_captured_steps_follow_the_weights(world, tmp_path, store):
    settings = {"nvme_path": str(tmp_path), **(WHOLE | OFFLOADED)[store]}
    tiny.reference().llama.save_pretrained(tmp_path / "model")
    assert_fixed_steps_follow_the_weights(world, tmp_path / "model", zero_stage=3, **settings)


@pytest.mark.parametrize("store", ["device", "cpu", "cpu cpu", "nvme nvme"])
def test_a_checkpoint_goes_on_with_the_same_bits(world, tmp_path, store):
    settings = {"precision": "bf16", **(WHOLE | OFFLOADED)[store]}
    whole, rest = (engine(world, tmp_path / "nvme", **settings) for _ in range(2))
    scenarios.curve(whole, 2)
    checkpoints = Checkpoints(tmp_path / "saved", world, keep=1, asynchronous=True)
    checkpoints.save(2, whole.checkpoint_tensors(), state=whole.counters(), protected=set())
    expected = scenarios.curve(whole, 2, first=2)
    checkpoints.finish_save()
    saved = checkpoints.newest()
    checkpoints.load(saved, rest.checkpoint_tensors())
    rest.load_counters(saved.state)
    assert scenarios.curve(rest, 2, first=2) == expected
    for trained in (whole, rest):
        trained.close()


@pytest.mark.parametrize("store", ["device", "cpu cpu"])
def test_activations_on_the_host_are_those_that_were_computed(world, store):
    settings = {"activation_checkpointing": True, "precision": "bf16", **(WHOLE | OFFLOADED)[store]}
    same(train(world, activation_offload=True, **settings), train(world, **settings))


@pytest.mark.parametrize("store", ["device", "cpu", "weights", "cpu cpu"])
def test_backward_never_waits_for_the_device(world, tmp_path, store):
    trained = engine(world, tmp_path, precision="bf16", **(WHOLE | OFFLOADED)[store])
    for step in range(2):  # memory is page-locked in the first
        tiny.train_step(trained, step, accumulation=1)
    ids, counts = (x.to(world.device) for x in tiny.batch(2))
    loss = tiny.token_loss(trained(ids), ids, counts, counts.sum())
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.backward(loss, last=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trained.step().grad_norm > 0
    trained.close()


def test_gradients_of_an_offloaded_step_leave_the_device_for_page_locked_memory(world, tmp_path):
    trained = engine(world, tmp_path, precision="bf16", offload_optimizer="cpu")
    tiny.train_step(trained, 0)
    stores = trained._updater.optimizer.stores
    memory = [arrived for store in stores for arrived in store.gradients._arrived.values()]
    assert len(memory) == len(list(trained.module.parameters()))
    assert all(arrived.is_pinned() for arrived in memory)
    ids, counts = (x.to(world.device) for x in tiny.batch(1))
    trained.backward(tiny.token_loss(trained(ids), ids, counts, counts.sum()), last=True)
    assert scenarios.gradients_on_device(trained) == 0
    assert all(parameter.grad is None for parameter in trained.module.parameters())
    trained.close()
    assert not any(arrived.is_pinned() for arrived in memory)


def test_a_gradient_that_is_let_go_is_copied_before_its_memory_is_used_again(world):
    stream, count = CopyStream(world.device), 1 << 22
    buffers = BufferPool(1, nbytes=4 * count, pin=True)  # locked as long as this is held
    into = buffers.take().view(torch.float32)[:count]
    assert into.is_pinned()
    torch.cuda._sleep(CYCLES)
    gradient = torch.full((count,), 3.0, device=world.device)
    copied = stream.copy(into, gradient)
    del gradient
    rubbish = [torch.full((count,), -1.0, device=world.device) for _ in range(4)]
    copied.wait()
    assert (into == 3).all()
    assert all((tensor == -1).all() for tensor in rubbish)
    buffers.close()


def test_updated_weights_arrive_after_what_still_reads_the_old_ones_and_before_what_follows(world):
    parameter = nn.Parameter(torch.zeros(1 << 23, device=world.device, dtype=torch.bfloat16))
    weights = StagedWeights([{"w": parameter}], world.device, pin=True)
    for step in range(4):
        torch.cuda._sleep(CYCLES)
        before = parameter.detach().clone()
        weights.write("w", 0, values=torch.full((1 << 23,), step + 1.0))
        weights.flush()
        after = parameter.detach().clone()
        assert (before == step).all()
        assert (after == step + 1).all()
    weights.close()


@pytest.mark.parametrize("own_stream", [False, True])
def test_units_are_fetched_before_they_are_used_and_not_replaced_while_they_are(world, own_stream):
    nbytes, units = 1 << 24, 4
    store = HostWeights([nbytes] * units, device=world.device, pin=True)
    for unit in range(units):
        store.write(unit, 0, values=torch.full((nbytes,), unit + 1, dtype=torch.uint8))
    user = torch.cuda.Stream(world.device) if own_stream else torch.cuda.current_stream(world.device)
    seen = []
    for unit in [*range(units)] * 3:
        with torch.cuda.stream(user):
            fetched = store.fetch(unit, [(unit + 1) % units])
            torch.cuda._sleep(CYCLES // 4)
            seen.append(fetched.clone())
            del fetched
            store.release()
    torch.cuda.synchronize()
    for unit, found in zip([*range(units)] * 3, seen, strict=True):
        assert (found == unit + 1).all()
    store.close()
