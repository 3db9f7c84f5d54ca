"""Sums of gradients over the micro-batches of a step, in the memory of the device or of the host, and their norms.

The first micro-batch's gradient is kept in its own type; only a second one makes an fp32 sum of it. So a step of one
micro-batch needs no fp32 copy, and gives the same numbers as if there were one. With bf16 sums
(`engine.grad_accum_dtype`), every gradient and every sum is rounded to it, and norms are those of what is kept.

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

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Start empty; sums of several gradients are of `dtype`, fp32 or bf16."""
        self.dtype = dtype

    def rounded(self, gradient: Tensor) -> Tensor:
        """The gradient, in a type that is no wider than the sums'."""
        return gradient if self.dtype is torch.float32 else gradient.to(self.dtype)

    @abstractmethod
    def add(self, name: str, gradient: Tensor) -> None:
        """Add a micro-batch's flat gradient, which belongs to the accumulator from now on."""

    @abstractmethod
    def squared_norms(self) -> dict[str, Tensor]:
        """Squared 2-norm of each sum there is: [] fp64, on any device."""

    def in_memory(self) -> dict[str, Tensor]:
        """The sums that are where the gradients were made; not all of them, where they leave it."""
        return {}

    @abstractmethod
    def clear(self) -> None:
        """Drop the sums."""

    def close(self) -> None:
        """Free memory and threads."""
        self.clear()


class DeviceGradAccumulator(GradAccumulator):
    """Sums in the memory where the gradients are made."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Start empty; sums of several gradients are of `dtype`."""
        super().__init__(dtype)
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Keep the first gradient, add others to it."""
        known, gradient = self._sums.get(name), self.rounded(gradient)
        if known is None:
            self._sums[name] = gradient
        elif known.dtype == self.dtype:
            known += gradient
        else:
            self._sums[name] = known.to(self.dtype).add_(gradient)  # the second of them: from now on in fp32

    def squared_norms(self) -> dict[str, Tensor]:
        """Computed on the gradients' device; on CUDA in a few calls for all."""
        if not any(gradient.is_cuda for gradient in self._sums.values()):
            return {name: squared_norm(gradient) for name, gradient in self._sums.items()}
        norms = torch._foreach_norm(list(self._sums.values()), 2, dtype=torch.float32)
        return {name: norm.double().square() for name, norm in zip(self._sums, norms, strict=True)}

    def in_memory(self) -> dict[str, Tensor]:
        """All sums."""
        return self._sums

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
        self._pinned: dict[int, BufferPool] = {}  # by address

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Host memory for copies from the device, [numel]; page-locked until `free` or `close`."""
        if not self._pin:
            return torch.empty(numel, dtype=dtype)
        pool = BufferPool(1, nbytes=max(numel * dtype.itemsize, 1), pin=True)  # PyTorch's allocator rounds up to 2^n
        memory = pool.take()[: numel * dtype.itemsize].view(dtype)
        self._pinned[memory.data_ptr()] = pool
        return memory

    def free(self, memory: Tensor) -> None:
        """Unlock what `empty` gave; its pages go with the last tensor that shows them."""
        pool = self._pinned.pop(memory.data_ptr(), None)
        if pool is not None:
            pool.close()

    def once(self, copied: CopyEvent, update: Callable[[Tensor], object], *, values: Tensor) -> Future[None]:
        """Have the thread call `update(values)` once `copied` has filled `values`; the caller does not wait.

        Calls are carried out in order.
        """

        def work() -> None:
            copied.wait()  # Order: until then the bytes are on their way from the device
            update(values)

        return self._thread.submit(work)

    def add(self, total: Tensor, gradient: Tensor, *, first: bool = False) -> Future[None]:
        """Add a gradient of the device to `total` on the host, both flat and not empty; returns the last part.

        The `first` replaces what is there.
        """
        for part, into in zip(torch.split(gradient, _STAGED), torch.split(total, _STAGED), strict=True):
            buffer = self._buffers.take()  # waits for the addition that used it before the last one
            staged = buffer.view(part.dtype)[: part.numel()]
            added = self.once(self.stream.copy(staged, part), into.copy_ if first else into.add_, values=staged)
            # Lifetime: the buffer is copied into and then read by the thread; both have ended once `added` has.
            self._buffers.hold(buffer, ThreadTransfer([added]))
            self._buffers.give_back(buffer)
        return added

    def close(self) -> None:
        """End the thread and unlock the memory, once nothing uses either."""
        self.stream.synchronize()  # copies that nobody waited for still write to page-locked memory
        self._thread.shutdown()
        for pool in self._pinned.values():
            pool.close()
        self._pinned = {}

    @cached_property
    def _buffers(self) -> BufferPool:
        """Made when first needed: a step of one micro-batch adds nothing."""
        pool = self._pinned[0] = BufferPool(2, nbytes=4 * _STAGED, pin=self._pin)  # 0 is nobody's address
        return pool


@dataclass
class _HostSum:
    """One parameter's sum on the host."""

    total: Tensor
    copied: CopyEvent  # of the first gradient, where it was copied to `total` as it is
    square: Tensor | None  # of the only gradient, computed on the device; None once there are several
    adding: Future[None] | None = None  # the last addition

    def wait(self) -> Tensor:
        """The complete sum; the host waits for copies and additions."""
        self.copied.wait()
        if self.adding is not None:
            self.adding.result()
        return self.total


class HostGradAccumulator(GradAccumulator):
    """Sums on the host of gradients that a device makes and frees, copied and added while backward goes on.

    There is one piece of host memory for each parameter, in the type of its sum: it becomes wider when a second
    gradient comes for the first time, and stays so.
    """

    def __init__(self, staging: PinnedStaging, dtype: torch.dtype = torch.float32) -> None:
        """Start empty; sums of several gradients are of `dtype`."""
        super().__init__(dtype)
        self._staging = staging
        self._memory: dict[str, Tensor] = {}  # kept from step to step: page-locked memory is slow to get
        self._sums: dict[str, _HostSum] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Start to copy the gradient to its place, or to where it is added."""
        known, gradient = self._sums.get(name), self.rounded(gradient)
        if known is None:
            self._sums[name] = self._first(name, gradient)
            return
        known.square = None
        if known.total.dtype != self.dtype:
            self._widen(name, known)
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
        for known in self._sums.values():
            known.wait()  # Order: the next step's first copy is on the stream, and additions are in the thread
        self._sums = {}

    def close(self) -> None:
        """Close what all accumulators of the device share, too: they go together."""
        self._sums, self._memory = {}, {}
        self._staging.close()

    def _first(self, name: str, gradient: Tensor) -> _HostSum:
        memory = self._memory.get(name)
        if memory is None:
            memory = self._memory[name] = self._staging.empty(gradient.numel(), gradient.dtype)
        square = squared_norm(gradient)  # before the copy: the device forgets the gradient after it
        if memory.dtype == gradient.dtype:
            return _HostSum(memory, self._staging.stream.copy(memory, gradient), square)
        adding = self._staging.add(memory, gradient, first=True) if gradient.numel() else None
        return _HostSum(memory, CopyEvent(), square, adding)

    def _widen(self, name: str, known: _HostSum) -> None:
        """Have the thread move the first gradient to memory of the sum's type."""
        narrow, total = known.total, torch.empty(known.total.numel(), dtype=self.dtype)

        def move(values: Tensor) -> None:
            total.copy_(values)
            self._staging.free(narrow)

        known.adding = self._staging.once(known.copied, move, values=narrow)
        known.total = self._memory[name] = total
