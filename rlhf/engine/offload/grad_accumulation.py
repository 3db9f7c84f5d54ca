"""Sums of gradients over the micro-batches of a step, in the memory of the device or of the host.

The first micro-batch's gradient is kept in its own type; only a second one makes an fp32 sum of it. So a step of one
micro-batch needs no fp32 copy, and gives the same numbers as if there were one.
See also: sums on disk (`optimizer_state_nvme.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rlhf.engine.norms import squared_norm
from rlhf.engine.offload.buffer_pool import BufferPool, ThreadTransfer
from rlhf.engine.offload.copy_stream import CopyEvent, CopyStream, threads_on

_STAGED = 1 << 23  # elements of a staging buffer
STAGING_BYTES = 2 * 4 * _STAGED
"""Page-locked memory that a device's `PinnedStaging` takes for steps of several micro-batches."""


class GradAccumulator(ABC):
    """Gradient sums of some parameters: flat shards, by the parameter's name."""

    @abstractmethod
    def add(self, name: str, gradient: Tensor) -> None:
        """Add a micro-batch's flat gradient, which belongs to the accumulator from now on."""

    @abstractmethod
    def squared_norms(self) -> dict[str, Tensor]:
        """Squared 2-norm of each sum there is: [] fp64, on any device."""

    @abstractmethod
    def clear(self) -> None:
        """Drop the sums."""

    @abstractmethod
    def close(self) -> None:
        """Free memory and threads."""


class InMemoryGradAccumulator(GradAccumulator):
    """Sums that a step takes as tensors."""

    @abstractmethod
    def take(self) -> dict[str, Tensor]:
        """The complete sums; what is added from now on belongs to the next step."""


class DeviceGradAccumulator(InMemoryGradAccumulator):
    """Sums in the memory where the gradients are made."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Keep the first gradient as it is, add others in fp32."""
        known = self._sums.get(name)
        if known is None:
            self._sums[name] = gradient
        elif known.dtype == torch.float32:
            known += gradient
        else:
            self._sums[name] = known.float().add_(gradient)  # the second of them: from now on in fp32

    def squared_norms(self) -> dict[str, Tensor]:
        """Computed on the gradients' device; on CUDA in a few calls for all."""
        if not any(gradient.is_cuda for gradient in self._sums.values()):
            return {name: squared_norm(gradient) for name, gradient in self._sums.items()}
        norms = torch._foreach_norm(list(self._sums.values()), 2, dtype=torch.float32)
        return {name: norm.double().square() for name, norm in zip(self._sums, norms, strict=True)}

    def take(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The sums themselves, of `names` or all."""
        taken = {name: gradient for name, gradient in self._sums.items() if names is None or name in names}
        self._sums = {name: gradient for name, gradient in self._sums.items() if name not in taken}
        return taken

    def clear(self) -> None:
        """Free the memory."""
        self._sums = {}

    def close(self) -> None:
        """Free the memory."""
        self.clear()


class PinnedStaging:
    """What all host accumulators of a device share: a copy stream, a thread that adds, and page-locked memory."""

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        """Serve gradients made on `device`; `pin` page-locks the memory they are copied to."""
        self.stream = CopyStream(device)
        self._pin = pin and device.type == "cuda"
        self._thread = threads_on(device, 1, name="gradient sums")  # one: additions stay in order
        self._pinned: list[BufferPool] = []

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Host memory for copies from the device, [numel]; page-locked until `close`."""
        if not self._pin:
            return torch.empty(numel, dtype=dtype)
        pool = self._new_pool(1, max(numel * dtype.itemsize, 1))  # PyTorch's own allocator rounds up to powers of two
        return pool.take()[: numel * dtype.itemsize].view(dtype)

    def widen(self, total: Tensor, arrived: Tensor, *, copied: CopyEvent) -> Future[None]:
        """Make fp32 `total` a copy of `arrived`, once that is there; the caller does not wait."""
        return self._thread.submit(_once, copied, total.copy_, values=arrived)

    def add(self, total: Tensor, gradient: Tensor) -> Future[None]:
        """Add a gradient of the device to fp32 `total` on the host, both flat and not empty; the caller does not wait.

        Calls are carried out in order; the result is that of the last part.
        """
        for part, into in zip(torch.split(gradient, _STAGED), torch.split(total, _STAGED), strict=True):
            buffer = self._buffers.take()  # waits for the addition that used it before the last one
            staged = buffer.view(part.dtype)[: part.numel()]
            added = self._thread.submit(_once, self.stream.copy(staged, part), into.add_, values=staged)
            # Lifetime: the buffer is copied into and then read by the thread; both have ended once `added` has.
            self._buffers.hold(buffer, ThreadTransfer([added]))
            self._buffers.give_back(buffer)
        return added

    def close(self) -> None:
        """End the thread and unlock the memory, once nothing uses either."""
        self.stream.synchronize()  # copies that nobody waited for still write to page-locked memory
        self._thread.shutdown()
        for pool in self._pinned:
            pool.close()
        self._pinned = []

    @cached_property
    def _buffers(self) -> BufferPool:
        """Made when first needed: a step of one micro-batch adds nothing."""
        return self._new_pool(2, 4 * _STAGED)

    def _new_pool(self, count: int, nbytes: int) -> BufferPool:
        self._pinned.append(BufferPool(count, nbytes=nbytes, pin=self._pin))
        return self._pinned[-1]


def _once(copied: CopyEvent, update: Callable[[Tensor], Tensor], *, values: Tensor) -> None:
    """Runs in the thread: the host may read `values` only when they have arrived."""
    copied.wait()
    update(values)


@dataclass
class _HostSum:
    """One parameter's sum on the host."""

    arrived: Tensor  # the first micro-batch's gradient, in its own type
    copied: CopyEvent  # of `arrived`
    square: Tensor | None  # of `arrived`, computed on the device; None when it is outdated
    total: Tensor | None = None  # fp32, once there is a second
    adding: Future[None] | None = None  # the last addition

    def wait(self) -> Tensor:
        """The complete sum."""
        self.copied.wait()
        if self.adding is not None:
            self.adding.result()
        return self.arrived if self.total is None else self.total


@dataclass
class _Side:
    """Host memory for one step's sums, kept from step to step: page-locked memory is slow to get."""

    arrived: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)


