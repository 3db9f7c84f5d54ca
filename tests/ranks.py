"""Run a function on several gloo ranks of this machine and bring the results back.

Ranks are forked from a process that has imported everything (`forking.py`) and computed nothing yet, for a fork takes
no threads along.
"""

import pickle
import sys
import tempfile
from pathlib import Path

import torch

from rlhf.runtime import dist
from tests.forking import fork_until_death, run_forked


def run_on_ranks(function, ranks, *args):
    """Results of `function(*args)` on each of `ranks` processes, in the order of the ranks.

    The function must be importable (top level of its module). An exception on a rank fails the caller.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call"
        call.write_bytes(pickle.dumps((function, ranks, *args)))
        done = run_forked("tests/ranks.py", call)
        sys.stderr.write(done.stdout + done.stderr)
        assert done.returncode == 0, done.stderr
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


def forbid_unpickling():
    """From now on this process may not unpickle anything."""

    def refuse(*args, **options):
        raise AssertionError("a rank unpickles")

    pickle.load = pickle.loads = pickle.Unpickler = refuse
    torch.distributed.distributed_c10d._unpickler = refuse


def _answer(call):
    function, ranks, *args = pickle.loads(call.read_bytes())
    call.write_bytes(pickle.dumps(fork_ranks(function, ranks, *args)))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
