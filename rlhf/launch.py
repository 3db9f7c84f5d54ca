"""Start the ranks of a run: one process here, or torchrun with several.

The configuration is composed once and written to a file; the workers are handed that file, so that no rank can compute
a different one. Left out: several machines (start torchrun on each; `rlhf/dist.py` joins them).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch


def under_torchrun() -> bool:
    """True when a launcher has said which rank this process is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def use_threads(threads: int, *, ranks: int) -> int:
    """Set the CPU threads of this process; 0 shares the cores between the `ranks` of this machine."""
    chosen = threads or max(1, (os.cpu_count() or 1) // ranks)
    torch.set_num_threads(chosen)
    return chosen


def run_ranks(script: Path, *arguments: str, ranks: int) -> int:
    """Run `script` under torchrun on this machine and return its exit status.

    Args:
        script: Python file that each rank runs.
        *arguments: its command line.
        ranks: number of processes.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # In a session of its own, so that Ctrl-C reaches it once, through us: a second signal makes it drop its workers.
    with subprocess.Popen([*command, str(script), *arguments], env=environment, start_new_session=True) as torchrun:
        try:
            return torchrun.wait()
        except KeyboardInterrupt:
            torchrun.terminate()  # it stops its workers; killed, it would leave them behind
            torchrun.wait()
            raise
