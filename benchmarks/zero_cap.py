"""A limit for the memory of some processes: a control group of version 1 or 2, or else `prlimit`.

A control group counts what is resident, page cache included, and kills what goes beyond; `prlimit --data` counts
private memory whether it is touched or not, and refuses more of it. Left out: swap, which the limit does not cover.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


class MemoryCap:
    """`with MemoryCap(n) as cap:` processes started by `cap.command() + [...]` have n bytes together."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._group: Path | None = None
        self.kind = "prlimit --data"

    def __enter__(self) -> Self:
        name = f"zero-{os.getpid()}"
        if (_V1 / "memory.limit_in_bytes").exists() and os.access(_V1, os.W_OK):
            self.kind, self._group, limit, self._peak = "cgroup v1", _V1 / name, "limit_in_bytes", "max_usage_in_bytes"
        elif "memory" in _words(_V2 / "cgroup.subtree_control") and os.access(_V2, os.W_OK):
            self.kind, self._group, limit, self._peak = "cgroup v2", _V2 / name, "max", "peak"
        if self._group is not None:
            self._group.mkdir()
            (self._group / f"memory.{limit}").write_text(str(self.nbytes))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._group is not None:
            self._group.rmdir()

    def command(self) -> list[str]:
        """What to put before a command so that it runs within the limit."""
        if self._group is None:
            return ["prlimit", f"--data={self.nbytes}"]
        return ["sh", "-c", f'echo $$ > {self._group}/cgroup.procs && exec "$@"', "sh"]

    def highest(self) -> int | None:
        """The most bytes that were in use, page cache included; None where nobody counts."""
        return None if self._group is None else int((self._group / f"memory.{self._peak}").read_text())


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []
