"""What is where in a file of optimizer state: every element has a place of its own, on pages of the disk."""

import pytest
import torch

from rlhf.config.engine_config import MomentDtype
from rlhf.engine.offload.optimizer_state import ParameterShard
from rlhf.engine.offload.tiles import lay_out_tiles, page_elements, tile_bytes, tile_capacity
from rlhf.engine.state_format import STATE_KEYS, StateFormat

PAGE = 2048
SIZES = {"big": (7, 1500), "row": (1,), "none": (0, 8), "even": (2, PAGE), "last": (PAGE + 1,)}
WHOLE, NARROW = StateFormat(), StateFormat(moments=MomentDtype.bf16)
SMALL = StateFormat(sums=torch.bfloat16, is_split=True, moments=MomentDtype.int8)
FORMATS = [WHOLE, NARROW, SMALL, StateFormat(moments=MomentDtype.int8), StateFormat(is_split=True)]


def shards():
    return [ParameterShard(name, torch.Size(sizes), len(sizes) > 1) for name, sizes in SIZES.items()]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("pages", [1, 2, 5, 100])
def test_every_element_has_a_place_of_its_own_on_pages(format_, pages):
    capacity = pages * page_elements(format_)
    tiles = lay_out_tiles(shards(), capacity, format_=format_)
    used = torch.zeros(sum(tile.nbytes for tile in tiles), dtype=torch.uint8)
    covered = {name: 0 for name in SIZES}
    for tile in tiles:
        assert tile.size <= capacity
        for part in tile.slices:
            assert part.start == covered[part.name], "in order, without gaps"
            covered[part.name] = part.stop
            whole = format_.sums.itemsize
            places = [tile.gradient_bytes(part, whole), *(tile.state_bytes(key, part) for key in STATE_KEYS)]
            for place in places:
                assert (tile.offset + place.start) % 4096 == 0 == (place.stop - place.start) % 4096
                used[tile.offset + place.start : tile.offset + place.stop] += 1
            narrow = tile.gradient_bytes(part, 2)
            assert (places[0].stop, places[0].stop - 2 * part.padded) == (narrow.stop, narrow.start)
        used[tile.offset + tile.moments.start : tile.offset + tile.nbytes] |= 1  # scales
    assert covered == {shard.name: shard.numel for shard in shards()}
    assert used.unique().tolist() == [1], "no byte is used twice, none is lost"


@pytest.mark.parametrize("pages", [1, 3, 100])
def test_codes_and_scales_share_no_byte(pages):
    """Everything that is kept of a tile, written once: the sum of what was added to each byte is 1."""
    for tile in lay_out_tiles(shards(), pages * page_elements(SMALL), format_=SMALL):
        buffer = torch.zeros(tile.nbytes, dtype=torch.uint8)
        for part in tile.slices:
            for key in STATE_KEYS:
                codes, scales = tile.state_view(buffer, key, part=part)
                codes.view(torch.uint8).add_(1)
                if scales is not None:
                    assert scales.numel() == -(-part.numel // 256)
                    scales.view(torch.uint8).add_(1)
        assert buffer.max() == 1


def test_a_state_is_one_stretch_behind_its_gradients():
    for tile in lay_out_tiles(shards(), 3 * PAGE, format_=WHOLE):
        assert tile.state_start == 4 * tile.size
        assert tile.nbytes == 16 * tile.size


@pytest.mark.parametrize(
    ("nbytes", "limit", "format_", "expected"),
    [
        (16 * PAGE, 1 << 30, WHOLE, PAGE),
        (16 * PAGE - 1, 1 << 30, WHOLE, 0),
        (32_000_000, 1 << 30, WHOLE, 32_000_000 // 16 // PAGE * PAGE),
        (32_000_000, 1 << 30, NARROW, 32_000_000 // 12 // PAGE * PAGE),
        (32_000_000, 10_000, WHOLE, 4 * PAGE),
        (32_000_000, 5, WHOLE, PAGE),
        (6 * 4096 + 4096, 1 << 30, SMALL, 4096),
        (6 * 4096 + 4095, 1 << 30, SMALL, 0),
    ],
)
def test_a_tile_is_bounded_by_its_buffer_and_by_the_sub_group(nbytes, limit, format_, expected):
    assert tile_capacity(nbytes, limit, format_=format_) == expected


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("nbytes", [100_000, 1_234_567, 32_000_000])
def test_no_larger_tile_would_fit(format_, nbytes):
    size = tile_capacity(nbytes, 1 << 30, format_=format_)
    assert tile_bytes(size, format_) <= nbytes < tile_bytes(size + page_elements(format_), format_)
