"""Which rank is named, when, and by whom: a store that is a dictionary, and looks that are a second apart."""

import json
import os
import socket

import pytest

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime.errors import RunError
from rlhf.runtime.heartbeat import RankMonitor, interval

LAUNCH = LaunchConfig(warn_after_s=4, timeout_s=8)


class Store(dict):
    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()

    def sign(self, rank, beat, progress):
        self[f"heartbeat/{rank}"] = json.dumps([beat, progress, os.getpid(), socket.gethostname()])


def looks(seconds, *, ranks=2, reporter=None, **signs):
    """Look once a second at ranks whose beat and progress are `signs["rank0"](second)` and so on."""
    store = Store()
    monitor = RankMonitor(store, range(ranks), launch=LAUNCH)
    for second in range(seconds):
        for rank in range(ranks):
            if f"rank{rank}" in signs:
                store.sign(rank, *signs[f"rank{rank}"](second))
        monitor.poll(reporter=reporter)


def test_looks_are_a_second_apart():
    assert interval(LAUNCH) == 1
    assert interval(LaunchConfig()) == 5


def test_a_rank_that_is_stopped_is_named_once_and_then_ends_the_run(caplog):
    signs = {"rank0": lambda second: (second, 7), "rank1": lambda second: (0, 7)}
    looks(4, **signs)
    assert caplog.messages == []
    looks(8, **signs)
    (message,) = caplog.messages
    assert message == (
        f"rank 1 (pid {os.getpid()}, running) has sent no heartbeat for 4 s; "
        "after launch.timeout_s=8 seconds the run ends"
    )
    with pytest.raises(
        RunError, match=r"rank 1 .* sent no heartbeat for 8 s, longer than launch\.timeout_s=8, so the run"
    ):
        looks(9, **signs)


def test_a_rank_that_does_not_come_to_where_others_wait_is_named(caplog):
    looks(5, rank0=lambda second: (second, 7), rank1=lambda second: (second, 6))
    assert "rank 1" in caplog.text
    assert "has not reached where others wait for 4 s" in caplog.text
    assert "rank 0" not in caplog.text


def test_a_long_computation_of_all_ranks_is_no_news(caplog):
    looks(99, rank0=lambda second: (second, 7), rank1=lambda second: (second, 7))
    looks(99, rank0=lambda second: (second, second), rank1=lambda second: (second, second - 1))  # always a bit behind
    assert caplog.messages == []


def test_the_wait_counts_from_when_the_others_arrived(caplog):
    looks(12, rank0=lambda second: (second, 7 if second >= 10 else 6), rank1=lambda second: (second, 6))
    assert caplog.messages == []


def test_a_rank_that_never_came_is_named(caplog):
    looks(5, rank0=lambda second: (second, -1))
    assert "rank 1 has not joined the others for 4 s" in caplog.text


def test_a_rank_that_has_left_is_not_missing(caplog):
    store = Store()
    monitor = RankMonitor(store, range(2), launch=LAUNCH)
    for second in range(20):
        store.sign(0, second, 7)
        store["heartbeat/1"] = json.dumps("left")
        monitor.poll()
    assert caplog.messages == []


@pytest.mark.parametrize(("reporter", "reports"), [(0, False), (1, True), (2, False)])
def test_the_first_rank_that_is_not_missing_reports(caplog, reporter, reports):
    there = {"rank1": lambda second: (second, 7), "rank2": lambda second: (second, 7)}
    looks(5, ranks=3, reporter=reporter, rank0=lambda second: (0, 7), **there)
    assert bool(caplog.messages) == reports


def test_a_rank_that_returns_and_goes_again_is_named_again(caplog):
    looks(12, rank0=lambda second: (second, 7), rank1=lambda second: (0 if second < 6 else 1, 7))
    assert len(caplog.messages) == 2
