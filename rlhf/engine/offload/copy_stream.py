"""Copies between a device and host memory, on a CUDA stream beside the one that computes.

On the CPU a copy is made at once and there is nothing to wait for. Left out: which memory is page-locked; a copy from
or to memory that is not only costs time.
"""

from __future__ import annotations

import torch
from torch import Tensor


class CopyEvent:
    """A copy that may still be under way."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        """`event` comes after the copy on its stream; None when it is done."""
        self._event = event

    def wait(self) -> None:
        """Block this thread until both ends of the copy are free to use on the host."""
        if self._event is not None:
            self._event.synchronize()


class CopyStream:
    """One stream of copies, each after what the current stream was told to do before it."""

    def __init__(self, device: torch.device) -> None:
        """Copies from and to `device`."""
        self._device = device
        self.is_behind = device.type == "cuda"
        """Whether `copy` returns before the copy is made."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, into: Tensor, from_: Tensor) -> CopyEvent:
        """Start copying; neither end may be changed on the host before the receipt was waited for."""
        if self._stream is None:
            into.copy_(from_)
            return CopyEvent()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(from_, non_blocking=True)
        for tensor in (into, from_):
            if tensor.is_cuda:  # else the caching allocator could hand its memory on before the copy
                tensor.record_stream(self._stream)
        return CopyEvent(self._stream.record_event())

    def join(self) -> None:
        """Let the current stream wait for all copies so far; the host does not."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def finish(self) -> None:
        """Block this thread until all copies so far are made."""
        if self._stream is not None:
            self._stream.synchronize()
