"""Sums of gradients over micro-batches, in memory, until a step takes them.

The first micro-batch's gradient is kept as it came; a second makes an fp32 sum of it. So a step of one micro-batch
needs no fp32 copy, and gives the same numbers as if there were one.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rlhf.engine.norms import squared_norm
from rlhf.engine.offload.buffer_pool import BufferPool
from rlhf.engine.offload.copy_stream import CopyEvent, CopyStream

_SLOT = 1 << 23  # elements of a staging buffer


class GradAccumulator(Protocol):
    """Gradients of some parameters, by name, as flat rows."""

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a micro-batch's flat gradient, which is the sums' from now on."""

    def squares(self) -> dict[str, Tensor]:
        """Squared 2-norm of each sum there is: [] fp64, on any device."""

    def take(self) -> dict[str, Tensor]:
        """The sums, complete; what is added from now on belongs to another step."""

    def clear(self) -> None:
        """Forget all that was not taken."""

    def elements(self) -> int:
        """How many numbers they keep on the device."""

    def close(self) -> None:
        """Let memory and threads go."""


class DeviceGradAccumulator:
    """Sums where the gradients are made."""

    def __init__(self) -> None:
        """Start without any."""
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Keep it, or add it in fp32."""
        known = self._sums.get(name)
        if known is None:
            self._sums[name] = gradient
        elif known.dtype == torch.float32:
            known += gradient
        else:
            self._sums[name] = known.float().add_(gradient)

    def squares(self) -> dict[str, Tensor]:
        """On the gradients' device; CUDA's are taken all in a few calls."""
        if not any(gradient.is_cuda for gradient in self._sums.values()):
            return {name: squared_norm(gradient) for name, gradient in self._sums.items()}
        norms = torch._foreach_norm(list(self._sums.values()), 2, dtype=torch.float32)
        return {name: norm.double().square() for name, norm in zip(self._sums, norms, strict=True)}

    def take(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors themselves, of `names` or all."""
        taken = {name: gradient for name, gradient in self._sums.items() if names is None or name in names}
        self._sums = {name: gradient for name, gradient in self._sums.items() if name not in taken}
        return taken

    def clear(self) -> None:
        """Let the memory go."""
        self._sums = {}

    def elements(self) -> int:
        """All of them."""
        return sum(gradient.numel() for gradient in self._sums.values())

    def close(self) -> None:
        """Let the memory go."""
        self.clear()


class PinnedStaging:
    """What all host sums of a device share: streams, a thread that adds, and two page-locked buffers for it."""

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        """Serve gradients made on `device`; `pin` page-locks what they are copied to."""
        self.courier = CopyStream(device)
        self._pin = pin and device.type == "cuda"
        # A thread of its own begins on the first device, where merely waiting would open a context.
        on_device = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
        self._thread = ThreadPoolExecutor(1, "gradient sums", **on_device)
        self._pinned: list[BufferPool] = []
        self._slots: list[tuple[Tensor, Future[None]]] = []

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Host memory that copies from the device reach without detour: [count]."""
        if not self._pin:
            return torch.empty(count, dtype=dtype)
        buffers = BufferPool(
            1, nbytes=max(count * dtype.itemsize, 1), pin=True
        )  # PyTorch's own rounds up to powers of 2
        self._pinned.append(buffers)
        return buffers.take()[: count * dtype.itemsize].view(dtype)

    def widen(self, total: Tensor, arrived: Tensor, *, receipt: CopyEvent) -> Future[None]:
        """Make `total` a copy of `arrived`; the caller goes on before it is done."""
        return self._thread.submit(_widen, total, arrived, receipt=receipt)

    def add(self, total: Tensor, gradient: Tensor) -> Future[None]:
        """Add to fp32 `total` on the host; both flat. The caller goes on before it is done, in the order of calls."""
        for part, into in zip(gradient.split(_SLOT), total.split(_SLOT), strict=True):
            slot = self._slot()
            staged = slot.view(part.dtype)[: part.numel()]
            receipt = self.courier.copy(staged, part)
            future = self._thread.submit(_add, into, staged, receipt=receipt)
            self._slots.append((slot, future))
        return future

    def close(self) -> None:
        """End the thread and unlock the memory, once nothing uses either."""
        self.courier.finish()
        self._thread.shutdown()
        for buffers in self._pinned:
            buffers.close()
        self._pinned, self._slots = [], []

    def _slot(self) -> Tensor:
        if len(self._slots) < 2:
            return self.empty(_SLOT * 4, torch.uint8)
        slot, future = self._slots.pop(0)
        future.result()
        return slot


def _widen(total: Tensor, arrived: Tensor, *, receipt: CopyEvent) -> None:
    receipt.wait()
    total.copy_(arrived)


def _add(total: Tensor, staged: Tensor, *, receipt: CopyEvent) -> None:
    receipt.wait()
    total += staged


@dataclass
class _HostSum:
    """One parameter's sum on the host."""

    arrived: Tensor  # the first micro-batch's gradient, in its own type
    receipt: CopyEvent
    square: Tensor | None  # of `arrived`, computed where it was made; None when it is outdated
    total: Tensor | None = None  # fp32, once there is a second
    adding: Future[None] | None = None  # the last addition

    def wait(self) -> Tensor:
        self.receipt.wait()
        if self.adding is not None:
            self.adding.result()
        return self.arrived if self.total is None else self.total


@dataclass
class _Memory:
    """Host memory for one step's sums, kept from step to step: page-locked memory is slow to get."""

    arrived: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)


class HostGradAccumulator:
    """Sums on the host of gradients that a device makes and forgets, copied and added while backward goes on."""

    def __init__(self, staging: PinnedStaging, *, sides: int = 1) -> None:
        """Start without any; with two `sides`, sums that were taken stay as they are while others are added."""
        self._staging = staging
        self._memory = [_Memory() for _ in range(sides)]
        self._sums: dict[str, _HostSum] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Copy it away, into its place or to be added there."""
        known = self._sums.get(name)
        if known is None:
            self._sums[name] = self._first(name, gradient)
            return
        known.square = None
        if known.total is None:
            known.total = self._memory[0].totals.setdefault(name, torch.empty(gradient.numel()))
            known.adding = self._staging.widen(known.total, known.arrived, receipt=known.receipt)
        if gradient.numel():
            known.adding = self._staging.add(known.total, gradient)

    def squares(self) -> dict[str, Tensor]:
        """Complete; computed here where there were several micro-batches."""
        return {name: squared_norm(s.wait()) if s.square is None else s.square for name, s in self._sums.items()}

    def take(self) -> dict[str, Tensor]:
        """Host memory, which the sums of the step after next (of the next, with one side) overwrite."""
        taken = {name: known.wait() for name, known in self._sums.items()}
        self._sums = {}
        self._memory.append(self._memory.pop(0))
        return taken

    def clear(self) -> None:
        """Wait for what is under way: its memory is used again."""
        for known in self._sums.values():
            known.wait()
        self._sums = {}

    def elements(self) -> int:
        """None of them."""
        return 0

    def close(self) -> None:
        """Close what all sums of the device share, too: they go together."""
        self._sums, self._memory = {}, []
        self._staging.close()

    def _first(self, name: str, gradient: Tensor) -> _HostSum:
        arrived = self._memory[0].arrived.get(name)
        if arrived is None or arrived.dtype != gradient.dtype:
            arrived = self._staging.empty(gradient.numel(), gradient.dtype)
            self._memory[0].arrived[name] = arrived
        square = squared_norm(gradient)
        return _HostSum(arrived, self._staging.courier.copy(arrived, gradient), square)
