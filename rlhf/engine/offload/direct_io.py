"""Flat files on a local disk, one rank's each: preallocated, read and written by threads past the page cache.

Order is kept where it matters: a transfer waits for an earlier one that touches the same bytes when either writes.
`run_folder` names where a run's files go, and clears what killed runs left there.

Left out: what the bytes mean, sharing between processes, durability (the files live as long as their process), and
disk-to-GPU transfers that bypass host memory.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import logging
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from rlhf.engine.offload.buffer_pool import ALIGNMENT, BufferPool, Transfer, round_up
from rlhf.runtime.errors import RunError

logger = logging.getLogger(__name__)

_PIECE = 8 << 20  # bytes in one request; a virtual disk and a real one are both near their best here
_THREADS = 2  # for each direction, so that reading ahead need not queue behind writing back
_FOLDER_PREFIX = "rlhf-tier-"
_ADVICE = {
    errno.ENOSPC: "free space there, or name another folder (engine.nvme_path).",
    errno.EDQUOT: "raise the quota, or name another folder (engine.nvme_path).",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name another file system (engine.nvme_path).",
    errno.EIO: "the disk is failing (see dmesg): name a folder on another one (engine.nvme_path).",
}

_Call = Callable[[int, list[memoryview], int], int]  # os.preadv or os.pwritev


@dataclass(frozen=True)
class InFlight:
    """A transfer and the bytes of the file that it touches."""

    start: int
    stop: int
    writes: bool
    pending: Transfer


class DirectFile:
    """One flat file of fixed size, all zeros at first, that goes when it is closed or the process exits.

    A write that failed and was not waited for is raised by the next transfer, and by `flush`.
    """

    def __init__(self, path: Path, *, nbytes: int, label: str) -> None:
        """Create the file, its folder too, with all its space.

        Args:
            path: of the file, by itself in this process and run; see `run_folder`.
            nbytes: its size, rounded up to `ALIGNMENT`.
            label: what it holds, for messages.

        Raises:
            RunError: the disk is full, the folder cannot be made or written, or another process uses the file.
        """
        assert nbytes > 0, f"{label}: a file of {nbytes} bytes"
        self.path, self.nbytes = path, round_up(nbytes)
        self._label, self._process = label, os.getpid()
        self._flights: list[InFlight] = []
        self._lock = Lock()
        try:
            self._file = _claim(path)
        except OSError as error:
            raise RunError(self._sentence("creating the file", error)) from error
        self._readers, self._writers = (futures.ThreadPoolExecutor(_THREADS, f"{label} {d}") for d in ("read", "write"))
        _FILES.add(self)
        try:
            os.truncate(self._file, 0)
            os.posix_fallocate(self._file, 0, self.nbytes)
        except OSError as error:
            self.close()
            raise RunError(self._sentence(f"reserving {self.nbytes} bytes", error)) from error
        if not _bypass_page_cache(self._file):
            logger.warning("%s: %s cannot be read past the page cache (O_DIRECT): slower.", label, path.parent)

    def read(self, offset: int, into: Tensor) -> Transfer:
        """Start reading; `into` (uint8 [n], page-aligned) is not to be touched until the result is waited for."""
        return self._start(os.preadv, into, offset=offset)

    def write(self, offset: int, from_: Tensor) -> Transfer:
        """Start writing `from_` (uint8 [n], page-aligned), which is not to be changed until the result is waited for.

        Both `offset` and n are multiples of `ALIGNMENT`, here and in `read`.
        """
        return self._start(os.pwritev, from_, offset=offset)

    def flush(self) -> None:
        """Wait for all transfers so far.

        Raises:
            RunError: a write failed.
        """
        with self._lock:
            self._settle(0, self.nbytes, writes=True)

    def close(self) -> None:
        """Wait for all transfers and remove the file; what a write failed to store goes with it."""
        if self not in _FILES or self._process != os.getpid():
            return  # closed before, or inherited by a fork
        _FILES.discard(self)
        self._readers.shutdown()
        self._writers.shutdown()
        self.path.unlink(missing_ok=True)
        os.close(self._file)
        _remove_if_empty(self.path.parent)

    def _start(self, call: _Call, buffer: Tensor, *, offset: int) -> Transfer:
        view, stop = memoryview(buffer.numpy()), offset + buffer.numel()
        assert buffer.dtype == torch.uint8, f"{self._label}: transfers are of bytes, found {buffer.dtype}"
        assert offset % ALIGNMENT == 0 == len(view) % ALIGNMENT, f"{self._label}: {len(view)} bytes at {offset}"
        assert buffer.data_ptr() % ALIGNMENT == 0 <= offset <= stop <= self.nbytes, f"{self._label}: [{offset}, {stop})"
        writes = call is os.pwritev
        pool = self._writers if writes else self._readers
        with self._lock:
            self._settle(offset, stop, writes=writes)
            cuts = range(0, len(view), _PIECE)
            parts = [pool.submit(self._move, call, view[cut : cut + _PIECE], offset=offset + cut) for cut in cuts]
            pending = Transfer(parts)
            self._flights.append(InFlight(offset, stop, writes, pending))
        owner = BufferPool.of(buffer)
        if owner is not None:
            owner.hold(buffer, pending)
        return pending

    def _settle(self, start: int, stop: int, *, writes: bool) -> None:
        """Wait for whatever must come before a transfer of these bytes, and forget what has ended."""
        for flight in list(self._flights):
            clashes = flight.start < stop and start < flight.stop and (writes or flight.writes)
            if not clashes and not flight.pending.done:
                continue
            if flight.writes:
                flight.pending.wait()  # raises, and stays: this file has lost data
            flight.pending.finish()
            self._flights.remove(flight)

    def _move(self, call: _Call, view: memoryview, *, offset: int) -> None:
        done, doing = 0, "writing" if call is os.pwritev else "reading"
        while done < len(view):
            try:
                moved = call(self._file, [view[done:]], offset + done)
            except OSError as error:
                what = f"{doing} {len(view)} bytes at {offset} (after {done})"
                raise RunError(self._sentence(what, error)) from error
            done += moved
            if moved == 0 or (moved % ALIGNMENT and done < len(view)):
                raise RunError(
                    f"{self._label}: {doing} {self.path} at {offset}: found {done} bytes, expected {len(view)}; "
                    "the file was cut short by somebody else. Leave engine.nvme_path to this run, and resume it."
                )

    def _sentence(self, doing: str, error: OSError) -> str:
        advice = _ADVICE.get(error.errno, "name a folder on a local disk that you can write (engine.nvme_path).")
        return f"{self._label}: {doing} failed: {error.strerror or error} ({self.path}); {advice}"


def check_folder(path: str, *, nbytes: int) -> None:
    """Make sure before a run that files of `nbytes` together can be made in `path`; makes the folder.

    Raises:
        ValueError: it cannot be made or written, or has too little space.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"engine.nvme_path={path}: cannot make files there ({error.strerror}); name a folder on a local disk "
            "that you can write."
        ) from error
    _remove_leftovers(folder)
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ValueError(
            f"engine.nvme_path={path}: found {free / 1e9:.2f} GB free, expected {nbytes / 1e9:.2f} GB; free space "
            "there, name a folder on a larger disk, or split over more machines."
        )


