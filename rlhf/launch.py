"""Start the ranks of a run: one process here, or torchrun with several.

The configuration is composed once and written to a file; the workers are handed that file, so that no rank can compute
a different one. Left out: several machines (start torchrun on each; `rlhf/dist.py` joins them).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

_LIBC = ctypes.CDLL(None)  # opened before a fork, after which little may be done
_PR_SET_PDEATHSIG = 1


def under_torchrun() -> bool:
    """True when a launcher has said which rank this process is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_ranks(ranks: int) -> int:
    """How many of a run's `ranks` are on this machine: all of them, unless torchrun says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def use_threads(threads: int, *, ranks: int) -> int:
    """Set the CPU threads of this process; 0 shares the cores between the `ranks` of this machine."""
    chosen = threads or max(1, (os.cpu_count() or 1) // ranks)
    torch.set_num_threads(chosen)
    return chosen


def run_ranks(script: Path, *arguments: str, ranks: int) -> int:
    """Run `script` under torchrun on this machine and return its exit status.

    An interrupt is passed on as SIGTERM to each rank, and raised again when all have ended.

    Args:
        script: Python file that each rank runs.
        *arguments: its command line.
        ranks: number of processes.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # In a session of its own, so that Ctrl-C reaches its workers once, through us, and not torchrun, which would kill
    # them after half a minute.
    with subprocess.Popen(
        [*command, str(script), *arguments], env=environment, start_new_session=True, preexec_fn=end_with_parent
    ) as torchrun:
        try:
            return torchrun.wait()
        except KeyboardInterrupt:
            _stop_workers(torchrun)
            raise


def end_with_parent() -> None:
    """Have this process killed when the one that started it ends (Linux).

    A killed run then leaves no ranks behind, which would go on writing beside those of the next one.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop_workers(torchrun: subprocess.Popen[bytes]) -> None:
    """Ask the workers to end, and wait for them; another interrupt ends torchrun, and with it the workers."""
    workers = _children_of(torchrun.pid)
    try:
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        if not workers:
            torchrun.terminate()
        torchrun.wait()
    except KeyboardInterrupt:
        torchrun.kill()
        torchrun.wait()


def _children_of(parent: int) -> list[int]:
    """Processes that `parent` has started (Linux; elsewhere none are known)."""
    children = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = file.read_text().rpartition(")")[2].split()
            children += [int(file.parent.name)] if int(fields[1]) == parent else []
    return children
