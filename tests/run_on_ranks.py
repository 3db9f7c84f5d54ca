"""Run a function on several gloo ranks of this machine and bring the results back."""

import os
import pickle
import socket
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp

from rlhf import dist


def run_on_ranks(function, ranks, *args):
    """Results of `function(*args)` on each of `ranks` spawned processes, in the order of the ranks.

    The function must be importable (top level of its module). An exception on a rank fails the caller.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (ranks, port, folder, function, args), nprocs=ranks, join=True)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _worker(rank, ranks, port, folder, function, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = dist.start("cpu")
    result = function(*args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    assert world.size == ranks
    dist.stop()