def run_folder(path: str, *, rank: int) -> Path:
    """A new folder in `path` for the files of this process; what killed runs left in `path` is removed first.

    It goes with the last file in it. A run that lives is known by its lock on each of its files.
    """
    Path(path).mkdir(parents=True, exist_ok=True)
    _remove_leftovers(Path(path))
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}rank{rank}-", dir=path))


def _claim(path: Path) -> int:
    """Open `path` for this process alone; BlockingIOError when another has it."""
    for _ in range(20):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the folder was empty just now and another run tidied it away
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _locks(file) and path.exists() and path.stat().st_ino == os.fstat(file).st_ino:
                return file
            os.close(file)
        time.sleep(0.05)
    raise BlockingIOError(errno.EWOULDBLOCK, "another process uses this file")


def _locks(file: int) -> bool:
    """Lock an open file if nobody else has; the lock goes with the file or the process, however that ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bypass_page_cache(file: int) -> bool:
    """Switch an open file to O_DIRECT; False, and no change, where its file system has none or wants more alignment."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(file, [mmap.mmap(-1, ALIGNMENT)], 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return False
    return True


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of runs that ended without doing so."""
    for left in _files_of_runs(folder):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another rank was faster; another user's
            file = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
            if _locks(file):
                left.unlink(missing_ok=True)
                logger.info("Removed %s (%.2f GB), left by a run that was killed.", left, os.fstat(file).st_size / 1e9)
            os.close(file)
    for left in folder.glob(f"{_FOLDER_PREFIX}*"):
        _remove_if_empty(left)


def _files_of_runs(folder: Path) -> list[Path]:
    files: list[Path] = []
    for run in folder.glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another rank was faster; another user's
            files += run.iterdir()
    return files


def _remove_if_empty(folder: Path) -> None:
    if folder.name.startswith(_FOLDER_PREFIX):
        with contextlib.suppress(OSError):  # other files are in it
            folder.rmdir()


_FILES: set[DirectFile] = set()  # open ones; forgotten ones too, so that none outlives the process


@atexit.register
def _close_all() -> None:
    for file in list(_FILES):
        file.close()
