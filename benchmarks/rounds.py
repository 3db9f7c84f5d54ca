"""Contenders in processes of their own, possibly of other Pythons, that take turns: one computes while the others wait.

So what else happens on the machine meets all of them alike. Each is started once and keeps its model between turns.
The contender's side, `Turns`, needs nothing but the standard library. Left out: what a turn does, and judging it.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
_LAST = 3000  # characters of a contender's log that are shown when it fails


class Turns:
    """A contender's side: waits for its turn, and reports what it has measured in it."""

    def __init__(self) -> None:
        # What the contender's packages print goes to its log; the pipe is for reports alone.
        self._reports = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # it is killed in the end

    def report(self, found: dict[str, Any]) -> None:
        """Report this turn and wait for the next one; the process ends where there is none."""
        self._reports.write(json.dumps(found) + "\n")
        if not sys.stdin.readline():
            sys.exit()


class Steps:
    """Counts the steps of a contender, and ends a turn after so many of them."""

    def __init__(self, turns: Turns, count: int) -> None:
        """Begin with a turn that is not counted, for what only the first steps do."""
        self._turns, self._count = turns, count
        self._begin()

    def done(self, loss: float) -> None:
        """A step is done; its loss."""
        self._losses.append(loss)
        if len(self._losses) == self._count:
            cpu = (time.process_time() - self._start) / self._count
            self._turns.report({"cpu_seconds": cpu, "losses": self._losses})
            self._begin()

    def _begin(self) -> None:
        self._losses: list[float] = []
        self._start = time.process_time()


class Contender:
    """The side of the benchmark: a process that computes when it is told to."""

    def __init__(self, command: Sequence[str], *, log: Path, variables: dict[str, str] | None = None) -> None:
        """Start `command`, whose output goes to `log`, with more environment variables."""
        self._log, environment = log, {**os.environ, **_ENVIRONMENT, **(variables or {})}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def wait(self) -> dict[str, Any]:
        """What it reports of the turn in which it is.

        Raises:
            RuntimeError: it has ended; the end of its log.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._log.stem} ended with {self._process.wait()}:\n{self._log.read_text()[-_LAST:]}")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        """Let it have a turn."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.wait()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def alternate(starts: dict[str, Callable[[], Contender]], *, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each contender reports of every round, after one to warm up; the order changes from round to round."""
    contenders: dict[str, Contender] = {}
    try:
        for name, start in starts.items():
            contenders[name] = start()
            contenders[name].wait()  # one after the other: memory bandwidth is shared
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for number in range(rounds):
            names = [*contenders]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                found[name].append(contenders[name].turn())
    finally:
        for contender in contenders.values():
            contender.close()
    return found
