"""Checkpoints of several ranks: bit for bit on as many, up to rounding on more or fewer and from stage to stage."""

import pickle

import pytest
import torch

from tests.engine.checkpoint import resharding_runs
from tests.forking import run_forked


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By number of ranks, then by rank: what `resharding_runs.py` found."""
    root = tmp_path_factory.mktemp("checkpoints")
    done = run_forked("tests/engine/checkpoint/resharding_runs.py", root)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[:9000] + "\n...\n" + done.stderr[-9000:]
    return pickle.loads((root / "found").read_bytes())


@pytest.fixture
def plain(runs):
    """Losses, norms and weights of a run on one rank without any checkpoint."""
    return runs[1][0]["plain"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_the_same_ranks_the_rest_is_the_same_bit_for_bit(runs, ranks):
    for rank in runs[ranks]:
        for name, (whole, rest) in rank["same"].items():
            assert rest[0] == whole[0][resharding_runs.SAVED_AFTER :], name
            assert all(torch.equal(rest[1][key], tensor) for key, tensor in whole[1].items()), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_other_ranks_and_stages_the_rest_is_the_same_up_to_rounding(runs, plain, ranks):
    points, weights = plain
    for rank in runs[ranks]:
        for (source, name), (rest, found) in rank["other"].items():
            expected = torch.tensor(points[resharding_runs.SAVED_AFTER :])
            torch.testing.assert_close(torch.tensor(rest), expected, rtol=1e-5, atol=1e-6, msg=f"{source} {name}")
            for key, tensor in weights.items():
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)
        assert len(rank["other"]) >= 3


@pytest.mark.parametrize("ranks", [2, 4])
def test_moments_in_8_bits_are_cut_into_other_blocks(runs, ranks):
    """Each rank's blocks begin at its own rows: the largest of a block is another, and the rest is rounded anew."""
    _, (expected, weights) = runs[1][0]["same"]["zero1 small"]
    for rank in runs[ranks]:
        points, found = rank["small"]
        assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in expected], rel=5e-3)
        for key, tensor in weights.items():
            torch.testing.assert_close(found[key], tensor, rtol=2e-2, atol=3e-3)


def test_saving_does_not_change_the_run(runs, plain):
    points, weights = plain
    whole, _ = runs[1][0]["same"]["zero0"]
    assert whole[0] == points
    assert all(torch.equal(whole[1][key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("ranks", [2, 4])
def test_uneven_shards_find_each_other_and_copies_are_written_once(runs, ranks):
    for rank in runs[ranks]:
        loaded, expected, sizes = rank["uneven"]
        assert loaded.keys() == {key for key, rows in expected.items() if len(rows)}
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())
        assert sum(sizes) == 2 * 20 * 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_cannot_write_stops_all_of_them_and_the_older_one_stays(runs, ranks):
    for rank in runs[ranks]:
        message, newest, names = rank["failing"]
        assert "the checkpoint of step 2 could not be written" in message
        assert "rank-00001.safetensors: Is a directory" in message
        assert "step-000001 is unchanged" in message
        assert (newest, names) == (1, ["step-000001"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_raises_for_the_damaged_file_of_one(runs, ranks):
    for rank in runs[ranks]:
        assert f"rank-{ranks - 1:05d}.safetensors is damaged" in rank["damaged"]
