"""One start of two ranks and one of four for all tests of the engine."""

import fcntl
import os
import pickle

import pytest

from tests.engine import scenarios
from tests.ranks import run_on_ranks

BOTH = (
    "parity peeked tied odd adapters micro_batches bf16 bf16_sums loading spoiled hybrid low_rank frozen "
    "offload_optimizer failing_disks offload_param"
)
PARTS = {
    1: BOTH,
    2: BOTH + " at_rest one_sided reductions",
    4: "parity odd micro_batches loading offload_optimizer offload_param",
}


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """`on_ranks(ranks)[rank][part]`: what `scenarios.part` returned there."""
    started = {}
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def results(ranks):
        if ranks not in started:
            started[ranks] = None  # ranks that fail once would fail every test
            started[ranks] = _shared(folder, ranks)
        assert started[ranks], f"{ranks} ranks failed before: see the first error"
        return started[ranks]

    return results


def _shared(folder, ranks):
    """The first worker that needs the ranks starts them; the others wait for what it finds."""
    found = folder / f"ranks{ranks}.pickle"
    with found.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_bytes(pickle.dumps(_start(ranks)))
        return pickle.loads(found.read_bytes())


def _start(ranks):
    parts = PARTS[ranks].split()
    return [scenarios.everything(parts)] if ranks == 1 else run_on_ranks(scenarios.everything, ranks, parts)
