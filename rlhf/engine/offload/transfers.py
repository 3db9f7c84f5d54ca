"""Transfers between disk, host and device: the buffers they pass through, and the stream and threads that make them.

A `BufferPool` is all the memory that transfers may use: take a buffer, fill it, start a transfer, give it back. The
pool hands it out again only after every transfer that was declared with `hold`.

A `CopyStream` copies between host memory and a device beside compute. A copy is asynchronous only from or to
page-locked host memory; with other memory it is correct but slower. On a CPU device every copy is made at once, and
there is nothing to wait for.
See also: files (`direct_io.py`).
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections import deque
from concurrent import futures
from threading import Lock
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 4096  # bytes: O_DIRECT wants memory, offsets and lengths in multiples of a disk's sector, at most this
HUGE_PAGE = 2 << 20  # bytes; the block layer splits a request over ordinary pages, which halves the speed or worse


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
        """Wait for the end of all parts, and raise what went wrong in one."""
        self.finish()  # all parts first: after an error no thread may still touch the buffer
        for part in self._parts:
            part.result()


class CopyEvent:
    """The moment at which a copy is complete."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        """Wrap an event recorded after the copy; None for a copy that is already made."""
        self.event = event

    @property
    def done(self) -> bool:
        """True once both ends of the copy are free, without waiting for it."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread until both ends of the copy may be used on the host."""
        if self.event is not None:
            self.event.synchronize()

    def finish(self) -> None:
        """Same as `wait`: a copy does not fail by itself."""
        self.wait()


Transfer = ThreadTransfer | CopyEvent
"""Something under way that uses a buffer."""


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


class CopyStream:
    """One side stream of a device. There are two ways to order its copies against compute.

    `copy` moves what compute has just produced, or will overwrite: it follows everything queued on the current stream.

    `prefetch` must not wait for compute, which is busy with the previous unit. It writes to memory from `empty`, which
    no other stream knows; `hand_over` makes the current stream wait for the copy, and `release` makes later copies
    wait for what the current stream has queued by then, so that the memory may be freed and reused.
    """

    def __init__(self, device: torch.device) -> None:
        """Open a stream on `device`, if it is a CUDA device."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._user = torch.cuda.current_stream(device)  # the stream of the last `hand_over`

    @property
    def is_async(self) -> bool:
        """False on the CPU, where a copy is complete when the call returns."""
        return self._stream is not None

    def copy(self, into: Tensor, from_: Tensor) -> CopyEvent:
        """Start a copy after all that is queued on the current stream.

        Neither end may be changed on the host before the event was waited for. The device's end may be freed at once.
        """
        if self._stream is None:
            into.copy_(from_)
            return CopyEvent()
        # Order: the current stream may still be writing `from_`, or reading the old values of `into`.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(from_, non_blocking=True)
        for tensor in (into, from_):
            if tensor.is_cuda:
                # Lifetime: without this the allocator could reuse freed memory before the copy has run.
                tensor.record_stream(self._stream)
        return CopyEvent(self._stream.record_event())

    def join(self) -> None:
        """Make the current stream wait for all copies so far; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def empty(self, nbytes: int) -> Tensor:
        """Memory for `prefetch`, uint8 [nbytes] on the device."""
        if self._stream is None:
            return torch.empty(nbytes, dtype=torch.uint8)
        # Lifetime: memory belongs to the stream it was allocated on. Freed, it is reused only by later copies here,
        # and `release` orders those after the last use, so `record_stream` is not needed.
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def prefetch(self, into: Tensor, from_: Tensor) -> CopyEvent:
        """Start a copy beside compute, from host memory to memory from `empty`; `from_` must stay unchanged."""
        if self._stream is None:
            into.copy_(from_)
            return CopyEvent()
        with torch.cuda.stream(self._stream):  # no wait for the current stream: nothing there touches `into`
            into.copy_(from_, non_blocking=True)
        return CopyEvent(self._stream.record_event())

    def hand_over(self, copied: CopyEvent) -> None:
        """Make the current stream wait for a `prefetch`; the host does not wait."""
        if copied.event is not None:
            self._user = torch.cuda.current_stream(self._device)  # FSDP2 gathers on a stream of its own
            self._user.wait_event(copied.event)

    def release(self) -> None:
        """Declare that every use of the memory handed over last is queued by now."""
        if self._stream is not None:
            # Order: a later copy may get the same memory, and must not overwrite it while it is being read.
            self._stream.wait_event(self._user.record_event())

    def synchronize(self) -> None:
        """Block this thread until all copies so far are made."""
        if self._stream is not None:
            self._stream.synchronize()


def threads_on(device: torch.device | None, count: int, *, name: str) -> futures.ThreadPoolExecutor:
    """A pool of threads that may wait for events of `device`.

    A new thread starts on the first CUDA device, where merely waiting would create a context of several hundred MB.
    """
    if device is None or device.type != "cuda":
        return futures.ThreadPoolExecutor(count, name)
    return futures.ThreadPoolExecutor(count, name, initializer=torch.cuda.set_device, initargs=(device,))


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
