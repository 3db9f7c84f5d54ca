"""Two ranks: what they send each other, where they listen, and that one which is stopped is named.

Started once as a process of its own: `python -m tests.runtime.test_dist FOLDER`.
"""

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from rlhf.config.run_config import LaunchConfig
from rlhf.engine.checkpoint.checkpoint_state import random_state
from rlhf.runtime import dist, launch
from rlhf.runtime.heartbeat import RankMonitor, interval
from rlhf.runtime.process import LAUNCHER
from tests.forking import ROOT
from tests.ranks import forbid_unpickling, fork_ranks, fork_until_death
from tests.runtime.test_launch import listening


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


SHORT = LaunchConfig(ranks=2, warn_after_s=1, timeout_s=4)


def stop_the_second(rank):
    """Rank 0 waits for rank 1, which is stopped."""
    dist.start("cpu", launch=SHORT)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


class Forked:
    """A rank as the launcher has it."""

    def __init__(self, place, rank):
        self.status = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ |= place | {"WORLD_SIZE": "2", "RANK": str(rank), LAUNCHER: str(os.getppid())}
            stop_the_second(rank)
            os._exit(0)

    def poll(self):
        if self.status is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.status = 1
        return self.status


def watched():
    """The launcher's message about the two ranks, which report nothing themselves."""
    store, place = dist.host_store()
    workers = [Forked(place, rank) for rank in range(2)]
    message = launch._watch(workers, RankMonitor(store, range(2), launch=SHORT), every_s=interval(SHORT))
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    return message


def main(folder):
    (folder / "found.json").write_text(json.dumps(fork_ranks(everything, 2)))
    (folder / "statuses.json").write_text(json.dumps(fork_until_death(stop_the_second, 2)))
    (folder / "watched.json").write_text(json.dumps(watched()))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.runtime.test_dist", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {file.stem: json.loads(file.read_text()) for file in folder.iterdir()} | {"message": done.stderr}


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
    warning, end = [line for line in ranks["message"].splitlines() if line.startswith("rank 1 (pid ")][:2]
    assert ", stopped) has" in warning
    assert " for 1 s; after launch.timeout_s=4 seconds the run ends" in warning
    assert "longer than launch.timeout_s=4, so the run ends" in end


def test_the_launcher_names_a_stopped_rank_of_its_own_and_the_ranks_leave_it_to_that(ranks):
    assert ranks["watched"].startswith("rank 1 (pid ")
    assert ranks["watched"].endswith(" for 4 s, longer than launch.timeout_s=4, so the run ends")
    assert ranks["message"].count("longer than launch.timeout_s") == 1  # where nobody watched


# ---- messages: they come back as they were, and cannot name code


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -(1 << 80), 0.1, 5e-324, math.inf, "", "\u2028 \ud800 \N{GRINNING FACE}"),
        *([], (), {}, [(), [[]], {}], {3: [1, 2], "3": (None,), (1, 2): {"tensor": ["dict", "tuple"]}}),
    ],
    ids=repr,
)
def test_plain_values_come_back_with_their_types(value):
    found = dist.from_bytes(dist.to_bytes(value))
    assert repr(found) == repr(value)
    assert type(found) is type(value)


def test_tensors_come_back_bit_for_bit():
    bits = torch.randint(0, 256, (7, 16), dtype=torch.uint8)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    tensors = [bits.view(dtype) for dtype in dtypes]  # among them NaNs of all kinds
    tensors += [bits > 99, torch.tensor(3.0), torch.empty(0, 5), bits[:, ::3].T]
    odd = (tensors, "abc", {"last": torch.ones(1)})  # nothing is aligned
    found, text, rest = dist.from_bytes(dist.to_bytes(odd))
    assert (text, rest["last"].item()) == ("abc", 1.0)
    for one, two in zip(tensors, found, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.contiguous().reshape(-1).view(torch.uint8).equal(two.reshape(-1).view(torch.uint8))
    found[0].zero_()  # memory of its own


def test_random_numbers_can_be_sent():
    random.gauss(), np.random.standard_normal()  # each keeps one for later
    state = random_state(torch.device("cpu"))
    assert dist.from_bytes(dist.to_bytes(state)) == state


@pytest.mark.parametrize("value", [LaunchConfig(), {1, 2}, b"bytes", np.float64(1), print, [object()]])
def test_nothing_else_can_be_sent(value):
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        dist.to_bytes(value)


def test_a_pickle_is_no_message():
    with pytest.raises(SafetensorError, match="header"):
        dist.from_bytes(pickle.dumps({"a": 1}) + bytes(100))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
