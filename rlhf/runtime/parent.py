"""End a process when the one that started it has ended, also while it still imports.

A killed run then leaves no ranks behind, which would go on writing beside those of the next one. Imports only the
standard library: `run_pipeline.py` calls this before it imports anything large.
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
_LIBC = ctypes.CDLL(None)  # opened before a fork, after which little may be done
_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LOOKS = 1.0


def end_with_launcher() -> None:
    """In a rank: end with the launcher, ours or torchrun; other processes are left as they are.

    Other launchers are not followed: some start ranks from a thread that ends, which Linux counts as the parent's end.
    """
    if LAUNCHER in os.environ:
        end_with_parent(int(os.environ[LAUNCHER]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """Have this process killed when `parent`, the process that started it, ends; at once where it already has.

    On Linux the kernel does it, whatever this process is doing, and goes on after an `exec`. Elsewhere a thread looks.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)
