"""Boxes inside tensors, compared with indexing."""

import itertools

import pytest
import torch

from rlhf.engine.checkpoint.sharded_tensors import Box, CheckpointTensor, keys_to_write

LINE = [(start, size) for start in range(4) for size in range(1, 5 - start)]
BOXES = [Box((row, 1), (rows, 3)) for row, rows in LINE] + [Box((1, column), (2, columns)) for column, columns in LINE]


def inside(box):
    """[4, 4], True inside `box`."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    (row, column), (rows, columns) = box
    mask[row : row + rows, column : column + columns] = True
    return mask


@pytest.mark.parametrize(("one", "two"), list(itertools.product(BOXES[::2], BOXES[1::2])))
def test_an_overlap_is_what_both_boxes_contain(one, two):
    whole, both = torch.arange(16).view(4, 4), inside(one) & inside(two)
    found = one.overlap(two)
    assert found == two.overlap(one)
    if found is None:
        assert not both.any()
        return
    assert torch.equal(inside(found), both)
    (row, column), (rows, columns) = one
    shard = whole[row : row + rows, column : column + columns]
    assert one.view(shard, found).flatten().tolist() == whole[both].tolist()


def test_scalars_overlap():
    assert Box((), ()).overlap(Box((), ())) == Box((), ())
    assert Box((), ()).numel == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_ranks_share_is_written_by_the_one_with_the_least_to_write(monkeypatch, rank):
    shared, mine = ((0, 0), (4, 4)), [((0, 0), (1, 4)), ((1, 0), (3, 4))]
    held = [{"shared": shared, "sharded": mine[0]}, {"shared": shared, "sharded": mine[1]}]
    monkeypatch.setattr("rlhf.engine.checkpoint.sharded_tensors.gather_objects", lambda found: held)
    tensors = {
        key: CheckpointTensor(key, (4, 4), Box(*box), torch.float32, True, read=lambda: None, write=lambda _: None)
        for key, box in held[rank].items()
    }
    assert keys_to_write(tensors, rank=rank) == [["shared", "sharded"], ["sharded"]][rank]
