"""Hostfiles and filters, by examples of DeepSpeed's documentation and by what its parser refuses."""

import pytest

from rlhf.runtime.hostfile import read_hostfile, selected

POOL = {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3], "worker-2": [0, 1]}


def test_a_hostfile_has_hosts_slots_comments_and_empty_lines(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# ours\nworker-1 slots=2\n\n  worker-0\tslots=4   # the big one\n10.0.0.7 slots=1 max_slots=8\n")
    assert read_hostfile(file) == {"worker-1": [0, 1], "worker-0": [0, 1, 2, 3], "10.0.0.7": [0]}
    assert list(read_hostfile(file)) == ["worker-1", "worker-0", "10.0.0.7"]  # the order of ranks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker-0 slots=4\nworker-0 slots=4\n", "line 2: worker-0 is there already"),
        ("worker-0\n", "line 1: found 'worker-0', expected HOST slots=N"),
        ("worker-0 slots=four\n", "expected HOST slots=N"),
        ("worker-0 slots=0\n", "expected HOST slots=N"),
        ("worker-0 slots=4x\n", "expected HOST slots=N"),
        ("# nobody\n\n", "names no host"),
    ],
)
def test_a_hostfile_that_cannot_be_read_is_refused(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("worker-1:0,2@worker-0", "", {"worker-0": [0, 1, 2, 3], "worker-1": [0, 2]}),
        ("worker-1:2,0,2@worker-1:1", "", {"worker-1": [0, 1, 2]}),
        ("", "worker-1:0", {"worker-0": [0, 1, 2, 3], "worker-1": [1, 2, 3], "worker-2": [0, 1]}),
        ("", "worker-0@worker-2:0,1", {"worker-1": [0, 1, 2, 3]}),
        ("", "", POOL),
    ],
)
def test_filters_choose_hosts_and_slots_in_the_order_of_the_file(include, exclude, left):
    found = selected(POOL, include=include, exclude=exclude)
    assert found == left
    assert list(found) == [host for host in POOL if host in left]


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("worker-0", "worker-1", "expected one of them"),
        ("worker-9", "", "no host worker-9; expected one of worker-0, worker-1, worker-2"),
        ("worker-2:0,5", "", "worker-2 has slots 0 to 1, not 5"),
        ("", "worker-2:7", "worker-2 has slots 0 to 1, not 7"),
        ("worker-0:", "", "cannot be read"),
        ("worker-0:1-3", "", "cannot be read"),
        ("worker-0@", "", "cannot be read"),
        ("", "worker-0@worker-1@worker-2", "no device is left"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(include, exclude, message):
    with pytest.raises(ValueError, match=message):
        selected(POOL, include=include, exclude=exclude)
