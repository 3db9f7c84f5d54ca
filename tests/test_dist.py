"""Two ranks: what they send each other, where they listen, and that one which is stopped is named.

Started once as a process of its own: `python -m tests.test_dist FOLDER`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import dist
from rlhf.config import LaunchConfig
from tests.ranks import ROOT, forbid_unpickling, fork_ranks, fork_until_death
from tests.test_launch import listening


def everything():
    """What one rank sees; with nothing unpickled."""
    forbid_unpickling()
    rank = int(os.environ["RANK"])
    mine = {"rank": rank, "tensor": torch.arange(5.0 * rank), "text": "x" * 1000 * rank, "none": (None,)}
    begun = dist._collectives()
    gathered = dist.gather_objects(mine)
    return {
        "sizes": [(one["rank"], one["tensor"].tolist(), len(one["text"]), one["none"]) for one in gathered],
        "sent": [dist.broadcast_object(f"from {rank}" * 99 if rank == 0 else None), dist.broadcast_object(rank)],
        "collectives": dist._collectives() - begun,
        "listening": sorted(listening(os.getpid())),
    }


def stop_the_second(rank):
    """Rank 0 waits for rank 1, which is stopped."""
    dist.start("cpu", launch=LaunchConfig(warn_after_s=1, timeout_s=4))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def main(folder):
    (folder / "found.json").write_text(json.dumps(fork_ranks(everything, 2)))
    (folder / "statuses.json").write_text(json.dumps(fork_until_death(stop_the_second, 2)))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.test_dist", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {file.stem: json.loads(file.read_text()) for file in folder.iterdir()} | {"said": done.stderr}


def test_objects_reach_every_rank_in_order_and_nothing_is_unpickled(ranks):
    for found in ranks["found"]:
        assert found["sizes"] == [[0, [], 0, [None]], [1, [0, 1, 2, 3, 4], 1000, [None]]]
        assert found["sent"] == ["from 0" * 99, 0]


def test_every_rank_has_begun_the_same_collectives(ranks):
    first, second = (found["collectives"] for found in ranks["found"])
    assert first == second > 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ranks_of_one_machine_are_closed_to_others(ranks):
    assert [found["listening"] for found in ranks["found"]] == [["0100007F"]] * 2


def test_a_stopped_rank_is_named_and_ends_the_run(ranks):
    assert ranks["statuses"] == [1, -signal.SIGKILL]  # the second is ended by whoever started both
    warning, end = [line for line in ranks["said"].splitlines() if line.startswith("rank 1 (pid ")][-2:]
    assert ", stopped) has" in warning
    assert " for 1 s; after launch.timeout_s=4 seconds the run ends" in warning
    assert "longer than launch.timeout_s=4, so the run ends" in end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
