"""Where states lie in a file: nothing overlaps, everything starts on a page, tiles are as large as allowed."""

import pytest
import torch

from rlhf.engine.offload.nvme_layout import PAGE_ELEMENTS, lay_out_tiles, tile_capacity
from rlhf.engine.offload.optimizer_state import STATE_KEYS, ParameterShard

SIZES = {"big": (7, 1500), "row": (1,), "none": (0, 8), "even": (2, PAGE_ELEMENTS), "last": (PAGE_ELEMENTS + 1,)}


def shapes():
    return [ParameterShard(name, torch.Size(sizes), len(sizes) > 1) for name, sizes in SIZES.items()]


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [1, 2, 5, 100])
def test_every_element_has_a_place_of_its_own_on_pages(moments, tiles):
    records = lay_out_tiles(shapes(), tiles * PAGE_ELEMENTS, moments=moments)
    used = torch.zeros(sum(record.nbytes for record in records), dtype=torch.uint8)
    covered = {name: 0 for name in SIZES}
    for record in records:
        assert record.size <= tiles * PAGE_ELEMENTS
        for span in record.slices:
            assert span.start == covered[span.name], "in order, without gaps"
            covered[span.name] = span.stop
            places = [record.gradient_bytes(span, 4), *(record.state_bytes(part, span) for part in STATE_KEYS)]
            for place in places:
                assert (record.offset + place.start) % 4096 == 0 == (place.stop - place.start) % 4096
                used[record.offset + place.start : record.offset + place.stop] += 1
            narrow = record.gradient_bytes(span, 2)
            assert (places[0].stop, (places[0].start + places[0].stop) // 2) == (narrow.stop, narrow.start)
    assert covered == {shape.name: shape.numel for shape in shapes()}
    assert used.unique().tolist() == [1], "no byte is used twice, none is lost"


def test_a_state_is_one_stretch_behind_its_gradients():
    for record in lay_out_tiles(shapes(), 3 * PAGE_ELEMENTS, moments=torch.float32):
        assert record.state_start == 4 * record.size
        assert record.nbytes == 16 * record.size


@pytest.mark.parametrize(
    ("nbytes", "limit", "moments", "expected"),
    [
        (16 * PAGE_ELEMENTS, 1 << 30, torch.float32, PAGE_ELEMENTS),
        (16 * PAGE_ELEMENTS - 1, 1 << 30, torch.float32, 0),
        (32_000_000, 1 << 30, torch.float32, 32_000_000 // 16 // PAGE_ELEMENTS * PAGE_ELEMENTS),
        (32_000_000, 1 << 30, torch.bfloat16, 32_000_000 // 12 // PAGE_ELEMENTS * PAGE_ELEMENTS),
        (32_000_000, 10_000, torch.float32, 4 * PAGE_ELEMENTS),
        (32_000_000, 5, torch.float32, PAGE_ELEMENTS),
    ],
)
def test_a_tile_is_bounded_by_its_buffer_and_by_the_sub_group(nbytes, limit, moments, expected):
    assert tile_capacity(nbytes, limit, moments=moments) == expected
