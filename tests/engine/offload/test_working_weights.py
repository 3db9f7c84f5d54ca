"""Working weights: which unit is fetched next, which bytes are which parameter, and what the host writes in pieces."""

import pytest
import torch
from torch import nn

from rlhf.config.engine_config import OffloadDevice
from rlhf.engine.offload.placement import offload_device
from rlhf.engine.offload.working_weights import (
    OffloadedShard,
    OffloadedWeights,
    PrefetchOrder,
    StagedWeights,
    lay_out_units,
    unit_bytes,
)
from tests.engine.offload.test_weight_stores import CPU, host_weights, nvme_weights


def walk(order, units, *, backward):
    seen = []
    for unit in units:
        order.arrive(unit, backward=backward)
        seen.append(list(order.ahead())[:1])
    return seen


def test_the_order_goes_forward_and_back_and_learns_where_it_turns():
    order = PrefetchOrder(4)
    assert walk(order, [0, 1, 2, 3], backward=False) == [[1], [2], [3], []]
    assert walk(order, [2, 1], backward=True) == [[1], [0]]
    assert walk(order, [0, 1, 2, 3], backward=False) == [[1], [2], [3], [2]]
    assert walk(order, [2, 1], backward=True) == [[1], []]  # a step comes next, and changes all


def test_it_learns_another_order():
    order = PrefetchOrder(3)
    walk(order, [2, 0, 1], backward=False)
    assert walk(order, [2, 0, 1], backward=False) == [[0], [1], [2]]


def weights(stores, ranks=1, rank=0):
    shapes = [{"a": torch.Size((5, 3)), "b": torch.Size((7,))}, {"c": torch.Size((1, 2))}]
    slots = lay_out_units(shapes, ranks=ranks, rank=rank, dtype=torch.bfloat16)
    return OffloadedWeights(slots, stores(unit_bytes(slots, 2)), dtype=torch.bfloat16, others=None)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_gets_its_shard_back_rounded_and_padded_for_the_gather(tmp_path, rank):
    def stores(sizes):
        return [nvme_weights(tmp_path, sizes)[0]] * 2

    offloaded = weights(stores, ranks=3, rank=rank)
    mine = {"a": [2, 2, 1][rank] * 3, "b": [3, 3, 1][rank], "c": [2, 0, 0][rank]}
    for name, count in mine.items():
        values = torch.linspace(1, 2, count + 1)[:count] + rank
        offloaded.write(name, 0, values=values)
        offloaded.write(name, count // 2, values=values[count // 2 :] * 2)
        expected = torch.cat([values[: count // 2], values[count // 2 :] * 2]).bfloat16()
        assert torch.equal(offloaded.shard(name).flatten(), expected)
        padded = offloaded.take(name)
        assert padded.shape == {"a": (2, 3), "b": (3,), "c": (1, 2)}[name]
        assert torch.equal(padded.flatten()[:count], expected)
    offloaded.close()


def test_the_first_units_may_stay_in_memory_while_the_rest_is_on_disk(tmp_path):
    def stores(sizes):
        return [host_weights([sizes[0], 0]), nvme_weights(tmp_path, [0, sizes[1]])[0]]

    offloaded = weights(stores)
    offloaded.write("a", 0, values=torch.arange(15.0))
    offloaded.write("c", 0, values=torch.arange(2.0))
    assert offloaded.take("a").flatten().tolist() == list(range(15))
    assert offloaded.take("c").flatten().tolist() == [0, 1]
    offloaded.close()


def test_weights_that_are_elsewhere_have_a_shape_and_say_where_to_read_their_values():
    shard = OffloadedShard((3, 2), dtype=torch.bfloat16, device=CPU, fetch=lambda: torch.ones(4, 2))
    assert shard.detach().shape == (3, 2)
    assert shard[:2].view(-1).shape == (4,)
    assert torch.equal(torch.zeros_like(shard, dtype=torch.float32), torch.zeros(3, 2))
    assert shard.new_zeros(4, 2).fsdp_pre_all_gather(None)[0][0].sum() == 8
    with pytest.raises(RuntimeError, match="off the device"):
        shard + 1


def test_the_memory_of_a_cpu_machine_is_that_of_its_device():
    assert offload_device(OffloadDevice.cpu, CPU) == OffloadDevice.none
    assert offload_device(OffloadDevice.nvme, CPU) == OffloadDevice.nvme
    assert offload_device(OffloadDevice.cpu, torch.device("cuda")) == OffloadDevice.cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staged_weights_arrive_rounded_where_they_belong(monkeypatch, dtype):
    monkeypatch.setattr("rlhf.engine.offload.working_weights._STAGED", 64)
    parameter = nn.Parameter(torch.zeros(30, 40, dtype=dtype))
    weights = StagedWeights([{"w": parameter}], CPU, pin=False)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weights.write("w", 128, values=values)
    values_before = values.clone()
    values.fill_(torch.nan)
    weights.flush()
    flat = parameter.detach().flatten()
    assert torch.equal(flat[128:1128], values_before.to(dtype))
    assert not flat[:128].any()
    assert not flat[1128:].any()
    weights.close()
