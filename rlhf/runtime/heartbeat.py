"""Finds the rank that the others wait for, names it in a warning, and ends a run that waits too long.

In every rank a thread writes heartbeats into the store of the process group: how many it has written, and how many
collectives the main thread has begun. A rank is missing when its heartbeats stop (it was stopped, or its machine is
gone), or when it has begun fewer collectives than others for a while. It may still be computing, so a warning comes
first. A machine that is gone breaks its connections (`network.py`), and `lost` says who is missing then.
`launch.py` reads the heartbeats of the ranks it started. Under other launchers every rank reads them, on every machine,
and the first rank that is not missing reports.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime.errors import RunError
from rlhf.runtime.network import GONE_AFTER_S, notice_lost_machines

log = logging.getLogger(__name__)

_LEFT = "left"
_CAUSE = "cause"
"""Key in the store: who is gone, once a rank knows it."""
_LONGEST_INTERVAL_S = 5.0
_POLLS_FOR_OTHERS = 4
"""Polls that the main thread has for ending by its own error, after the store is gone."""
_STATES = {"R": "running", "S": "waiting", "D": "waiting for a disk", "T": "stopped", "t": "stopped by a debugger"}


def interval(launch: LaunchConfig) -> float:
    """Seconds between two heartbeats, and between two polls."""
    return min(_LONGEST_INTERVAL_S, launch.warn_after_s / 4)


_BROKEN = re.compile(
    "Connection (closed|reset)|Connection was likely closed|Connection timed out|Broken pipe|failed to recv|"
    "No route to host|Network is unreachable|ncclRemoteError|ncclSystemError|watchdog"
)
"""What gloo, NCCL and the store say about a peer that is gone."""


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
        self._spare = store.clone()  # for the main thread, while the other is in use
        self._launch, self._interval_s = launch, interval(launch)
        self._beats, self._is_store_gone, self._cause = 0, False, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_store, name="heartbeat-store", daemon=True).start()
        atexit.register(self.stop)  # a thread that is inside the store when Python ends would abort the process

    def stop(self) -> None:
        """Write that this rank has left, and end the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(GONE_AFTER_S)  # a store that does not answer is given up by then
        atexit.unregister(self.stop)

    def lost(self, ranks: Iterable[int]) -> str:
        """Who is gone, for a connection that has broken: whoever sends no heartbeat while this waits for two.

        The first rank that knows it tells the others, whose connections may break because that rank ends.
        """
        if self._cause:
            return self._cause
        before = self._read(ranks)
        self._end.wait(2 * self._interval_s + 1)
        cause = self._cause or self._cause_by(before, self._read(ranks))
        with contextlib.suppress(RuntimeError):  # the store is gone
            if not self._is_store_gone:
                self._spare.set(_CAUSE, cause)
                self._end.wait(2 * self._interval_s)  # until they have read it: the store ends with rank 0
        return cause

    def _cause_by(self, before: dict[int, Any], after: dict[int, Any]) -> str:
        if not after:
            where = os.environ.get("MASTER_ADDR", "its machine")
            return f"rank 0 or its machine ({where}), where the ranks meet, is gone"
        silent = [rank for rank in after if after[rank] == before.get(rank) != _LEFT and rank != self._rank]
        if silent:
            found = ", ".join(_Peer(after[rank]).place(rank) for rank in silent)
            return f"{found}: gone (the process was killed, or its machine or the network has failed)"
        ended = ", ".join(f"rank {rank}" for rank in after if after[rank] == _LEFT)
        return f"{ended or 'another rank'} has ended: its own error is above, or in its log"

    def _read(self, ranks: Iterable[int]) -> dict[int, Any]:
        """The last heartbeat of each rank; empty if the store is gone."""
        if self._is_store_gone:
            return {}
        try:
            keys = {rank: _key(rank) for rank in ranks}
            return {r: json.loads(self._spare.get(key)) for r, key in keys.items() if self._spare.check([key])}
        except RuntimeError:
            return {}

    def _beat(self) -> None:
        try:
            while not self._end.wait(self._interval_s if self._beats else 0):
                self._beats += 1
                notice_lost_machines()
                heartbeat = [self._beats, self._progress(), os.getpid(), socket.gethostname()]
                self._store.set(_key(self._rank), json.dumps(heartbeat))
                if self._store.check([_CAUSE]):
                    self._cause = self._store.get(_CAUSE).decode()
                self._poll()
            self._store.set(_key(self._rank), json.dumps(_LEFT))
        except RuntimeError:  # the store is gone
            self._is_store_gone = True

    def _watch_store(self) -> None:
        """Warn while the store does not answer, which would keep `_beat` from naming anybody; end where it is gone."""
        beats, waited = -1, 0
        while not self._end.wait(self._interval_s):
            waited = 0 if self._beats != beats else waited + 1  # polls, as in `_Peer`
            beats, seconds = self._beats, waited * self._interval_s
            where = f"rank 0's machine ({os.environ.get('MASTER_ADDR')}), where the ranks meet,"
            if self._is_store_gone and waited >= _POLLS_FOR_OTHERS:
                log.error("%s is gone, so the run ends", where)
                os._exit(1)  # the main thread has had the time to end by itself
            if not self._is_store_gone and seconds - self._interval_s < self._launch.warn_after_s <= seconds:
                log.warning("%s has not answered for %.3g s", where, seconds)

    def _poll(self) -> None:
        try:
            if self._monitor is not None:
                self._monitor.poll(reporter=self._rank)
        except RunError as error:
            log.error("%s", error)
            os._exit(1)  # the main thread waits in a collective, which nothing else ends


HEARTBEAT: list[Heartbeat] = []
"""At most one: this process's, while it is one of several ranks."""


def broken_connection(error: BaseException) -> str | None:
    """A sentence that says who is gone, for an error of a collective whose connection broke; None for other errors.

    Waits for some seconds for heartbeats of the others.
    """
    if not isinstance(error, RuntimeError) or not HEARTBEAT or not _BROKEN.search(str(error)):
        return None
    who = HEARTBEAT[0].lost(range(int(os.environ["WORLD_SIZE"])))
    return f"{who}. Start the same command again, on the machines that are left, to go on from the last checkpoint."


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

    def place(self, rank: int) -> str:
        """Where a rank runs, such as "rank 1 (pid 7 on host2)"."""
        _, _, pid, host = self.heartbeat
        return f"rank {rank} (pid {pid}{_state(pid) if host == socket.gethostname() else f' on {host}'})"

    def description(self, rank: int, *, seconds: float) -> str:
        """What is known about a missing rank, such as "rank 1 (pid 7, stopped) has sent no heartbeat for 60 s"."""
        if self.heartbeat is None:
            return f"rank {rank} has not joined the others for {seconds:.3g} s"
        what = "has sent no heartbeat" if 2 * self.silent > self.behind else "has not reached where others wait"
        return f"{self.place(rank)} {what} for {seconds:.3g} s"


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
