"""State on disk: where it lies, how much memory it takes, and in which order it reads and writes."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adamw import AdamW
from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.grad_accumulation import squared_norm
from rlhf.runtime.dist import World

TILE = 2048
CONFIG = OptimizerConfig(lr=0.1)


@pytest.fixture
def optimizer(tmp_path):
    """`optimizer(count)`: of one parameter, in tiles of 2048 elements unless settings say otherwise."""
    made = []

    def make(count, dtype=torch.float32, **changes):
        settings = {"buffer_size": 4 * TILE, "buffer_count": 3} | changes
        engine = EngineConfig(zero_stage=1, offload_optimizer="nvme", nvme_path=str(tmp_path), **settings)
        group = {"w": nn.Parameter(torch.ones(count, dtype=dtype))}
        made.append(AdamW([group], config=CONFIG, engine=engine, world=World.alone()))
        made[-1].set_master("w", torch.ones(count))
        return made[-1]

    yield make
    for adam in made:
        adam.close()


@pytest.fixture
def transfers(monkeypatch):
    """What was read and written, in order: (verb, offset, bytes)."""
    seen = []
    for verb, real in (("read", DirectFile.read), ("write", DirectFile.write)):

        def call(self, offset, buffer, verb=verb, real=real, **options):
            seen.append((verb, offset, buffer.numel()))
            return real(self, offset, buffer, **options)

        monkeypatch.setattr(DirectFile, verb, call)
    return seen


def step(adam, gradient):
    adam.store_of("w").gradients.add("w", gradient)
    adam.step({"w"}, lr=0.1)


def storages():
    """Of all tensors there are, by address."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    found = [thing.untyped_storage() for thing in found if thing.layout == torch.strided]
    return {storage.data_ptr(): storage for storage in found}


def test_memory_is_that_of_the_buffers_whatever_the_size(optimizer):
    extra = []
    squared_norm(torch.ones(1, dtype=torch.bfloat16))  # takes a tile of memory once and for all
    for tiles in (10, 200):
        before = storages()  # held on to, so that no address is used twice
        adam = optimizer(tiles * TILE, torch.bfloat16)
        step(adam, torch.ones(tiles * TILE, dtype=torch.bfloat16))
        new = sum(storage.nbytes() for address, storage in storages().items() if address not in before)
        extra.append(new - 2 * tiles * TILE)  # less the working weights
        adam.close()
    assert extra[0] == extra[1]
    buffers, scratch = 3 * 4 * 4 * TILE, 4 * TILE
    assert buffers <= extra[0] <= buffers + scratch + 100


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_the_next_tile_is_read_before_this_one_is_written_if_asked(optimizer, transfers, ahead, behind):
    adam = optimizer(3 * TILE, pipeline_read=ahead, pipeline_write=behind)
    adam.store_of("w").gradients.add("w", torch.ones(3 * TILE))
    transfers.clear()
    adam.step({"w"}, lr=0.1)
    verbs = "".join(verb[0] for verb, *_ in transfers)
    assert verbs == ("rrwrww" if ahead else "rwrwrw")


@pytest.mark.parametrize(("behind", "order"), [(True, ["write"] * 3), (False, ["write", "wait"] * 3)])
def test_the_end_of_a_write_is_waited_for_at_once_unless_asked_not_to(optimizer, monkeypatch, behind, order):
    adam, seen, real = optimizer(3 * TILE, pipeline_write=behind), [], DirectFile.write
    adam.store_of("w").gradients.add("w", torch.ones(3 * TILE))

    def write(self, offset, buffer, **options):
        seen.append("write")
        transfer = real(self, offset, buffer, **options)
        return SimpleNamespace(wait=lambda: (seen.append("wait"), transfer.wait()))

    monkeypatch.setattr(DirectFile, "write", write)
    adam.step({"w"}, lr=0.1)
    assert seen == order


def test_a_step_moves_sixteen_bytes_an_element_in_and_twelve_out(optimizer, transfers):
    adam = optimizer(2 * TILE)
    transfers.clear()
    step(adam, torch.ones(2 * TILE))
    moved = {verb: sum(nbytes for v, _, nbytes in transfers if v == verb) for verb in ("read", "write")}
    assert moved == {"read": 16 * 2 * TILE, "write": (4 + 12) * 2 * TILE}


def test_bf16_halves_what_moves_of_gradients_and_moments(optimizer, transfers):
    adam = optimizer(2 * TILE, torch.bfloat16, moments="bf16")
    transfers.clear()
    step(adam, torch.ones(2 * TILE, dtype=torch.bfloat16))
    moved = {verb: sum(nbytes for v, _, nbytes in transfers if v == verb) for verb in ("read", "write")}
    assert moved == {"read": (2 + 4 + 2 + 2) * 2 * TILE, "write": (2 + 4 + 2 + 2) * 2 * TILE}


@pytest.mark.parametrize(("limit", "tiles"), [(TILE, 6), (3 * TILE - 1, 3), (3 * TILE, 2), (100 * TILE, 1)])
def test_sub_groups_bound_what_is_loaded_at_once(optimizer, transfers, limit, tiles):
    adam = optimizer(6 * TILE, buffer_size=6 * 4 * TILE, sub_group_size=limit)
    adam.store_of("w").gradients.add("w", torch.ones(6 * TILE))
    transfers.clear()
    adam.step({"w"}, lr=0.1)
    assert sum(verb == "read" for verb, *_ in transfers) == tiles


def test_a_disk_that_fails_in_backward_is_reported_once_all_ranks_can_be_told(optimizer, monkeypatch):
    adam = optimizer(TILE)

    def fail(*_, **__):
        raise RuntimeError("no space")

    monkeypatch.setattr(DirectFile, "write", fail)
    adam.store_of("w").gradients.add("w", torch.ones(TILE))
    assert str(adam.store_of("w").failure) == "no space"
    with pytest.raises(RuntimeError, match="no space"):
        adam.step({"w"}, lr=0.1)
