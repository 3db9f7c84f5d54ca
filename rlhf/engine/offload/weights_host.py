"""Working weights at rest in the memory of the host, page-locked for a CUDA device.

A unit is copied to the device on a stream of its own while the one before it computes. Where the device is the CPU, the
unit is there already and is handed out as it is: such a home serves what stays in memory when the rest is on disk.
Left out: disks (`weights_nvme.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.engine.offload.buffer_pool import BufferPool


class _Arrival(NamedTuple):
    """A unit on its way to the device."""

    rows: Tensor
    copied: torch.cuda.Event


class Lane:
    """Copies from host memory to a CUDA device, beside what computes there.

    Memory comes from this stream's own pool. It is safe to free when whoever used it has queued the use and said so
    (`release`): later copies here wait for that.
    """

    def __init__(self, device: torch.device) -> None:
        """Open a stream on `device`."""
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._user = torch.cuda.current_stream(device)

    def empty(self, nbytes: int) -> Tensor:
        """Memory on the device, uint8 [nbytes]."""
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, into: Tensor, from_: Tensor) -> torch.cuda.Event:
        """Queue a copy; the event tells when it is done and `from_` may change."""
        with torch.cuda.stream(self._stream):
            into.copy_(from_, non_blocking=True)
        return self._stream.record_event()

    def hand_over(self, copied: torch.cuda.Event) -> None:
        """Let the current stream go on after a copy."""
        self._user = torch.cuda.current_stream(self._device)
        self._user.wait_event(copied)

    def release(self) -> None:
        """What was handed over is not used by anything that is not queued yet."""
        self._stream.wait_event(self._user.record_event())

    def synchronize(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()


class HostWeights:
    """Units in host memory; see `WeightStore` in `weights.py`."""

    def __init__(self, sizes: Sequence[int], *, device: torch.device, pin: bool) -> None:
        """Reserve memory.

        Args:
            sizes: bytes of each unit; 0 for those that rest elsewhere.
            device: where they are used.
            pin: page-lock it.
        """
        self._memory = BufferPool(1, nbytes=max(1, sum(sizes)), pin=pin)
        self._rows = self._memory.take()[: sum(sizes)].split(list(sizes))
        self._lane = Lane(device) if device.type == "cuda" else None
        self._ahead: dict[int, _Arrival] = {}

    def fetch(self, unit: int, following: Sequence[int]) -> Tensor:
        """See `WeightStore.fetch`."""
        if self._lane is None:
            return self._rows[unit]
        arrival = self._ahead.pop(unit, None) or self._start(unit, self._lane)
        self._ahead = {other: self._ahead.get(other) or self._start(other, self._lane) for other in following[:1]}
        self._lane.hand_over(arrival.copied)
        return arrival.rows

    def release(self) -> None:
        """See `WeightStore.release`."""
        if self._lane is not None:
            self._lane.release()

    def drop_prefetched(self) -> None:
        """See `WeightStore.drop_prefetched`."""
        if self._lane is not None:
            self._lane.synchronize()
        self._ahead.clear()

    def write(self, unit: int, start: int, *, values: Tensor) -> None:
        """See `WeightStore.write`."""
        self.drop_prefetched()  # no copy may read what changes
        self._rows[unit][start : start + values.numel()].copy_(values)

    def read(self, unit: int, start: int, *, count: int) -> Tensor:
        """See `WeightStore.read`."""
        return self._rows[unit][start : start + count].clone()

    def flush(self) -> None:
        """See `WeightStore.flush`: writes have ended when they return."""

    def close(self) -> None:
        """See `WeightStore.close`."""
        self.drop_prefetched()
        self._rows = ()
        self._memory.close()

    def _start(self, unit: int, lane: Lane) -> _Arrival:
        rows = lane.empty(self._rows[unit].numel())
        return _Arrival(rows, lane.copy(rows, self._rows[unit]))
