"""A log gives back the rows that were written, whatever happened to the process in between."""

import json
from pathlib import Path

import pytest

from rlhf.runtime.errors import RunError
from rlhf.tracking.jsonl_log import JsonlLog


def no_constants(name):
    raise AssertionError(f"{name} is not JSON")


def log_with(tmp_path, *rows):
    log = JsonlLog(tmp_path / "rows.jsonl")
    for row in rows:
        log.append(row)
    return log


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"step": 1, "train/loss": 0.1 + 0.2}, {"step": 2, "text": "línea\n\r\u2028 日本語 \ud800 \x1b[2J"}]
    assert log_with(tmp_path, *rows).rows() == rows


def test_numbers_that_json_lacks_become_null_at_any_depth(tmp_path):
    nan, infinity = float("nan"), float("inf")
    log = log_with(tmp_path, {"step": 1, "a": nan, "b": {"c": [infinity, -infinity, 2.5]}})
    row = json.loads(log.path.read_text(), parse_constant=no_constants)
    assert row == {"step": 1, "a": None, "b": {"c": [None, None, 2.5]}}


def test_rewind_forgets_the_later_rows_and_keeps_the_bytes_of_the_others(tmp_path):
    log = log_with(tmp_path, {"step": 0}, {"step": 1, "x": 1.5})
    before = log.path.read_bytes()
    log.append({"step": 2})
    log.append({"step": 3})
    log.rewind(1)
    assert log.path.read_bytes() == before
    log.append({"step": 2, "again": True})
    assert [row["step"] for row in log.rows()] == [0, 1, 2]
    log.rewind(-1)
    assert log.rows() == []
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("mend", [JsonlLog.repair, lambda log: log.rewind(5)])
def test_a_line_that_a_kill_broke_is_dropped_before_the_next_row(tmp_path, mend):
    log = log_with(tmp_path, {"step": 1}, {"step": 2})
    log.path.write_bytes(log.path.read_bytes()[:-4])
    mend(log)
    log.append({"step": 2, "again": True})
    assert log.rows() == [{"step": 1}, {"step": 2, "again": True}]


def test_reading_leaves_a_half_written_line_to_its_writer(tmp_path):
    log = log_with(tmp_path, {"step": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "tr')
    content = log.path.read_bytes()
    assert JsonlLog(log.path).rows() == [{"step": 1}]
    assert log.path.read_bytes() == content


def test_a_damaged_row_in_the_middle_is_named(tmp_path):
    log = log_with(tmp_path, {"step": 1})
    log.path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not a JSON row"):
        log.rows()


def test_nothing_written_is_no_row_and_no_file(tmp_path):
    log = JsonlLog(tmp_path / "rows.jsonl")
    log.repair()
    log.rewind(3)
    assert log.rows() == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_a_damaged_line_is_not_continued_and_stays_as_it_is(tmp_path):
    log = log_with(tmp_path, {"step": 1}, {"step": 2}, {"step": 3})
    damaged = log.path.read_bytes().replace(b'{"step": 2}', b'{"stdp": 2}')
    log.path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not a JSON row; remove that line"):
        log.repair()
    assert log.path.read_bytes() == damaged


def test_a_line_that_a_kill_broke_is_said(tmp_path, caplog):
    log = log_with(tmp_path, {"step": 1})
    log.path.write_bytes(log.path.read_bytes() + b'{"st')
    log.repair()
    assert "dropped the last line, which was half written (4 bytes)" in caplog.text
    assert list(tmp_path.iterdir()) == [log.path]


def test_rows_without_a_step_are_rows_where_nobody_asks_for_one(tmp_path):
    log = JsonlLog(tmp_path / "rows.jsonl", steps=False)
    log.append({"pair": "a"})
    log.repair()
    assert log.rows() == [{"pair": "a"}]
    assert JsonlLog(log.path).count() == 1
    with pytest.raises(ValueError, match="rows.jsonl:1 is not a JSON row"):
        JsonlLog(log.path).rows()


def test_a_full_disk_is_said_with_the_name_of_the_file():
    log = JsonlLog(Path("/dev/full"))  # Linux: every write finds the disk full
    with pytest.raises(RunError, match="/dev/full cannot be written: No space left on device"):
        log.append({"step": 1})
