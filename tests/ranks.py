"""Run a function on several gloo ranks of this machine and bring the results back.

Ranks are forked from a process that has imported everything, because starting python takes longest. It must have
computed nothing yet, for a fork takes no threads along: `run_on_ranks` starts one, scripts of their own are one.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rlhf.runtime import dist
from rlhf.runtime.process import end_with_parent

ROOT = Path(__file__).parents[1]


def run_on_ranks(function, ranks, *args):
    """Results of `function(*args)` on each of `ranks` processes, in the order of the ranks.

    The function must be importable (top level of its module). An exception on a rank fails the caller.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps((function, ranks, *args)))
        subprocess.run([sys.executable, "-m", "tests.ranks", call], cwd=ROOT, check=True)
        return pickle.loads(call.read_bytes())


def fork_ranks(function, ranks, *args, alone=False):
    """The same, in a process that may be forked; with `alone`, a process that is no rank."""
    with tempfile.TemporaryDirectory() as folder:

        def work(rank):
            if not alone:
                dist.start("cpu")
            result = function(*args)
            (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
            dist.stop()

        statuses = fork_until_death(work, ranks, alone=alone)
        assert not any(statuses), f"exit statuses of {function.__name__} on {ranks} ranks: {statuses}"
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def fork_until_death(work, ranks, *, alone=False):
    """Exit status of `work(rank)` in each forked rank, negative for a signal, which ends the others as well."""
    store, place = (None, {}) if alone else dist.host_store()
    children, parent = {}, os.getpid()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            end_with_parent(parent)
            if not alone:
                os.environ |= place | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _end_with(work, rank)
        children[child] = rank
    statuses = [0] * ranks
    while children:
        child, status = os.wait()
        statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:  # as the launcher does
            for other in children:
                os.kill(other, signal.SIGKILL)
    del store  # the ranks met there
    return statuses


def forbid_unpickling():
    """From now on this process may not unpickle anything."""

    def refuse(*args, **options):
        raise AssertionError("a rank unpickles")

    pickle.load = pickle.loads = pickle.Unpickler = refuse
    torch.distributed.distributed_c10d._unpickler = refuse


def _end_with(work, rank):
    torch.set_num_threads(1)
    status = 1
    try:
        work(rank)
        status = 0
    except SystemExit as end:  # with a status, or with a sentence, as `sys.exit` takes either
        status = end.code if isinstance(end.code, int) else 1
        sys.stderr.write("" if isinstance(end.code, int) else f"{end.code}\n")
    except BaseException:  # noqa: BLE001 - whatever it was, this process must end here
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _answer(call):
    function, ranks, *args = pickle.loads(call.read_bytes())
    call.write_bytes(pickle.dumps(fork_ranks(function, ranks, *args)))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
