"""What is written to disk comes back, the memory for it is fixed, and every failure says what to do."""

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.engine.offload import direct_io, transfers
from rlhf.engine.offload.direct_io import (
    ALIGNMENT,
    BufferPool,
    CopyEvent,
    DirectFile,
    PlannedRead,
    PrefetchQueue,
    check_nvme_path,
)

MIB = 1 << 20


@pytest.fixture
def file(tmp_path):
    file = DirectFile(tmp_path, nbytes=40 * MIB, pool=BufferPool(1, nbytes=1), label="optimizer states")
    yield file
    file.close()


@pytest.fixture
def mounted(tmp_path):
    """`mounted(kind, options)`: a fresh file system; a test that may not mount is skipped."""
    mounts = []

    def mount(kind, options="rw"):
        folder = tmp_path / kind
        folder.mkdir()
        if subprocess.run(["mount", "-t", kind, "-o", options, kind, folder], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        mounts.append(folder)
        return folder

    yield mount
    for folder in mounts:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def slow_writes(monkeypatch):
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *arguments: [time.sleep(0.02), pwritev(*arguments)][1])


def python(source, *arguments):
    """Run `source` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [
        sys.executable,
        "-c",
        "from rlhf.engine.offload.direct_io import *\nimport os, sys\n" + source,
        *map(str, arguments),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def refuse(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_bytes_come_back_from_where_they_were_written(file):
    buffers = file.pool = BufferPool(2, nbytes=20 * MIB)  # three pieces each
    written, read = buffers.take(), buffers.take()
    first = torch.randint(256, (20 * MIB,), dtype=torch.uint8)
    for offset, values in ((20 * MIB, first), (ALIGNMENT, first.flip(0))):
        file.write(offset, written.copy_(values)).wait()
    expected = torch.cat([first.flip(0)[: 20 * MIB - ALIGNMENT], first.flip(0)[-ALIGNMENT:], first[ALIGNMENT:]])
    for offset in (0, 20 * MIB):
        file.read(offset, read).wait()
        start = offset - ALIGNMENT
        assert torch.equal(read[-start if start < 0 else 0 :], expected[max(start, 0) : offset + 20 * MIB - ALIGNMENT])
    assert torch.equal(content(file)[ALIGNMENT : 40 * MIB], expected)


def test_a_new_file_is_zeros(tmp_path):
    file = DirectFile(tmp_path, nbytes=5000, pool=BufferPool(1, nbytes=1), label="states")
    buffer = file.pool.take()
    assert file.nbytes == 2 * ALIGNMENT == len(content(file))
    buffer.fill_(7)
    file.read(0, buffer).wait()
    assert not buffer.any()
    file.close()


def test_a_transfer_waits_for_an_earlier_one_of_the_same_bytes(file, slow_writes):
    buffers = file.pool = BufferPool(3, nbytes=ALIGNMENT)
    for value in range(1, 6):
        source, target = buffers.take(), buffers.take()
        file.write(0, source.fill_(value))
        buffers.give_back(source)
        file.read(0, target).wait()
        assert target.unique().tolist() == [value]
        buffers.give_back(target)


def test_a_buffer_given_back_early_is_handed_out_only_after_its_write(file, slow_writes):
    buffers = file.pool = BufferPool(2, nbytes=MIB)
    for tile in range(32):
        buffer = buffers.take()
        file.write(tile * MIB, buffer.fill_(tile))
        buffers.give_back(buffer[8:16].view(torch.float32))  # any view names its buffer
    file.flush()
    assert torch.equal(content(file)[: 32 * MIB], torch.arange(32, dtype=torch.uint8).repeat_interleave(MIB))


def content(file):
    """Its bytes, through the page cache: it has no name but that of its descriptor."""
    return torch.frombuffer(bytearray(Path(f"/proc/self/fd/{file._file.fileno()}").read_bytes()), dtype=torch.uint8)


def test_buffers_are_aligned_fixed_in_number_and_given_back_once():
    buffers = BufferPool(3, nbytes=ALIGNMENT + 1)
    taken = [buffers.take() for _ in range(3)]
    assert buffers.nbytes == 2 * ALIGNMENT
    assert [b.data_ptr() % ALIGNMENT for b in taken] == [0, 0, 0]
    with pytest.raises(RuntimeError, match=r"All 3 buffers are taken.*engine\.buffer_count"):
        buffers.take()
    buffers.give_back(taken[1])
    with pytest.raises(AssertionError, match="given back before"):
        buffers.give_back(taken[1])
    assert buffers.take().data_ptr() == taken[1].data_ptr()
    buffers.close()
    with pytest.raises(RuntimeError, match="taken"):
        buffers.take()


def test_a_view_outlives_its_closed_buffers():
    buffers = BufferPool(1, nbytes=4 * MIB)
    view = buffers.take().fill_(3)[MIB:]
    buffers.close()
    del buffers
    assert view.sum().item() == 3 * 3 * MIB


def test_resident_memory_of_a_stream_is_that_of_its_buffers(tmp_path):
    """300 MiB through 3 x 4 MiB."""
    tiles, nbytes, count = 75, 4 * MIB, 3
    file = DirectFile(tmp_path, nbytes=tiles * nbytes, pool=BufferPool(1, nbytes=1), label="stream")
    before, peak = _resident(), 0
    buffers = file.pool = BufferPool(count, nbytes=nbytes)
    for step in (1, 2):
        for tile in range(tiles):
            buffer = buffers.take()
            file.read(tile * nbytes, buffer).wait()
            assert buffer[0] == (tile if step == 2 else 0)
            file.write(tile * nbytes, buffer.fill_(tile))
            buffers.give_back(buffer)
            peak = max(peak, _resident() - before)
    file.close()
    assert count * nbytes <= peak <= count * nbytes + MIB


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_full_disk_is_found_when_the_file_is_made(mounted):
    folder = mounted("tmpfs", "size=4m")
    with pytest.raises(
        RuntimeError, match=r"optimizer states: reserving 8388608 bytes failed: No space left.*nvme_path"
    ):
        DirectFile(folder, nbytes=8 * MIB, pool=BufferPool(1, nbytes=1), label="optimizer states")
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_while_writing(mounted):
    """Space was there when the file was made; somebody else took it."""
    folder = mounted("tmpfs", "size=4m")
    file = DirectFile(folder, nbytes=3 * MIB, pool=BufferPool(1, nbytes=1), label="optimizer states")
    os.truncate(file._file.fileno(), 0)
    (folder / "other").write_bytes(bytes(3 * MIB))
    buffers = file.pool = BufferPool(1, nbytes=3 * MIB)
    lost = "optimizer states: writing 3145728 bytes at 0 .*No space left on device.*free space"
    with pytest.raises(RuntimeError, match=lost):
        file.write(0, buffers.take().fill_(1)).wait()
    with pytest.raises(RuntimeError, match="No space left"):
        file.flush()
    file.close()
    assert [left.name for left in folder.iterdir()] == ["other"]


def test_a_file_larger_than_the_limit(tmp_path):
    source = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "DirectFile(sys.argv[1], nbytes=2 << 20, pool=BufferPool(1, nbytes=1), label='states')"
    )
    assert "states: reserving 2097152 bytes failed: File too large" in python(source, tmp_path).stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [0, MIB, MIB + 100])
def test_a_truncated_file(file, left):
    os.truncate(file._file.fileno(), left)
    file.pool = BufferPool(1, nbytes=2 * MIB)
    buffer = file.pool.take()
    with pytest.raises(RuntimeError, match=rf"optimizer states: reading .* at 0: found {left} bytes, expected 2097152"):
        file.read(0, buffer).wait()


def test_an_error_of_the_disk(file, monkeypatch):
    buffers = file.pool = BufferPool(1, nbytes=MIB)
    buffer = buffers.take()
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(RuntimeError, match=r"reading 1048576 bytes at 4096 \(after 0\) failed: Input/output.*dmesg"):
        file.read(ALIGNMENT, buffer).wait()


@pytest.mark.parametrize("then", ["take", "read", "write", "flush"])
def test_a_failed_write_behind_is_not_lost(file, monkeypatch, then):
    buffers = file.pool = BufferPool(2, nbytes=ALIGNMENT)
    first, second = buffers.take(), buffers.take()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        file.write(0, first).finish()
    buffers.give_back(first)
    calls = {
        "take": buffers.take,
        "read": lambda: file.read(MIB, second),
        "write": lambda: file.write(MIB, second),
        "flush": file.flush,
    }
    with pytest.raises(RuntimeError, match="Input/output error"):
        calls[then]()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(ValueError, match=r"engine\.nvme_path=.*plain/x: cannot make files there \(Not a directory\)"):
        check_nvme_path(str(tmp_path / "plain/x"))
    with pytest.raises(RuntimeError, match=r"states: creating the file failed: Not a directory.*nvme_path"):
        DirectFile(tmp_path / "plain/x", nbytes=1, pool=BufferPool(1, nbytes=1), label="states")
    check_nvme_path(str(tmp_path / "new/deep"))
    assert list((tmp_path / "new/deep").iterdir()) == []


def test_a_folder_that_cannot_be_written(mounted):
    folder = mounted("tmpfs", "ro")
    with pytest.raises(ValueError, match=r"cannot make files there \(Read-only file system\)"):
        check_nvme_path(str(folder))
    with pytest.raises(RuntimeError, match="creating the file failed: Read-only file system"):
        DirectFile(folder, nbytes=1, pool=BufferPool(1, nbytes=1), label="states")


def test_without_direct_access_a_file_works_through_the_page_cache(mounted, caplog):
    """ramfs has neither O_DIRECT nor preallocation."""
    _round_trip(mounted("ramfs"))
    assert "O_DIRECT" in caplog.text


def test_with_direct_access_refused_a_file_works_through_the_page_cache(tmp_path, monkeypatch, caplog):
    change = direct_io.fcntl.fcntl

    def without(file, command, flags=0):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return change(file, command, flags)

    monkeypatch.setattr(direct_io.fcntl, "fcntl", without)
    _round_trip(tmp_path)
    assert "O_DIRECT" in caplog.text


def _round_trip(folder):
    buffers = BufferPool(2, nbytes=MIB)
    file = DirectFile(folder, nbytes=MIB, pool=buffers, label="states")
    written, read = buffers.take().random_(), buffers.take()
    file.write(0, written)
    file.read(0, read).wait()
    assert torch.equal(written, read)
    file.close()
    assert list(folder.iterdir()) == []


START = "file = DirectFile(sys.argv[1], nbytes=1, pool=BufferPool(1, nbytes=1), label='x'); buffer = file.pool.take()\n"


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise RuntimeError('the run ends badly')", "file.close()"])
def test_nothing_is_left_however_a_process_ends(tmp_path, end):
    assert python(START + "print(len(os.listdir(sys.argv[1])), flush=True)\n" + end, tmp_path).stdout == "0\n"
    assert list(tmp_path.iterdir()) == []


def test_a_fork_that_closes_the_file_leaves_it_to_the_parent(tmp_path):
    source = (
        "file.write(0, buffer.fill_(7)).wait()\n"
        "child = os.fork()\n"
        "if not child: file.close(); os._exit(0)\n"
        "os.waitpid(child, 0); file.read(0, buffer.zero_()).wait(); print(buffer.unique().tolist())"
    )
    assert python(START + source, tmp_path).stdout == "[7]\n"


def test_a_write_waits_for_the_copy_into_its_buffer(file):
    buffer = file.pool.take().zero_()
    event = SimpleNamespace(synchronize=lambda: buffer.fill_(9))  # the copy is made when it is waited for
    file.write(ALIGNMENT, buffer, after=CopyEvent(event)).wait()
    assert content(file)[ALIGNMENT : 2 * ALIGNMENT].unique().tolist() == [9]


@pytest.fixture
def planned(file):
    """A pool of three buffers, a queue that reads two ahead, and reads of six blocks, each full of its number."""
    pool = file.pool = BufferPool(3, nbytes=ALIGNMENT)
    for block in range(6):
        buffer = pool.take()
        file.write(block * ALIGNMENT, buffer.fill_(block))
        pool.give_back(buffer)
    queue = PrefetchQueue(file, depth=2)
    queue.plan(PlannedRead(block, block * ALIGNMENT, slice(0, ALIGNMENT)) for block in range(6))
    return pool, queue


def test_reads_come_in_the_order_that_was_planned_and_go_on_after_a_pause(planned):
    pool, queue = planned
    for blocks in ([0, 1, 2], [3, 4, 5]):
        assert queue.tags == list(range(blocks[0], 6))
        for block, (read, buffer) in zip(blocks, queue.take(3), strict=True):
            assert (read.tag, buffer.unique().tolist()) == (block, [block])
            pool.give_back(buffer)
    assert queue.tags == []


def test_a_queue_that_is_cancelled_gives_all_buffers_back(planned):
    pool, queue = planned
    (_, buffer), *_ = queue.take(1)
    pool.give_back(buffer)
    queue.cancel()
    assert queue.tags == []
    assert len([pool.take() for _ in range(3)]) == 3


def test_a_read_that_fails_is_raised_and_leaves_nothing_planned(planned, monkeypatch):
    _, queue = planned
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(RuntimeError, match="Input/output error"):
        next(queue.take(1))
    assert queue.tags == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_buffers_are_page_locked():
    buffers = BufferPool(2, nbytes=MIB, pin=True)
    buffer = buffers.take()
    assert buffer.is_pinned()
    assert buffer.random_().to("cuda", non_blocking=True).cpu().equal(buffer)
    buffers.close()
    assert not buffer.is_pinned()


def test_page_locked_memory_is_unlocked_before_it_is_let_go_also_when_nobody_closes_it(monkeypatch):
    locked, unlocked = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transfers, "_page_lock", lambda memory: locked.append(memory.data_ptr()))
    monkeypatch.setattr(transfers, "_page_unlock", lambda memory: unlocked.append(memory.data_ptr()))
    forgotten, closed = (BufferPool(2, nbytes=4096, pin=True) for _ in range(2))
    closed.close()
    closed.close()
    assert unlocked == locked[1:]
    del forgotten
    assert sorted(unlocked) == sorted(locked)
