"""Shares of cores on machines of other shapes, made of files; and that threads really stay on their core."""

import math
import os
import sys
import threading

import pytest
import torch

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime import cores, dist
from rlhf.runtime.dist import World
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="binds threads")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A system of two nodes of four cores each, every core with two hyper-threads: 0 and 8, 1 and 9, ..."""
    for node, text in enumerate(["0-3,8-11", "4-7,12-15"]):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(f"{text}\n")
    for cpu in range(16):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    monkeypatch.setattr(cores, "_SYSTEM", tmp_path)
    return tmp_path


def first_of(share):
    return [core[0] for core in share]


def test_hyper_threads_of_a_core_stay_together_and_what_is_not_allowed_is_left_out(machine):
    assert cores.numa_nodes(set(range(16))) == {
        0: [(0, 8), (1, 9), (2, 10), (3, 11)],
        1: [(4, 12), (5, 13), (6, 14), (7, 15)],
    }
    assert cores.numa_nodes({1, 9, 2}) == {0: [(1, 9), (2,)]}


def test_a_system_without_numa_files_is_one_node(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "_SYSTEM", tmp_path)
    assert cores.numa_nodes({3, 1}) == {0: [(1,), (3,)]}


@pytest.mark.parametrize(
    ("near", "shares"),
    [
        ([-1], [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ([-1] * 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([-1] * 3, [[0, 1], [2, 3], [4, 5, 6, 7]]),
        ([-1] * 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ([1, 1, 0, 0], [[4, 5], [6, 7], [0, 1], [2, 3]]),  # GPUs are not numbered as nodes are
        ([1], [[4, 5, 6, 7]]),
        ([-1] * 10, [[], [0], [1], [2], [3], [], [4], [5], [6], [7]]),  # too many: nobody is bound then
    ],
)
def test_each_rank_has_cores_of_one_node_near_its_device(machine, near, shares):
    assert [first_of(share) for share in cores.shares_of(cores.numa_nodes(set(range(16))), near=near)] == shares


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"}, 4),
        ({}, math.inf),
    ],
)
def test_the_time_that_a_container_may_take(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert cores._quota_of(tmp_path) == expected


def test_lists_of_cores_are_read_and_written():
    assert cores._numbers("0-3,8\n") == {0, 1, 2, 3, 8}
    assert cores._ranges({8, 0, 1, 3, 2}) == "0-3,8"


def test_all_threads_of_a_process_are_bound():
    allowed = sorted(os.sched_getaffinity(0))
    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (ready.set(), done.wait()))
    thread.start()
    ready.wait()
    try:
        cores.bind(allowed[:1])
        assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == {allowed[0]}
    finally:
        cores.bind(allowed)
        done.set()
        thread.join()


def bound(wanted):
    """The cores of a rank, and its threads."""
    cores.use_cores(dist.start("cpu"), LaunchConfig(bind_cores=wanted))
    return sorted(os.sched_getaffinity(0)), torch.get_num_threads()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("wanted", [True, None])
def test_ranks_have_cores_of_their_own_where_that_is_asked_for(wanted):
    first, second = run_on_ranks(bound, 2, wanted)
    allowed = sorted(os.sched_getaffinity(0))
    if wanted or len(allowed) >= 4:
        assert first != second
    else:  # one core each is too few to be bound to
        assert first == second == (allowed, 1)


def test_a_rank_that_the_launcher_has_bound_stays_there(monkeypatch, caplog):
    theirs = [("here", [0, 1], -1), ("here", [2, 3], -1), ("other", [0, 1], -1)]
    monkeypatch.setattr(cores, "gather_objects", lambda mine: theirs)
    monkeypatch.setattr(cores.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(cores, "usable_cores", lambda: {2, 3})
    monkeypatch.setattr(cores, "bind", lambda numbers: pytest.fail("bound again"))
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    cores.use_cores(World(1, 3, torch.device("cpu")), LaunchConfig(bind_cores=True))
    assert chosen == [2]
    assert "cores of its own, which are kept" in caplog.text
