"""Starts the ranks of a run on this machine, watches them, and reports which one failed and how.

The configuration is composed once and written to a file, which every rank reads, so that no rank can compute another.
For several machines, start torchrun on each; `dist.py` joins them.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime.dist import host_store
from rlhf.runtime.errors import RunError
from rlhf.runtime.heartbeat import RankMonitor, interval
from rlhf.runtime.process import LAUNCHER, end_with_parent

Worker = subprocess.Popen[bytes]

_GRACE_S = 30.0  # for the other ranks to log their own errors, once one has failed
_SECONDS_BETWEEN_POLLS = 0.1
_CAUSES: dict[int, str] = {
    signal.SIGKILL: "often out of memory",
    signal.SIGBUS: "often a full /dev/shm or disk",
    signal.SIGSEGV: "a crash in compiled code",
    signal.SIGABRT: "aborted by compiled code, whose message is above",
    signal.SIGILL: "an instruction that this processor does not have",
}


def under_torchrun() -> bool:
    """True when a launcher has set which rank this process is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_ranks(ranks: int) -> int:
    """How many of a run's `ranks` are on this machine: all of them, unless torchrun says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def run_ranks(script: Path, *arguments: str, launch: LaunchConfig) -> str:
    """Run `script` on `launch.ranks` processes of this machine; returns what went wrong, or an empty string.

    An interrupt is passed on to each rank as SIGTERM, and raised again when all have ended.

    Args:
        script: Python file that each rank runs.
        *arguments: its command line.
        launch: how many processes, and how long they wait for each other.
    """
    store, place = host_store()  # lives as long as the ranks
    size = str(launch.ranks)
    # More OpenMP threads than cores would stall each other; each rank then chooses its own (`cores.py`).
    shared = {"OMP_NUM_THREADS": "1", **os.environ, **place, LAUNCHER: str(os.getpid())}
    shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    workers: list[Worker] = []
    watch = partial(_watch, workers, RankMonitor(store, range(launch.ranks), launch=launch), every_s=interval(launch))
    try:
        for rank in map(str, range(launch.ranks)):
            environment = shared | {"RANK": rank, "LOCAL_RANK": rank}
            workers.append(_start([sys.executable, str(script), *arguments], environment))
        return watch()
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()
        watch()
        raise
    finally:  # also after a second interrupt
        for worker in workers:
            worker.kill()  # does nothing to one that has ended
        for worker in workers:
            worker.wait()


def _start(command: list[str], environment: dict[str, str]) -> Worker:
    """Start one rank, in a session of its own, so that Ctrl-C reaches it only once, through us."""
    # On Linux alone: elsewhere a thread would watch the parent, and no thread survives the exec.
    before = partial(end_with_parent, os.getpid()) if sys.platform == "linux" else None
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=before)


def _watch(workers: list[Worker], monitor: RankMonitor, *, every_s: float) -> str:
    """Wait until all ranks have ended, or for `_GRACE_S` after one failed, or until one is missing for too long."""
    problem, deadline, next_poll = "", math.inf, time.monotonic()
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_POLLS)
        if problem:
            continue  # wait for the others to end by themselves
        problem = _failure([worker.poll() for worker in workers])
        if problem:
            deadline = time.monotonic() + _GRACE_S
        elif time.monotonic() >= next_poll:
            next_poll = time.monotonic() + every_s
            try:
                monitor.poll()
            except RunError as error:
                return str(error)
    return problem or _failure([worker.poll() for worker in workers])


def _failure(statuses: list[int | None]) -> str:
    """What failed, by the ranks' exit statuses; a rank that a signal killed is the cause of the others' failures."""
    failed = {rank: status for rank, status in enumerate(statuses) if status}
    if not failed:
        return ""
    rank = min(failed, key=lambda rank: failed[rank])  # signals have negative numbers
    if failed[rank] > 0:
        return f"rank {rank} has failed: its own error is above"
    number = -failed[rank]
    name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
    return f"rank {rank} was killed ({', '.join(filter(None, (name, _CAUSES.get(number))))})"
