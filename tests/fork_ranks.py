"""Run a function on ranks that are forked from a process which has imported everything: starting python takes longest.

For scripts of their own, which have computed nothing yet: a fork takes no threads along.
"""

import os
import pickle
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch

from rlhf import dist


def fork_ranks(function, ranks, *args, alone=False):
    """Results of `function(*args)` on each of `ranks` forked processes; with `alone`, one that is no rank."""
    with tempfile.TemporaryDirectory() as folder:

        def work(rank):
            result = function(*args)
            (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
            dist.stop()

        statuses = fork_until_death(work, ranks, alone=alone)
        assert not any(statuses), f"exit statuses of {function.__name__} on {ranks} ranks: {statuses}"
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def fork_until_death(work, ranks, *, alone=False):
    """Exit status of `work(rank)` in each forked rank, negative for a signal, which ends the others as well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            if not alone:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _end_with(work, rank)
        children[child] = rank
    statuses = [0] * ranks
    while children:
        child, status = os.wait()
        statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:  # as torchrun does
            for other in children:
                os.kill(other, signal.SIGKILL)
    return statuses


def _end_with(work, rank):
    torch.set_num_threads(1)
    status = 1
    try:
        work(rank)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001 - whatever it was, this process must end here
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)
