"""Our files are written whole or not at all, and one that is damaged or cannot be written is named."""

import errno
import os
from pathlib import Path

import pytest

from rlhf.runtime import atomic_files as files
from rlhf.runtime.atomic_files import broken_seal, read_json, seal, sha256, write_text, writing
from rlhf.runtime.errors import RunError


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` raises it: without the file's name


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "new/file.json"
    write_text(path, "old \ud800")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match=r"file\.json cannot be written: No space left on device\. Make room there"):
        write_text(path, "new")
    assert path.read_bytes() == b"old \\ud800"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded. Make room"),
        (PermissionError(errno.EACCES, "Permission denied", "elsewhere"), "Permission denied. Allow this process"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system. Allow this process"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error. The disk cannot be relied on"),
        (Exception("No space left on device (os error 28)"), "No space left on device. Make room"),  # of tokenizers
    ],
)
def test_an_error_of_the_system_names_the_file(error, message):
    with pytest.raises(RunError, match=f"^here cannot be written: {message}"), writing(Path("here")):
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), OSError("no number")])
def test_other_errors_pass(error):
    with pytest.raises(type(error), match="no"), writing(Path("here")):
        raise error


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1', "it is not JSON"), (b"", "it is not JSON"), (b"\xff{}", "it is not JSON"), (b"[1]", "found a list")],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "file.json"
    assert read_json(path) == {}
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is damaged: {message}.*Do this\."):
        read_json(path, mend="Do this.")


def test_a_seal_knows_missing_cut_and_changed_files(tmp_path):
    (tmp_path / "in").mkdir()
    a, b = tmp_path / "a", tmp_path / "in/b"
    a.write_bytes(b"abc")
    b.write_bytes(b"")
    sealed = seal([b, a], root=tmp_path)
    assert sealed["a"]["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180
    assert list(sealed) == ["a", "in/b"]
    (tmp_path / "new").write_text("nobody minds")
    assert broken_seal(tmp_path, sealed) == ""
    a.write_bytes(b"abd")
    assert "a is not what was written: its checksum differs" in broken_seal(tmp_path, sealed)
    a.write_bytes(b"ab")
    assert "a has 2 bytes; expected 3" in broken_seal(tmp_path, sealed)
    b.unlink()
    a.write_bytes(b"abc")
    assert "b is missing" in broken_seal(tmp_path, sealed)


def test_a_large_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LARGE", 0)
    path = tmp_path / "large"
    path.write_bytes(b"abc")
    first = sha256(path)
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert sha256(path) == first
    monkeypatch.undo()
    path.write_bytes(b"abcd")
    assert sha256(path) != first
