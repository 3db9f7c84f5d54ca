"""A fixed set of memory buffers through which a tier's contents travel between disk, host and device.

They are all the memory that a tier may use: take one, fill it, start a transfer, give it back. Left out: the transfers
themselves (`direct_io.py`) and CUDA's: whoever copies between a page-locked buffer and a device waits before
giving the buffer back.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections import deque
from concurrent import futures
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 4096  # bytes: O_DIRECT wants memory, offsets and lengths in multiples of a disk's sector, at most this
HUGE_PAGE = 2 << 20  # bytes; a request over ordinary pages is cut up by the block layer, to half the speed or less


class Transfer:
    """A transfer under way."""

    def __init__(self, parts: list[futures.Future[None]]) -> None:
        """Follow the threads' work on `parts`."""
        self._parts = parts

    @property
    def done(self) -> bool:
        """True when it has ended, well or badly."""
        return all(part.done() for part in self._parts)

    def finish(self) -> None:
        """Wait for its end, well or bad."""
        futures.wait(self._parts)

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            RuntimeError: it failed: which file, where, what was found and expected, what to do.
        """
        self.finish()  # all parts first: after an error no thread may still touch the buffer
        for part in self._parts:
            part.result()


class BufferPool:
    """A fixed set of page-aligned buffers on huge pages, page-locked where CUDA copies from and to them.

    A buffer may be given back while a transfer still uses it: it is handed out again only after that ends.
    """

    def __init__(self, count: int, *, nbytes: int, pin: bool = False) -> None:
        """Reserve the memory; pages become resident as they are first used.

        Args:
            count: how many buffers.
            nbytes: bytes in each, rounded up to `ALIGNMENT`.
            pin: page-lock them for CUDA; without CUDA there is nothing to lock for.
        """
        self.count, self.nbytes = count, round_up(nbytes)
        memory = _huge_pages(count * self.nbytes)
        self._unlock: weakref.finalize[[Tensor], BufferPool] | None = None
        if pin and torch.cuda.is_available():
            _page_lock(memory)
            # Holds the memory: it must never be unmapped while the driver believes it locked.
            self._unlock = weakref.finalize(self, _page_unlock, memory)
            self._unlock.atexit = False
        self._buffers = [_own_storage(part) for part in memory.split(self.nbytes)]
        self._free = deque(range(count))
        self._transfers: list[list[Transfer]] = [[] for _ in range(count)]
        self._lock = Lock()
        for buffer in self._buffers:
            _OWNERS[buffer.data_ptr()] = self

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
        for transfer in transfers:
            transfer.wait()
        return self._buffers[index]

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer, or any view of it; allowed as soon as its transfer was started."""
        index = self._index(buffer)
        with self._lock:
            assert index not in self._free, "this buffer was given back before"
            self._free.append(index)

    @staticmethod
    def of(buffer: Tensor) -> BufferPool | None:
        """The set that a buffer, or any view of it, belongs to; None for other memory."""
        return _OWNERS.get(_address(buffer))

    def hold(self, buffer: Tensor, transfer: Transfer) -> None:
        """Note that `transfer` uses `buffer` (any view of it) until it ends."""
        index = self._index(buffer)
        with self._lock:
            self._transfers[index] = [known for known in self._transfers[index] if not known.done] + [transfer]

    def close(self) -> None:
        """Wait for what uses them and let the memory go; views that are still held keep theirs."""
        for transfer in sum(self._transfers, []):
            transfer.finish()
        if self._unlock is not None:
            self._unlock()
        self._buffers, self._transfers = [], []
        self._free.clear()

    def _index(self, buffer: Tensor) -> int:
        address = _address(buffer)
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
        logger.warning("Huge pages are not to be had (%s): disk transfers are slower.", error.strerror)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=skip, count=nbytes)


def _own_storage(part: Tensor) -> Tensor:
    """The same bytes as a tensor whose storage is just these: its address names all its views."""
    return torch.from_numpy(part.numpy())


def _page_lock(memory: Tensor) -> None:
    result = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if result != 0:
        raise RuntimeError(
            f"CUDA cannot page-lock {memory.numel()} bytes of host memory (error {result}): lower engine.buffer_count "
            "or engine.buffer_size, or set engine.pin_memory=false."
        )


def _page_unlock(memory: Tensor) -> None:
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_OWNERS: WeakValueDictionary[int, BufferPool] = WeakValueDictionary()  # by the address of each buffer's storage
