"""One start of two ranks and one of four for all tests of this room."""

from functools import cache

import pytest

from tests.engine import scenarios
from tests.run_on_ranks import run_on_ranks

PARTS = {
    1: "parity tied odd adapters micro_batches bf16 loading spoiled hybrid low_rank resumed frozen",
    2: "parity tied odd adapters micro_batches bf16 loading spoiled hybrid low_rank resumed frozen one_sided",
    4: "parity odd micro_batches loading",
}


@pytest.fixture(scope="session")
def on_ranks():
    """`on_ranks(ranks)[rank][part]`: what `scenarios.part` returned there."""

    @cache
    def results(ranks):
        parts = PARTS[ranks].split()
        if ranks == 1:
            return [scenarios.everything(parts)]
        return run_on_ranks(scenarios.everything, ranks, parts)

    return results
