"""A fixed set of host buffers through which offloaded tensors travel between disk, host and device.

They are all the memory that such transfers may use: take a buffer, fill it, start a transfer, give it back. The pool
hands a buffer out again only after every transfer that was said to `hold` it.
See also: what starts transfers (`direct_io.py`, `copy_stream.py`).
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections import deque
from concurrent import futures
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 4096  # bytes: O_DIRECT wants memory, offsets and lengths in multiples of a disk's sector, at most this
HUGE_PAGE = 2 << 20  # bytes; the block layer splits a request over ordinary pages, which halves the speed or worse


class Transfer(Protocol):
    """Something under way that uses a buffer."""

    @property
    def done(self) -> bool:
        """True when it has ended, well or badly."""

    def finish(self) -> None:
        """Wait for its end, well or bad."""

    def wait(self) -> None:
        """Wait for its end, and raise what went wrong."""


class ThreadTransfer:
    """A transfer that threads make, in one or several parts."""

    def __init__(self, parts: list[futures.Future[None]]) -> None:
        """Follow the threads' work on `parts`."""
        self._parts = parts

    @property
    def done(self) -> bool:
        """True when all parts have ended, well or badly."""
        return all(part.done() for part in self._parts)

    def finish(self) -> None:
        """Wait for the end of all parts, well or bad."""
        futures.wait(self._parts)

    def wait(self) -> None:
        """Wait for the end of all parts.

        Raises:
            RuntimeError: one failed: which file, where, what was found and expected, what to do.
        """
        self.finish()  # all parts first: after an error no thread may still touch the buffer
        for part in self._parts:
            part.result()


class BufferPool:
    """A fixed set of page-aligned buffers on huge pages, page-locked where CUDA copies from and to them.

    A buffer may be given back while a transfer still uses it: it is handed out again only after that ends.
    """

    def __init__(self, count: int, *, nbytes: int, pin: bool = False) -> None:
        """Reserve `count` buffers of `nbytes`, rounded up to `ALIGNMENT`; `pin` page-locks them if there is CUDA.

        Pages become resident when they are first used, or at once when they are locked.
        """
        self.count, self.nbytes = count, round_up(nbytes)
        memory = _huge_pages(count * self.nbytes)
        self._unlock: weakref.finalize[[Tensor], BufferPool] | None = None
        if pin and torch.cuda.is_available():
            _page_lock(memory)
            # Lifetime: the finalizer holds the memory, which must not be unmapped while the driver believes it locked.
            self._unlock = weakref.finalize(self, _page_unlock, memory)
            self._unlock.atexit = False  # the CUDA context may be gone by then
        # Through numpy each buffer gets a storage of its own, whose address names it and all its views.
        self._buffers = [torch.from_numpy(part.numpy()) for part in torch.split(memory, self.nbytes)]
        self._free = deque(range(count))
        self._transfers: list[list[Transfer]] = [[] for _ in range(count)]
        self._lock = Lock()

    def take(self) -> Tensor:
        """A buffer, uint8 [nbytes], with whatever it held before.

        Prefers one that no transfer uses, else waits for the one given back first.

        Raises:
            RuntimeError: all are taken; or the transfer that it waited for failed.
        """
        with self._lock:
            if not self._free:
                raise RuntimeError(f"All {self.count} buffers are taken: give one back, or raise engine.buffer_count.")
            idle = (i for i in self._free if all(transfer.done for transfer in self._transfers[i]))
            index = next(idle, self._free[0])
            self._free.remove(index)
            transfers, self._transfers[index] = self._transfers[index], []
        for transfer in transfers:  # outside the lock: other threads may give buffers back meanwhile
            transfer.wait()
        return self._buffers[index]

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer, or any view of it; allowed as soon as the pool was told which transfer holds it."""
        index = self._index(buffer)
        with self._lock:
            assert index not in self._free, "this buffer was given back before"
            self._free.append(index)

    def hold(self, buffer: Tensor, transfer: Transfer) -> None:
        """Keep `buffer` (any view of it) from being handed out before `transfer` has ended."""
        index = self._index(buffer)
        with self._lock:
            self._transfers[index] = [known for known in self._transfers[index] if not known.done] + [transfer]

    def close(self) -> None:
        """Wait for all transfers, then unlock and free the memory; a view that somebody still holds keeps its own."""
        for transfer in sum(self._transfers, []):
            transfer.finish()
        if self._unlock is not None:
            self._unlock()
        self._buffers, self._transfers = [], []
        self._free.clear()

    def _index(self, buffer: Tensor) -> int:
        address = buffer.untyped_storage().data_ptr()  # the same for all views
        return next(i for i, own in enumerate(self._buffers) if own.data_ptr() == address)


def round_up(nbytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _huge_pages(nbytes: int) -> Tensor:
    """Private anonymous memory, uint8 [nbytes], that begins on a huge page and asks for more of them."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    skip = -address % HUGE_PAGE
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, skip, nbytes)
    except OSError as error:
        logger.warning("Huge pages are unavailable (%s); disk transfers will be slower.", error.strerror)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=skip, count=nbytes)


def _page_lock(memory: Tensor) -> None:
    driver: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    result = int(driver.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if result != 0:
        raise RuntimeError(
            f"CUDA cannot page-lock {memory.numel()} bytes of host memory (error {result}): lower engine.buffer_count "
            "or engine.buffer_size, or set engine.pin_memory=false."
        )


def _page_unlock(memory: Tensor) -> None:
    driver: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(driver.cudaHostUnregister(memory.data_ptr())))
