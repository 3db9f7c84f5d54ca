"""A killed run's log ends with its last whole record, and nothing else is changed."""

import pytest

from rlhf.tracking.wandb import cut_torn_record

HEADER, BLOCK = b":W&B\xe1\xbe\x00", 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def fragment(kind, length, *, known=True):
    return b"\0" * 4 + length.to_bytes(2, "little") + bytes([kind if known else 9]) + b"x" * length


SMALL = HEADER + fragment(FULL, 100)
# 5 bytes are left of the first block, too few for the label of another fragment.
FILLED = SMALL + fragment(FULL, BLOCK - len(SMALL) - 7 - 5) + b"\0" * 5
# A record over three blocks, after the small one.
LONG = SMALL + fragment(FIRST, BLOCK - len(SMALL) - 7) + fragment(MIDDLE, BLOCK - 7) + fragment(LAST, 50)


def after(data, folder):
    log = folder / "run-x.wandb"
    log.write_bytes(data)
    return cut_torn_record(log), log.read_bytes()


@pytest.mark.parametrize("data", [SMALL, LONG, FILLED + fragment(FULL, 3)])
def test_a_whole_log_stays_as_it_is(data, tmp_path):
    assert after(data, tmp_path) == (True, data)


@pytest.mark.parametrize(
    "data",
    [
        SMALL + fragment(FULL, 100)[:3],
        SMALL + fragment(FULL, 100)[:-1],
        LONG[: BLOCK + 10],
        LONG[: 2 * BLOCK],
        LONG[:-1],
    ],
)
def test_a_torn_record_goes(data, tmp_path):
    assert after(data, tmp_path) == (True, SMALL)


def test_a_record_after_a_filled_block_is_found(tmp_path):
    whole = FILLED + fragment(FULL, 3)
    assert after(whole + fragment(FULL, 9)[:-1], tmp_path) == (True, whole)


@pytest.mark.parametrize("data", [b"", HEADER[:3], HEADER, SMALL[:-1]])
def test_a_log_without_a_whole_record_says_so(data, tmp_path):
    assert after(data, tmp_path)[0] is False


@pytest.mark.parametrize(
    "data", [b"another format, of a later W&B", SMALL + fragment(FULL, 5, known=False) + fragment(FULL, 9)[:-1]]
)
def test_what_is_written_in_another_way_is_left_alone(data, tmp_path):
    assert after(data, tmp_path) == (True, data)
