"""Ends a process when its parent ends, even while it is still importing.

Otherwise a killed run would leave ranks behind that go on writing next to those of the next run. Imports only the
standard library, because `run_pipeline.py` calls this before it imports anything large.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHER = "RLHF_LAUNCHER"
"""Environment variable with the process id of the launcher, in the ranks that it started."""
_LIBC = ctypes.CDLL(None)  # opened here, because loading it between fork and exec could deadlock
_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LOOKS = 1.0


def end_with_launcher() -> None:
    """In a rank, end when the launcher does, ours or torchrun; in other processes, do nothing.

    Other launchers are not followed: some start ranks from a thread that ends, which Linux counts as the parent's end.
    """
    if LAUNCHER in os.environ:
        end_with_parent(int(os.environ[LAUNCHER]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """Make this process end when `parent`, the process that started it, does; at once if it already has.

    On Linux the kernel kills it, whatever it is doing, also after an `exec`. Elsewhere a thread polls.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before the request, which then comes too late
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)
