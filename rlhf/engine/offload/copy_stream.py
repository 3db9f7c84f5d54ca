"""Copies between host memory and a device on a CUDA stream of their own, so that they overlap with compute.

A copy is asynchronous only from or to page-locked host memory; with other memory it is correct but slower. On a CPU
device every copy is made at once, and there is nothing to wait for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class CopyEvent:
    """The moment at which a copy is complete; a `Transfer`, so a `BufferPool` can hold a buffer until then."""

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


def threads_on(device: torch.device | None, count: int, *, name: str) -> ThreadPoolExecutor:
    """A pool of threads that may wait for events of `device`.

    A new thread starts on the first CUDA device, where merely waiting would create a context of several hundred MB.
    """
    if device is None or device.type != "cuda":
        return ThreadPoolExecutor(count, name)
    return ThreadPoolExecutor(count, name, initializer=torch.cuda.set_device, initargs=(device,))
