"""Working weights at rest: the bytes that come are the bytes that went, in time, and through few buffers."""

import random

import pytest
import torch

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.engine.offload.buffer_pool import BufferPool
from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.offloaded_weights import (
    OffloadedShard,
    OffloadedWeights,
    PrefetchOrder,
    lay_out_units,
    param_offload_device,
    unit_bytes,
)
from rlhf.engine.offload.weight_stores import HostWeights, NvmeWeights, file_bytes

CPU = torch.device("cpu")
SIZES = [64, 20_032, 0, 9_000, 4096]  # smaller and larger than a buffer, none at all, whole sectors


class Watched:
    """A file whose reads are noted as (offset, bytes)."""

    def __init__(self, file):
        self.reads = []
        self._file = file
        self.write, self.flush, self.close = file.write, file.flush, file.close

    def read(self, offset, into):
        self.reads.append((offset, into.numel()))
        return self._file.read(offset, into)


def disk_home(folder, sizes=SIZES, count=3, nbytes=8192):
    file = Watched(DirectFile(folder, nbytes=file_bytes(sizes), label="weights"))
    return NvmeWeights(sizes, file=file, pool=BufferPool(count, nbytes=nbytes), device=CPU), file


def host_home(sizes=SIZES):
    return HostWeights(sizes, device=CPU, pin=False)


@pytest.fixture(params=["host", 1, 2, 5])
def home(request, tmp_path):
    made = host_home() if request.param == "host" else disk_home(tmp_path, count=request.param)[0]
    yield made
    made.close()


def test_a_home_gives_back_what_was_written_last_wherever_it_was_written(home):
    expected = [bytearray(size) for size in SIZES]
    for unit, size in enumerate(SIZES):
        home.write(unit, 0, values=torch.zeros(size, dtype=torch.uint8))
    draw = random.Random(3)
    for _ in range(300):
        unit = draw.choice([0, 1, 3, 4])
        start = draw.randrange(SIZES[unit])
        count = draw.randrange(SIZES[unit] - start) + 1
        if draw.random() < 0.5:
            values = draw.randbytes(count)
            home.write(unit, start, values=torch.frombuffer(bytearray(values), dtype=torch.uint8))
            expected[unit][start : start + count] = values
        elif draw.random() < 0.5:
            assert home.read(unit, start, count=count).numpy().tobytes() == expected[unit][start : start + count]
        else:
            following = draw.sample([0, 1, 2, 3, 4], draw.randrange(4))
            brought = home.fetch(unit, [other for other in following if other != unit])
            assert brought[: SIZES[unit]].numpy().tobytes() == expected[unit]
    home.flush()


