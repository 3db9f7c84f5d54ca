"""Tokenised rows are found again by content, and by nothing else."""

import errno
import hashlib
from pathlib import Path

import numpy as np
import pytest
from pyarrow import feather

from data.rows import BadRow
from data.token_cache import cached, content_key
from rlhf.runtime.errors import RunError
from rlhf.text.tokenize_rows import TokenSequence

TOKENS = [
    [
        TokenSequence(np.array([1, 2, 3], dtype=np.int32), np.array([False, False, True]), 2),
        TokenSequence(np.array([70_000], dtype=np.int32), np.array([True]), 0, (2, 4)),
    ],
    [TokenSequence(np.array([4, 5], dtype=np.int32), np.array([False, True]), 1)],
]


def never():
    raise AssertionError("made although it is stored")


def plain(rows):
    return [[(t.input_ids.tolist(), t.target_mask.tolist(), t.num_prompt, t.rewritten) for t in row] for row in rows]


def test_what_was_stored_is_read_back(tmp_path):
    made = cached(str(tmp_path / "new/folder"), "key", make=lambda: TOKENS)
    found = cached(str(tmp_path / "new/folder"), "key", make=never)
    assert plain(made) == plain(found) == plain(TOKENS)
    assert {(t.input_ids.dtype.name, t.target_mask.dtype.name) for row in found for t in row} == {("int32", "bool")}


def test_nothing_unfinished_is_left_behind(tmp_path):
    cached(str(tmp_path), "key", make=lambda: TOKENS)
    (file,) = tmp_path.iterdir()
    assert file.name == f"key.{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.arrow"
    assert feather.read_table(str(file)).column("input_ids").to_pylist() == [[1, 2, 3], [70_000], [4, 5]]


def test_without_a_folder_nothing_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plain(cached(None, "key", make=lambda: TOKENS)) == plain(TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_stores_nothing(tmp_path):
    with pytest.raises(AssertionError):
        cached(str(tmp_path), "key", make=never)
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_are_not_stored(tmp_path):
    made = [TOKENS[0], BadRow("why")]
    assert cached(str(tmp_path), "key", make=lambda: made) == made
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "key.0123456789abcdef.arrow").write_bytes(b"not arrow")
    with pytest.raises(ValueError, match=r"data.cache_dir: .*key.0123456789abcdef.arrow is damaged .*; delete"):
        cached(str(tmp_path), "key", make=never)


def test_a_flipped_bit_is_noticed(tmp_path):
    cached(str(tmp_path), "key", make=lambda: TOKENS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    at = whole.index(np.int32(70_000).tobytes())
    for damaged in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:-1], whole[:40]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"data.cache_dir: .*arrow is damaged .*; delete it"):
            cached(str(tmp_path), "key", make=never)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match=r"key\.\w+\.arrow cannot be written: No space left on device"):
        cached(str(tmp_path), "key", make=lambda: TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_the_key_changes_with_rows_their_order_and_settings():
    rows = [{"prompt": "a", "messages": [{"role": "user"}]}, {"prompt": "b"}]
    keys = {
        content_key(rows, ["x"]),
        content_key(rows[::-1], ["x"]),
        content_key([rows[0], {"prompt": "c"}], ["x"]),
        content_key(rows, ["y"]),
        content_key(rows, ["x", "y"]),
        content_key(rows[:1], ["x"]),
    }
    assert len(keys) == 6
    ordered, other = ([{"tools": [tool]}] for tool in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert content_key(ordered, ["x"]) != content_key(other, ["x"])  # a template writes them in their order
    assert content_key([dict(reversed(row.items())) for row in rows], ["x"]) == content_key(rows, ["x"])
