"""Finds the rank that the others wait for, names it in a warning, and ends a run that waits too long.

In every rank a thread writes heartbeats into the store of the process group: how many it has written, and how many
collectives the main thread has begun. A rank is missing when its heartbeats stop (it was stopped, or its machine is
gone), or when it has begun fewer collectives than others for a while. It may still be computing, so a warning comes
first. `launch.py` reads the heartbeats of the ranks it started. Under torchrun every rank reads them, on every machine,
and the first rank that is not missing reports.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime.errors import RunError

log = logging.getLogger(__name__)

_LEFT = "left"
_LONGEST_INTERVAL_S = 5.0
_STATES = {"R": "running", "S": "waiting", "D": "waiting for a disk", "T": "stopped", "t": "stopped by a debugger"}


def interval(launch: LaunchConfig) -> float:
    """Seconds between two heartbeats, and between two polls."""
    return min(_LONGEST_INTERVAL_S, launch.warn_after_s / 4)


class Heartbeat:
    """A thread that writes this rank's heartbeats and, with a `monitor`, polls those of the others."""

    def __init__(
        self, store: Any, rank: int, *, progress: Callable[[], int], launch: LaunchConfig, monitor: RankMonitor | None
    ) -> None:
        """Start the thread.

        Args:
            store: key-value store of the ranks; a connection of its own, because one that waits blocks other users.
            rank: the rank of this process.
            progress: returns how many collectives this rank has begun.
            launch: how long ranks wait for each other.
            monitor: finds missing ranks; None if the launcher does.
        """
        self._store, self._rank, self._progress, self._monitor = store, rank, progress, monitor
        self._interval_s = interval(launch)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread that is inside the store when Python ends would abort the process

    def stop(self) -> None:
        """Write that this rank has left, and end the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.stop)

    def _beat(self) -> None:
        beats = 0
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever would read
            while not self._end.wait(self._interval_s if beats else 0):
                beats += 1
                heartbeat = [beats, self._progress(), os.getpid(), socket.gethostname()]
                self._store.set(_key(self._rank), json.dumps(heartbeat))
                self._poll()
            self._store.set(_key(self._rank), json.dumps(_LEFT))

    def _poll(self) -> None:
        try:
            if self._monitor is not None:
                self._monitor.poll(reporter=self._rank)
        except RunError as error:
            log.error("%s", error)
            os._exit(1)  # the main thread waits in a collective, which nothing else ends


@dataclass
class _Peer:
    """The last heartbeat of a rank.

    `silent` and `behind` count polls instead of seconds, so that no time passes while the polling process is stopped.
    """

    heartbeat: Any = None
    silent: int = 0
    behind: int = 0

    @property
    def progress(self) -> int:
        return -1 if self.heartbeat is None else int(self.heartbeat[1])

    def update(self, heartbeat: Any) -> None:
        """Set the newest heartbeat, before the ranks are compared."""
        self.silent = self.silent + 1 if heartbeat == self.heartbeat else 0
        if self.heartbeat is not None and heartbeat[1] != self.heartbeat[1]:
            self.behind = 0
        self.heartbeat = heartbeat

    def description(self, rank: int, *, seconds: float) -> str:
        """What is known about a missing rank, such as "rank 1 (pid 7, stopped) has sent no heartbeat for 60 s"."""
        if self.heartbeat is None:
            return f"rank {rank} has not joined the others for {seconds:.3g} s"
        _, _, pid, host = self.heartbeat
        where = f"pid {pid}{_state(pid)}" if host == socket.gethostname() else f"pid {pid} on {host}"
        what = "has sent no heartbeat" if 2 * self.silent > self.behind else "has not reached where others wait"
        return f"rank {rank} ({where}) {what} for {seconds:.3g} s"


class RankMonitor:
    """Finds missing ranks by their heartbeats."""

    def __init__(self, store: Any, ranks: Iterable[int], *, launch: LaunchConfig) -> None:
        """Take a `store` as a `Heartbeat` does; `poll` must be called every `interval(launch)` seconds."""
        self._store, self._launch = store, launch
        self._peers = {rank: _Peer() for rank in ranks}
        self._named: set[int] = set()

    def poll(self, *, reporter: int | None = None) -> None:
        """Read all heartbeats, and log a warning about ranks that were not missing at the last poll.

        Args:
            reporter: this rank, which logs only if it is the first that is not missing; None always logs.

        Raises:
            RunError: a rank has been missing for too long.
        """
        for rank in list(self._peers):
            self._read(rank)
        # A rank is behind only while another has begun more collectives: a long computation of all ranks is fine.
        ahead = max((peer.progress for peer in self._peers.values()), default=0)
        for peer in self._peers.values():
            peer.behind = peer.behind + 1 if peer.progress < ahead else 0
        each = interval(self._launch)
        waited = {rank: max(peer.silent, peer.behind) * each for rank, peer in self._peers.items()}
        missing = {rank: seconds for rank, seconds in waited.items() if seconds >= self._launch.warn_after_s}
        if reporter is None or reporter == min(self._peers.keys() - missing, default=None):
            self._report(missing)
        self._named = set(missing)

    def _read(self, rank: int) -> None:
        heartbeat = json.loads(self._store.get(_key(rank))) if self._store.check([_key(rank)]) else None
        if heartbeat == _LEFT:
            del self._peers[rank]
        else:
            self._peers[rank].update(heartbeat)

    def _report(self, missing: dict[int, float]) -> None:
        limit = self._launch.timeout_s
        texts = [self._peers[rank].description(rank, seconds=seconds) for rank, seconds in missing.items()]
        if max(missing.values(), default=0) >= limit:
            raise RunError(f"{'; '.join(texts)}, longer than launch.timeout_s={limit:g}, so the run ends")
        if missing.keys() - self._named:
            log.warning("%s; after launch.timeout_s=%g seconds the run ends", "; ".join(texts), limit)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _state(pid: int) -> str:
    """What a process on this machine is doing, such as ", stopped"; empty if that is not known."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has ended, or this is not Linux
        return ""
    return f", {_STATES[letter]}" if letter in _STATES else ""