class HostGradAccumulator(InMemoryGradAccumulator):
    """Sums on the host of gradients that a device makes and frees, copied and added while backward goes on."""

    def __init__(self, staging: PinnedStaging, *, sides: int = 1) -> None:
        """Start empty; with two `sides`, sums that were taken stay as they are while the next step's are added."""
        self._staging = staging
        self._sides = [_Side() for _ in range(sides)]
        self._sums: dict[str, _HostSum] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Start to copy the gradient to its place, or to where it is added."""
        known = self._sums.get(name)
        if known is None:
            self._sums[name] = self._first(name, gradient)
            return
        known.square = None
        if known.total is None:
            totals = self._sides[0].totals
            if name not in totals:
                totals[name] = torch.empty(gradient.numel())
            known.total = totals[name]
            known.adding = self._staging.widen(known.total, known.arrived, copied=known.copied)
        if gradient.numel():
            known.adding = self._staging.add(known.total, gradient)

    def squared_norms(self) -> dict[str, Tensor]:
        """Computed on the device for the sum of one micro-batch, on the host for several."""
        return {name: squared_norm(s.wait()) if s.square is None else s.square for name, s in self._sums.items()}

    def take(self) -> dict[str, Tensor]:
        """The complete sums, in memory that the step after next (the next one, with one side) overwrites."""
        taken = {name: known.wait() for name, known in self._sums.items()}  # host wait: all copies and additions
        self._sums = {}
        self._sides.append(self._sides.pop(0))
        return taken

    def clear(self) -> None:
        """Drop the sums; their memory is used again."""
        # Order: copies and additions under way come before the next step's, on the same stream and the same thread.
        self._sums = {}

    def close(self) -> None:
        """Close what all accumulators of the device share, too: they go together."""
        self._sums, self._sides = {}, []
        self._staging.close()

    def _first(self, name: str, gradient: Tensor) -> _HostSum:
        arrived = self._sides[0].arrived.get(name)
        if arrived is None or arrived.dtype != gradient.dtype:
            arrived = self._staging.empty(gradient.numel(), gradient.dtype)
            self._sides[0].arrived[name] = arrived
        square = squared_norm(gradient)  # before the copy: the device forgets the gradient after it
        return _HostSum(arrived, self._staging.stream.copy(arrived, gradient), square)
