"""Flat files on a local disk, read and written by threads past the page cache, and reads that run ahead of use.

A file has no name in its folder: it is unlinked as soon as it is opened, so that the kernel frees its space when the
process ends, however that happens. Nothing is left to clean up after a kill, and `ls` does not show it (`lsof +L1`
does). Each rank has its own files; they are not meant to outlive the process, so they are never synced.

Left out: what the bytes mean, and disk-to-GPU transfers that bypass host memory.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf.engine.offload.transfers import ALIGNMENT, BufferPool, CopyEvent, ThreadTransfer, round_up, threads_on
from rlhf.runtime.errors import RunError

logger = logging.getLogger(__name__)

_REQUEST = 8 << 20  # bytes in one system call; a virtual disk and a real one are both near their best here
_THREADS = 2  # for each direction, so that reading ahead need not queue behind writing back
_ADVICE = {
    errno.ENOSPC: "free space there, or name another folder (engine.nvme_path).",
    errno.EDQUOT: "raise the quota, or name another folder (engine.nvme_path).",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name another file system (engine.nvme_path).",
    errno.EIO: "the disk is failing (see dmesg): name a folder on another one (engine.nvme_path).",
}

_Call = Callable[[int, list[memoryview], int], int]  # os.preadv or os.pwritev


class InFlight(NamedTuple):
    """A transfer and the bytes of the file that it touches."""

    start: int
    stop: int
    writes: bool
    transfer: ThreadTransfer


class DirectFile:
    """One flat file of fixed size, all zeros at first, and the buffers that its bytes pass through.

    A transfer waits for an earlier one that touches the same bytes when either of them writes. A write that failed and
    was not waited for is raised by the next transfer, and by `flush`.
    """

    def __init__(
        self, folder: str | Path, *, nbytes: int, pool: BufferPool, label: str, device: torch.device | None = None
    ) -> None:
        """Create the file, its folder too, with all its space.

        Args:
            folder: on the disk to use.
            nbytes: the file's size, rounded up to `ALIGNMENT`.
            pool: the buffers, which belong to the file from now on.
            label: what it holds, for messages.
            device: the CUDA device whose copies `write` may be told to wait for.

        Raises:
            RunError: the disk is full, or the folder cannot be made or written.
        """
        assert nbytes > 0, f"{label}: a file of {nbytes} bytes"
        self.nbytes, self.pool = round_up(nbytes), pool
        self._folder, self._label = folder, label
        self._in_flight: list[InFlight] = []
        self._lock = Lock()  # autograd's threads start transfers, too
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open until `close`
        except OSError as error:
            raise RunError(self._sentence("creating the file", error)) from error
        self._readers, self._writers = (threads_on(device, _THREADS, name=f"{label} {d}") for d in ("read", "write"))
        try:
            # All space now: a disk that is too small is found before training, not in the middle of it.
            os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
        except OSError as error:
            self.close()
            raise RunError(self._sentence(f"reserving {self.nbytes} bytes", error)) from error
        if not _bypass_page_cache(self._file.fileno()):
            logger.warning("%s: %s has no O_DIRECT; reads go through the page cache and are slower.", label, folder)

    def read(self, offset: int, into: Tensor) -> ThreadTransfer:
        """Start reading into a buffer, or whole pages of one; nobody may touch it until the result was waited for."""
        return self._start(os.preadv, into, offset=offset, after=CopyEvent())

    def write(self, offset: int, from_: Tensor, *, after: CopyEvent | None = None) -> ThreadTransfer:
        """Start writing a buffer, or whole pages of one, which may not change until the result was waited for.

        With `after`, the threads first wait for that copy into `from_`; the caller does not. Here and in `read`,
        `offset` is a multiple of `ALIGNMENT`.
        """
        return self._start(os.pwritev, from_, offset=offset, after=after or CopyEvent())

    def flush(self) -> None:
        """Wait for all transfers so far.

        Raises:
            RunError: a write failed.
        """
        with self._lock:
            self._settle(0, self.nbytes, writes=True)

    def close(self) -> None:
        """Wait for all transfers, then free the space and the buffers; what a write failed to store is lost."""
        self._readers.shutdown()
        self._writers.shutdown()
        self._file.close()
        self.pool.close()

    def _start(self, call: _Call, buffer: Tensor, *, offset: int, after: CopyEvent) -> ThreadTransfer:
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy declares no buffer protocol before 3.12
        stop = offset + buffer.numel()
        assert buffer.dtype == torch.uint8, f"{self._label}: transfers are of bytes, found {buffer.dtype}"
        assert offset % ALIGNMENT == 0 == len(view) % ALIGNMENT, f"{self._label}: {len(view)} bytes at {offset}"
        assert buffer.data_ptr() % ALIGNMENT == 0 <= offset <= stop <= self.nbytes, f"{self._label}: [{offset}, {stop})"
        writes = call is os.pwritev
        threads = self._writers if writes else self._readers
        with self._lock:
            # Order: nothing else keeps two threads from moving the same bytes in either order.
            self._settle(offset, stop, writes=writes)
            cuts = range(0, len(view), _REQUEST)
            transfer = ThreadTransfer(
                [
                    threads.submit(self._move, call, view[cut : cut + _REQUEST], offset=offset + cut, after=after)
                    for cut in cuts
                ]
            )
            self._in_flight.append(InFlight(offset, stop, writes, transfer))
        # Lifetime: from here on the caller may give the buffer back; the pool keeps it until the transfer has ended.
        self.pool.hold(buffer, transfer)
        return transfer

    def _settle(self, start: int, stop: int, *, writes: bool) -> None:
        """Wait for whatever must come before a transfer of these bytes, and drop what has ended."""
        for other in list(self._in_flight):
            clashes = other.start < stop and start < other.stop and (writes or other.writes)
            if not clashes and not other.transfer.done:
                continue
            if other.writes:
                other.transfer.wait()  # raises, and stays in the list: this file has lost data
            other.transfer.finish()
            self._in_flight.remove(other)

    def _move(self, call: _Call, view: memoryview, *, offset: int, after: CopyEvent) -> None:
        """Runs in a thread: move all bytes of `view`, in as many system calls as it takes."""
        after.wait()  # Order: until then the bytes are on their way from the device
        done, doing = 0, "writing" if call is os.pwritev else "reading"
        while done < len(view):
            try:
                moved = call(self._file.fileno(), [view[done:]], offset + done)
            except OSError as error:
                what = f"{doing} {len(view)} bytes at {offset} (after {done})"
                raise RunError(self._sentence(what, error)) from error
            done += moved
            # A short transfer goes on from a sector; from anywhere else O_DIRECT cannot.
            if moved == 0 or (moved % ALIGNMENT and done < len(view)):
                raise RunError(
                    f"{self._label}: {doing} a file in {self._folder} at {offset}: found {done} bytes, expected "
                    f"{len(view)}; something else cut the file short. Check that disk (engine.nvme_path), and resume "
                    "the run."
                )

    def _sentence(self, doing: str, error: OSError) -> str:
        advice = _ADVICE.get(error.errno or 0, "name a folder on a local disk that you can write (engine.nvme_path).")
        return f"{self._label}: {doing} failed: {error.strerror or error} ({self._folder}); {advice}"


Tag = TypeVar("Tag")


@dataclass(frozen=True)
class PlannedRead(Generic[Tag]):
    """Bytes of a file, and where in a buffer they go."""

    tag: Tag
    """What the bytes are, for the reader."""
    offset: int
    place: slice


class PrefetchQueue(Generic[Tag]):
    """Reads a file in the order that was planned, so that the next bytes arrive while one buffer of them is used."""

    def __init__(self, file: DirectFile, *, depth: int) -> None:
        """Read from `file`, at most `depth` reads at a time; each takes a buffer."""
        self._file, self._depth = file, depth
        self._planned: deque[PlannedRead[Tag]] = deque()
        self._started: deque[tuple[PlannedRead[Tag], Tensor, ThreadTransfer]] = deque()

    @property
    def tags(self) -> list[Tag]:
        """The tags of all reads that were not taken yet, in order."""
        return [read.tag for read, *_ in self._started] + [read.tag for read in self._planned]

    def plan(self, reads: Iterable[PlannedRead[Tag]]) -> None:
        """Read these after what is planned already."""
        self._planned.extend(reads)

    def take(self, count: int) -> Iterator[tuple[PlannedRead[Tag], Tensor]]:
        """The next `count` reads, each with its full buffer, which the caller gives back before it asks for another."""
        for _ in range(count):
            self._start()
            read, buffer, transfer = self._started[0]
            try:
                transfer.wait()
            except RuntimeError:
                self.cancel()  # nothing may be left of a sequence that lacks a part
                raise
            self._started.popleft()
            yield read, buffer
        self._start()

    def cancel(self) -> None:
        """Drop everything that was planned; reads that were started must end before their buffers are free."""
        self._planned.clear()
        for _, buffer, transfer in self._started:
            transfer.finish()  # Lifetime: a thread still writes to the buffer
            self._file.pool.give_back(buffer)
        self._started.clear()

    def _start(self) -> None:
        while self._planned and len(self._started) < self._depth:
            read, buffer = self._planned.popleft(), self._file.pool.take()
            self._started.append((read, buffer, self._file.read(read.offset, buffer[read.place])))


def check_nvme_path(path: str) -> None:
    """Make sure before a run that files can be made in a folder, which is made; the memory plan checks the space.

    Raises:
        ValueError: it cannot be made or written.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"engine.nvme_path={path}: cannot make files there ({error.strerror}); name a folder on a local disk "
            "that you can write."
        ) from error


def _bypass_page_cache(file: int) -> bool:
    """Switch an open file to O_DIRECT; False, and no change, where its file system has none or wants more alignment."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(file, [mmap.mmap(-1, ALIGNMENT)], 0)  # some file systems accept the flag and refuse the read
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True
