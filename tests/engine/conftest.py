"""One start of two ranks and one of four for all tests of this room."""

import pytest

from tests.engine import scenarios
from tests.run_on_ranks import run_on_ranks

BOTH = (
    "parity peeked tied odd adapters micro_batches bf16 loading spoiled hybrid low_rank resumed frozen "
    "tiers failing_disks resting"
)
PARTS = {1: BOTH, 2: BOTH + " at_rest one_sided", 4: "parity odd micro_batches loading tiers resting"}


@pytest.fixture(scope="session")
def on_ranks():
    """`on_ranks(ranks)[rank][part]`: what `scenarios.part` returned there."""
    started = {}

    def results(ranks):
        if ranks not in started:
            started[ranks] = None  # ranks that fail once would fail every test
            started[ranks] = _start(ranks)
        assert started[ranks], f"{ranks} ranks failed before: see the first error"
        return started[ranks]

    return results


def _start(ranks):
    parts = PARTS[ranks].split()
    return [scenarios.everything(parts)] if ranks == 1 else run_on_ranks(scenarios.everything, ranks, parts)
