"""Training with the optimizer's state and gradients in every store; part of `scenarios.py`."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf.engine.offload import placement
from rlhf.runtime import dist
from tests.engine import tiny

STEPS = 20
STEADY = {"schedule": "constant", "warmup_steps": 0}
SMALL = {"buffer_size": 8192}  # tiles of 2048 elements: the larger matrices are cut, the smaller ones share a tile
STORES = {
    "cpu": {"offload_optimizer": "cpu"},
    "nvme": {"offload_optimizer": "nvme", **SMALL},
    "one buffer": {"offload_optimizer": "nvme", **SMALL, "buffer_count": 1},
    "half": {"offload_optimizer": "nvme", "optimizer_share": 0.5, "sub_group_size": 5000, "pipeline_write": False},
}


FEWER = {"moments": "int8", "master_weights": "split", "grad_accum_dtype": "bf16", "buffer_size": 11_264}
"""Bytes of optimizer state; a tile of moments in 8 bits has a page of scales."""


class Setting(NamedTuple):
    """What is trained on the device and in `stores`."""

    kind: str
    precision: str
    stage: int
    steps: int
    stores: tuple[str, ...]


SETTINGS = {
    1: [
        Setting("plain", "fp32", 3, STEPS, ("nvme",)),
        Setting("odd", "bf16", 1, 4, tuple(STORES)),
        Setting("fewer", "bf16", 1, 4, tuple(STORES)),
        Setting("tied", "bf16", 2, 3, ("cpu", "nvme")),
        Setting("adapters", "fp32", 1, 3, ("half",)),
    ],
    2: [
        Setting("plain", "fp32", 3, STEPS, ("nvme",)),
        Setting("plain", "bf16", 3, 6, ("cpu", "nvme")),
        Setting("plain", "bf16", 2, 3, ("cpu", "one buffer")),
        Setting("plain", "bf16", 1, 3, ("nvme",)),
        Setting("odd", "bf16", 3, 3, ("half",)),
        Setting("fewer", "bf16", 3, 3, ("cpu", "nvme")),
        Setting("fewer", "bf16", 2, 3, ("half",)),
        Setting("sent in bf16", "bf16", 3, 3, ("cpu", "nvme")),
        Setting("sent in bf16", "fp32", 1, 3, ("cpu", "nvme")),
        Setting("adapters", "fp32", 3, 3, ("cpu", "nvme")),
        Setting("replicas", "bf16", 3, 3, ("cpu", "nvme")),
        Setting("replicas", "fp32", 3, STEPS, ()),
    ],
    4: [Setting("odd", "bf16", 3, 3, ("cpu", "nvme"))],
}


def learns(name):
    return "q_proj" in name and "layers.0" not in name


@contextmanager
def memory(*, own):
    """Inside, the device counts as one with memory of its own, as CUDA has, so that everything is copied; or not."""
    known, placement.has_own_memory = placement.has_own_memory, lambda device: own
    try:
        yield
    finally:
        placement.has_own_memory = known


def train(world, *, kind="plain", steps=STEPS, accumulation=2, **config):
    """Loss and norm of each step, masters, and working weights, all of them this rank's shards."""
    options = {"zero_stage": 3, "precision": "bf16"} | config
    stage = options.pop("zero_stage")
    if kind == "adapters":
        options["learns"] = learns
    elif kind == "replicas":
        options["persistence_threshold"] = 100  # norms, all else is larger
    elif kind == "sent in bf16":
        options["reduce_dtype"] = "bf16"
    elif kind == "fewer":
        options |= FEWER
    elif kind != "plain":
        options["kind"] = {kind: True}
    optimizer = tiny.optimizer_config(**STEADY)
    with tempfile.TemporaryDirectory() as folder:
        engine = tiny.engine(world, stage, optimizer=optimizer, nvme_path=folder, **options)
        points = []
        for step in range(steps):
            loss, result = tiny.train_step(engine, step % 10, accumulation=accumulation)
            total = dist.sum_over_ranks(torch.tensor(loss, dtype=torch.float64)).item()
            points.append((total, result.grad_norm))
        adam = engine._updater.optimizer
        state = {(name, part): adam.read_shard(name, part).clone() for name, part in adam.entries()}
        whole = {name: tensor.clone() for name, tensor in engine.full_tensors()}
        on_disk = any(not store.in_memory for store in adam.stores)
        adam.close()
        assert on_disk == (options.get("offload_optimizer") == "nvme"), "the state was where it was asked to be"
        assert not list(Path(folder).iterdir()), "nothing is left in the folder"
    return points, state, whole


def differences(found, expected):
    """What is not bit-equal, in words."""
    wrong = [f"step {i}: {a} is not {b}" for i, (a, b) in enumerate(zip(found[0], expected[0], strict=True)) if a != b]
    for part in (1, 2):
        assert found[part].keys() == expected[part].keys()
        wrong += [f"{key}" for key, shard in found[part].items() if not torch.equal(shard, expected[part][key])]
    return wrong


def offload_optimizer(world):
    """What differs from state on the device, by setting and store; curve and weights of each setting."""
    found, curves = {}, {}
    for setting in SETTINGS[world.size]:
        settings = {"kind": setting.kind, "precision": setting.precision, "zero_stage": setting.stage}
        expected = train(world, steps=setting.steps, **settings)
        curves[setting] = expected[0], expected[2]
        for store in setting.stores:
            with memory(own=True):
                trained = train(world, steps=setting.steps, **settings, **STORES[store])
            found[setting, store] = differences(trained, expected)
    return found, curves


def failing_disks(world):
    """What each rank is told when the file of the last one is cut short, between micro-batches and before the step."""
    found = {}
    for moment in ("micro-batch", "step"):
        with tempfile.TemporaryDirectory() as folder:
            engine = tiny.engine(world, 3, offload_optimizer="nvme", nvme_path=folder, **SMALL)
            ids, counts = tiny.batch(0)
            try:
                for last in (False, True):
                    engine.backward(tiny.token_loss(engine(ids), ids, counts, counts.sum()), last=last)
                    if last == (moment == "step") and world.rank == world.size - 1:
                        cut_short(engine)
                engine.step()
                found[moment] = ""
            except RuntimeError as error:
                found[moment] = str(error)
            engine._updater.optimizer.close()
    return found


def cut_short(engine):
    (store,) = engine._updater.optimizer.stores
    os.truncate(store._resources.file._file.fileno(), 0)
