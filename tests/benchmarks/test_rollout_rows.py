"""Bytes of a small rollout, by hand, and those that two ranks send of it."""

import pytest

from benchmarks.rollout_rows import EPOCHS, Shape, compared, expected, measure

pytestmark = pytest.mark.usefixtures("forked_contenders")

SMALL = Shape(rows=8, prompt=2, response=3, width=4, minibatch=4)
NUMBERS = 3 * 25 + 29  # a mask and six fp32 numbers a token; two int64, three scores and a flag a row
SEQUENCE = 5 * (8 + 1 + 2 * 4)


def test_the_bytes_of_a_row():
    assert SMALL.numbers == NUMBERS
    assert SMALL.sequence == SEQUENCE


def test_what_is_expected_by_hand():
    """Two ranks: of its 4 rows, one sends 2 in each epoch, and receives 1 of the 2 of a minibatch."""
    here, everything = (expected(SMALL, way, ranks=2) for way in ("as here", "everything everywhere"))
    assert here["sent"] == pytest.approx((4 * NUMBERS + EPOCHS * 2 * SEQUENCE) / 1e6)
    assert here["gained"] == pytest.approx((8 * NUMBERS + 1 * SEQUENCE) / 1e6)
    assert everything["sent"] == pytest.approx(4 * (NUMBERS + SEQUENCE) / 1e6)
    assert everything["gained"] == pytest.approx(8 * (NUMBERS + SEQUENCE) / 1e6)


def test_two_ranks_send_what_their_minibatches_need():
    found = measure(SMALL, ranks=2)
    moved = found["as here"]["sent"] * 1e6 - 4 * NUMBERS - 16  # the widths, two int64 that are compared
    assert 0 < moved <= EPOCHS * 4 * SEQUENCE
    assert moved % SEQUENCE == pytest.approx(0, abs=1e-3) or SEQUENCE - moved % SEQUENCE < 1e-3
    assert found["everything everywhere"]["sent"] * 1e6 > 4 * (NUMBERS + SEQUENCE)  # and what describes them
    assert "| as here | 0.0 | 0.0 |" in compared(SMALL, 2, found)
