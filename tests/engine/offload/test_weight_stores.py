"""Stores of offloaded weights: the bytes that come are the bytes that went, in time, and through few buffers."""

import random

import pytest
import torch

from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.transfers import BufferPool
from rlhf.engine.offload.weight_stores import HostWeights, NvmeWeights, file_bytes

CPU = torch.device("cpu")
SIZES = [64, 20_032, 0, 9_000, 4096]  # smaller and larger than a buffer, none at all, whole sectors


class Watched:
    """A file whose reads are noted as (offset, bytes)."""

    def __init__(self, file):
        self.reads = []
        self._file, self.pool = file, file.pool
        self.write, self.flush, self.close = file.write, file.flush, file.close

    def read(self, offset, into):
        self.reads.append((offset, into.numel()))
        return self._file.read(offset, into)


def nvme_weights(folder, sizes=SIZES, count=3, nbytes=8192):
    pool = BufferPool(count, nbytes=nbytes)
    file = Watched(DirectFile(folder, nbytes=file_bytes(sizes), pool=pool, label="weights"))
    return NvmeWeights(sizes, file=file, device=CPU), file


def host_weights(sizes=SIZES):
    return HostWeights(sizes, device=CPU, pin=False)


@pytest.fixture(params=["host", 1, 2, 5])
def store(request, tmp_path):
    made = host_weights() if request.param == "host" else nvme_weights(tmp_path, count=request.param)[0]
    yield made
    made.close()


def test_a_store_gives_back_what_was_written_last_wherever_it_was_written(store):
    expected = [bytearray(size) for size in SIZES]
    for unit, size in enumerate(SIZES):
        store.write(unit, 0, values=torch.zeros(size, dtype=torch.uint8))
    draw = random.Random(3)
    for _ in range(300):
        unit = draw.choice([0, 1, 3, 4])
        start = draw.randrange(SIZES[unit])
        count = draw.randrange(SIZES[unit] - start) + 1
        if draw.random() < 0.5:
            values = draw.randbytes(count)
            store.write(unit, start, values=torch.frombuffer(bytearray(values), dtype=torch.uint8))
            expected[unit][start : start + count] = values
        elif draw.random() < 0.5:
            assert store.read(unit, start, count=count).numpy().tobytes() == expected[unit][start : start + count]
        else:
            following = draw.sample([0, 1, 2, 3, 4], draw.randrange(4))
            fetched = store.fetch(unit, [other for other in following if other != unit])
            assert fetched[: SIZES[unit]].numpy().tobytes() == expected[unit]
    store.flush()


def test_writes_that_follow_each_other_read_nothing_and_leave_in_whole_buffers(tmp_path):
    store, file = nvme_weights(tmp_path, sizes=[40_960], nbytes=8192)
    values = torch.arange(40_960 // 4, dtype=torch.int32).view(torch.uint8)
    for part in values.split(1000):
        store.write(0, part.storage_offset(), values=part)
    store.flush()
    assert file.reads == []
    assert torch.equal(store.read(0, 0, count=40_960), values)
    store.close()


def test_the_following_units_are_read_while_one_is_used_as_far_as_buffers_go(tmp_path):
    store, file = nvme_weights(tmp_path, sizes=[8192] * 6, count=3)
    store.fetch(0, [1, 2, 3, 4, 5])
    assert [offset // 8192 for offset, _ in file.reads] == [0, 1, 2, 3]
    store.fetch(1, [2, 3, 4, 5])
    assert [offset // 8192 for offset, _ in file.reads] == [0, 1, 2, 3, 4]
    store.fetch(5, [4])  # unforeseen
    assert [offset // 8192 for offset, _ in file.reads][5:] == [5, 4]
    store.close()


def test_a_unit_larger_than_all_buffers_comes_in_pieces(tmp_path):
    store, file = nvme_weights(tmp_path, sizes=[100_000], count=2, nbytes=8192)
    values = torch.randint(256, (100_000,), dtype=torch.uint8)
    store.write(0, 0, values=values)
    assert torch.equal(store.fetch(0, [])[:100_000], values)
    assert len(file.reads) == 1 + 13  # the last sector before it is written, then 100,000 / 8,192 pieces
    store.close()