def test_writes_that_follow_each_other_read_nothing_and_leave_in_whole_buffers(tmp_path):
    home, file = disk_home(tmp_path, sizes=[40_960], nbytes=8192)
    values = torch.arange(40_960 // 4, dtype=torch.int32).view(torch.uint8)
    for part in values.split(1000):
        home.write(0, part.storage_offset(), values=part)
    home.flush()
    assert file.reads == []
    assert torch.equal(home.read(0, 0, count=40_960), values)
    home.close()


def test_the_following_units_are_read_while_one_is_used_as_far_as_buffers_go(tmp_path):
    home, file = disk_home(tmp_path, sizes=[8192] * 6, count=3)
    home.fetch(0, [1, 2, 3, 4, 5])
    assert [offset // 8192 for offset, _ in file.reads] == [0, 1, 2, 3]
    home.fetch(1, [2, 3, 4, 5])
    assert [offset // 8192 for offset, _ in file.reads] == [0, 1, 2, 3, 4]
    home.fetch(5, [4])  # unforeseen
    assert [offset // 8192 for offset, _ in file.reads][5:] == [5, 4]
    home.close()


def test_a_unit_larger_than_all_buffers_comes_in_pieces(tmp_path):
    home, file = disk_home(tmp_path, sizes=[100_000], count=2, nbytes=8192)
    values = torch.randint(256, (100_000,), dtype=torch.uint8)
    home.write(0, 0, values=values)
    assert torch.equal(home.fetch(0, [])[:100_000], values)
    assert len(file.reads) == 1 + 13  # the last sector before it is written, then 100,000 / 8,192 pieces
    home.close()


def walk(route, units, *, backward):
    seen = []
    for unit in units:
        route.arrive(unit, backward=backward)
        seen.append(list(route.ahead())[:1])
    return seen


def test_a_route_goes_forward_and_back_and_learns_where_it_turns():
    route = PrefetchOrder(4)
    assert walk(route, [0, 1, 2, 3], backward=False) == [[1], [2], [3], []]
    assert walk(route, [2, 1], backward=True) == [[1], [0]]
    assert walk(route, [0, 1, 2, 3], backward=False) == [[1], [2], [3], [2]]
    assert walk(route, [2, 1], backward=True) == [[1], []]  # a step comes next, and changes all


def test_a_route_learns_another_order():
    route = PrefetchOrder(3)
    walk(route, [2, 0, 1], backward=False)
    assert walk(route, [2, 0, 1], backward=False) == [[0], [1], [2]]


def weights(homes, ranks=1, rank=0):
    shapes = [{"a": torch.Size((5, 3)), "b": torch.Size((7,))}, {"c": torch.Size((1, 2))}]
    slots = lay_out_units(shapes, ranks=ranks, rank=rank, dtype=torch.bfloat16)
    return OffloadedWeights(slots, homes(unit_bytes(slots, 2)), dtype=torch.bfloat16, others=None)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_gets_its_rows_back_rounded_and_padded_for_the_gather(tmp_path, rank):
    def homes(sizes):
        return [disk_home(tmp_path, sizes)[0]] * 2

    rows = weights(homes, ranks=3, rank=rank)
    mine = {"a": [2, 2, 1][rank] * 3, "b": [3, 3, 1][rank], "c": [2, 0, 0][rank]}
    for name, count in mine.items():
        values = torch.linspace(1, 2, count + 1)[:count] + rank
        rows.write(name, 0, values=values)
        rows.write(name, count // 2, values=values[count // 2 :] * 2)
        expected = torch.cat([values[: count // 2], values[count // 2 :] * 2]).bfloat16()
        assert torch.equal(rows.read(name, 0, count=count), expected.float())
        padded = rows.take(name)
        assert padded.shape == {"a": (2, 3), "b": (3,), "c": (1, 2)}[name]
        assert torch.equal(padded.flatten()[:count], expected)
    rows.close()


def test_the_first_units_may_stay_in_memory_while_the_rest_is_on_disk(tmp_path):
    def homes(sizes):
        return [host_home([sizes[0], 0]), disk_home(tmp_path, [0, sizes[1]])[0]]

    rows = weights(homes)
    rows.write("a", 0, values=torch.arange(15.0))
    rows.write("c", 0, values=torch.arange(2.0))
    assert rows.take("a").flatten().tolist() == list(range(15))
    assert rows.take("c").flatten().tolist() == [0, 1]
    rows.close()


def test_weights_that_are_elsewhere_have_a_shape_and_say_where_to_read_their_values():
    shard = OffloadedShard((3, 2), dtype=torch.bfloat16, device=CPU, fetch=lambda: torch.ones(4, 2))
    assert shard.detach().shape == (3, 2)
    assert shard[:2].view(-1).shape == (4,)
    assert torch.equal(torch.zeros_like(shard, dtype=torch.float32), torch.zeros(3, 2))
    assert shard.new_zeros(4, 2).fsdp_pre_all_gather(None)[0][0].sum() == 8
    with pytest.raises(RuntimeError, match="off the device"):
        shard + 1


def test_the_memory_of_a_cpu_machine_is_that_of_its_device():
    config = EngineConfig(zero_stage=3, offload_param=OffloadDevice.cpu)
    assert param_offload_device(config, CPU) == OffloadDevice.none
    assert param_offload_device(config, torch.device("cuda")) == OffloadDevice.cpu
