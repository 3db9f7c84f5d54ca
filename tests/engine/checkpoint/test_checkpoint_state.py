"""Which rank writes a shard that several hold."""

import pytest
import torch

from rlhf.engine.checkpoint.checkpoint_state import CheckpointTensor, keys_to_write


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_shard_that_ranks_share_is_written_by_the_one_with_the_least_to_write(monkeypatch, rank):
    held = [{"shared": (0, 4), "sharded": (0, 1)}, {"shared": (0, 4), "sharded": (1, 4)}, {"shared": (0, 4)}][:2]
    rows = [*held, {"shared": (0, 4), "sharded": (4, 4)}][rank]  # the last rank has no rows of one
    monkeypatch.setattr(
        "rlhf.engine.checkpoint.checkpoint_state.gather_objects", lambda mine: [*held, {"shared": (0, 4)}]
    )
    tensors = {
        key: CheckpointTensor(key, (4, 4), range(*own), torch.float32, True, read=lambda: None, write=lambda _: None)
        for key, own in rows.items()
    }
    assert keys_to_write(tensors, rank=rank) == [["sharded"], ["sharded"], ["shared"]][rank]


def test_the_lowest_of_equal_ranks_writes(monkeypatch):
    monkeypatch.setattr("rlhf.engine.checkpoint.checkpoint_state.gather_objects", lambda mine: [mine, mine])
    scalar = CheckpointTensor("step", (), range(1), torch.float32, True, read=lambda: None, write=lambda _: None)
    assert scalar.shard_shape == ()
    assert [keys_to_write({"step": scalar}, rank=rank) for rank in (0, 1)] == [["step"], []]
