"""What is collected of each parameter's gradient."""

import gc
from unittest.mock import Mock

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

from rlhf.engine.offload import grad_accumulation
from rlhf.runtime.dist import World
from tests.engine import tiny
from tests.engine.scenarios import first_gradient


def test_parameters_that_fsdp_leaves_alone_have_gradients_of_their_own_also_in_bf16(tmp_path):
    """On one rank, weights on disk are wrapped by FSDP2, and small ones are not."""
    found = {}
    for name, settings in {
        "device": {},
        "disk": {"offload_param": "nvme", "nvme_path": str(tmp_path), "persistence_threshold": 100},
    }.items():
        engine = tiny.engine(World.alone(), 3, precision="bf16", **settings)
        tiny.train_step(engine, 0)
        found[name] = first_gradient(engine)
        engine.close()
    assert all(torch.equal(gradient, found["disk"][name]) for name, gradient in found["device"].items())


def test_a_rank_by_itself_reduces_nothing_and_sums_as_without_fsdp(tmp_path, monkeypatch):
    """Two micro-batches in bf16, weights on disk: the first moments are those of the model that nothing wraps."""
    reduce = Mock(wraps=group.foreach_reduce)
    monkeypatch.setattr(group, "foreach_reduce", reduce)
    found = {}
    for name, settings in {"device": {}, "disk": {"offload_param": "nvme", "nvme_path": str(tmp_path)}}.items():
        engine = tiny.engine(World.alone(), 3, precision="bf16", **settings)
        for _ in range(2):
            tiny.train_step(engine, 0)
        found[name] = first_gradient(engine)
        engine.close()
    reduce.assert_not_called()
    assert found["device"].keys() == found["disk"].keys()
    assert all(torch.equal(gradient, found["disk"][name]) for name, gradient in found["device"].items())


@pytest.mark.parametrize(
    "settings",
    [{}, {"offload_optimizer": "cpu"}, {"offload_optimizer": "nvme"}, {"offload_param": "nvme"}],
    ids=["device", "optimizer on the host", "optimizer on disk", "all on disk"],
)
def test_a_model_and_its_state_are_gone_when_nobody_uses_them(tmp_path, settings):
    gc.collect()
    before = {id(tensor) for tensor in live_tensors()}
    engine = tiny.engine(World.alone(), 3, precision="bf16", **settings, nvme_path=str(tmp_path))
    tiny.train_step(engine, 0)
    engine.close()
    assert sum(tensor.numel() for tensor in live_tensors() if id(tensor) not in before) > 1000
    del engine
    gc.collect()
    left = {tensor.numel() for tensor in live_tensors() if id(tensor) not in before and tensor.numel() > 100}
    assert left <= {grad_accumulation._TILE}, "a buffer of the thread that computes is all that may stay"


def live_tensors():
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
