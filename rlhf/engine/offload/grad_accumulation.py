"""Sums of gradients over the micro-batches of a step, in the memory of the device or of the host, and their norms.

The first micro-batch's gradient is kept in its own type; only a second one makes an fp32 sum of it. So a step of one
micro-batch needs no fp32 copy, and gives the same numbers as if there were one.

[Note: norms] A squared norm is summed in fp32 over blocks of 2048 elements and in fp64 over blocks, so that it does not
depend on where a shard was cut (at multiples of a block) or kept, but for the last bits of the fp64 sum. Rounded to
fp32 it is the same number, and clipping by it gives the same weights with every state store of a CPU machine. (CUDA
sums the norms of gradients that stay there in fp32.)
See also: sums on disk (`optimizer_state_nvme.py`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlhf.engine.offload.transfers import BufferPool, CopyEvent, CopyStream, ThreadTransfer, threads_on

BLOCK = 2048  # elements; see [Note: norms]
_TILE = 1 << 18  # elements that are cast at once on the CPU: they stay in cache
_STAGED = 1 << 23  # elements of a staging buffer
STAGING_BYTES = 2 * 4 * _STAGED
"""Page-locked memory that a device's `PinnedStaging` takes for steps of several micro-batches."""


def squared_norm(shard: Tensor) -> Tensor:
    """Sum of squares of a flat tensor of any floating type: [] fp64 on its device."""
    total = torch.zeros((), dtype=torch.float64, device=shard.device)
    step = _TILE if shard.device.type == "cpu" else max(shard.numel(), 1)
    for tile in torch.split(shard, step):
        whole = tile.numel() // BLOCK * BLOCK
        if shard.device.type == "cpu" and shard.dtype != torch.float32:
            # A norm that casts as it goes is many times slower than a cast in cache and a norm.
            tile = _scratch(tile.numel()).copy_(tile)
        for blocks in (tile[:whole].view(-1, BLOCK), tile[whole:].view(1, -1)):
            if blocks.numel():
                norms = torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float32)  # [blocks]
                total += norms.double().square_().sum()
    return total


def _scratch(count: int) -> Tensor:
    """This thread's memory for a tile, [count] fp32: pages of a fresh one would cost more than the norm."""
    if not hasattr(_OWN, "tile"):
        _OWN.tile = torch.empty(_TILE)
    tile: Tensor = _OWN.tile
    return tile[:count]


_OWN = threading.local()


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

    def close(self) -> None:
        """Free memory and threads."""
        self.clear()


class DeviceGradAccumulator(GradAccumulator):
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
        """The sums themselves, of `names` or all; what is added from now on belongs to the next step."""
        taken = {name: gradient for name, gradient in self._sums.items() if names is None or name in names}
        self._sums = {name: gradient for name, gradient in self._sums.items() if name not in taken}
        return taken

    def clear(self) -> None:
        """Free the memory."""
        self._sums = {}


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

    def once(self, copied: CopyEvent, update: Callable[[Tensor], Tensor], *, values: Tensor) -> Future[None]:
        """Have the thread call `update(values)` once `copied` has filled `values`; the caller does not wait.

        Calls are carried out in order.
        """

        def work() -> None:
            copied.wait()  # Order: until then the bytes are on their way from the device
            update(values)

        return self._thread.submit(work)

    def add(self, total: Tensor, gradient: Tensor) -> Future[None]:
        """Add a gradient of the device to fp32 `total` on the host, both flat and not empty; returns the last part."""
        for part, into in zip(torch.split(gradient, _STAGED), torch.split(total, _STAGED), strict=True):
            buffer = self._buffers.take()  # waits for the addition that used it before the last one
            staged = buffer.view(part.dtype)[: part.numel()]
            added = self.once(self.stream.copy(staged, part), into.add_, values=staged)
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


@dataclass
class _HostSum:
    """One parameter's sum on the host."""

    arrived: Tensor  # the first micro-batch's gradient, in its own type
    copied: CopyEvent  # of `arrived`
    square: Tensor | None  # of `arrived`, computed on the device; None when it is outdated
    total: Tensor | None = None  # fp32, once there is a second
    adding: Future[None] | None = None  # the last addition

    def wait(self) -> Tensor:
        """The complete sum; the host waits for copies and additions."""
        self.copied.wait()
        if self.adding is not None:
            self.adding.result()
        return self.arrived if self.total is None else self.total


class HostGradAccumulator(GradAccumulator):
    """Sums on the host of gradients that a device makes and frees, copied and added while backward goes on."""

    def __init__(self, staging: PinnedStaging) -> None:
        """Start empty."""
        self._staging = staging
        # Host memory for the sums, kept from step to step: page-locked memory is slow to get.
        self._arrived: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._sums: dict[str, _HostSum] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Start to copy the gradient to its place, or to where it is added."""
        known = self._sums.get(name)
        if known is None:
            self._sums[name] = self._first(name, gradient)
            return
        known.square = None
        if known.total is None:
            if name not in self._totals:
                self._totals[name] = torch.empty(gradient.numel())
            known.total = self._totals[name]
            known.adding = self._staging.once(known.copied, known.total.copy_, values=known.arrived)  # widens to fp32
        if gradient.numel():
            known.adding = self._staging.add(known.total, gradient)

    def squared_norms(self) -> dict[str, Tensor]:
        """Computed on the device for the sum of one micro-batch, on the host for several."""
        return {name: squared_norm(s.wait()) if s.square is None else s.square for name, s in self._sums.items()}

    def take(self) -> dict[str, Tensor]:
        """The complete sums, in memory that the next step's gradients overwrite."""
        taken = {name: known.wait() for name, known in self._sums.items()}
        self._sums = {}
        return taken

    def clear(self) -> None:
        """Drop the sums; their memory is used again."""
        # Order: copies and additions under way come before the next step's, on the same stream and the same thread.
        self._sums = {}

    def close(self) -> None:
        """Close what all accumulators of the device share, too: they go together."""
        self._sums, self._arrived, self._totals = {}, {}, {}
        self._staging.close()

    def _first(self, name: str, gradient: Tensor) -> _HostSum:
        arrived = self._arrived.get(name)
        if arrived is None or arrived.dtype != gradient.dtype:
            arrived = self._arrived[name] = self._staging.empty(gradient.numel(), gradient.dtype)
        square = squared_norm(gradient)  # before the copy: the device forgets the gradient after it
        return _HostSum(arrived, self._staging.stream.copy(arrived, gradient), square)
