"""How updated weights get from where they were computed to where forward reads them.

Both classes serve weights that rest on the device; `weights.py` has those for the other tiers. They take fp32 values
and round them to the working type.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.engine.adam_kernel import ParameterSlice
from rlhf.engine.dtensors import local_shard
from rlhf.engine.fsdp_units import ParameterGroup
from rlhf.engine.offload.copy_stream import CopyEvent, CopyStream
from rlhf.engine.offload.weights import ShardedWeights

_SLOTS = 4
_SLOT = 1 << 22  # elements of a page-locked buffer


class DeviceWeights:
    """Weights on the device where the optimizer computes too."""

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        """Serve the parameters of `groups`."""
        self._parameters = {name: parameter for group in groups for name, parameter in group.items()}

    def flat(self, name: str) -> Tensor:
        """The elements themselves, in the working type; FSDP2 may move them, so they are looked up each time."""
        return local_shard(self._parameters[name]).view(-1)

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Round `values` into the weights."""
        self.flat(name)[start : start + values.numel()].copy_(values)

    def write_back(self, pieces: Sequence[ParameterSlice]) -> None:
        """`write` for many, in one call to the device."""
        flats = {name: self.flat(name) for name in {piece.name for piece in pieces}}
        into = [flats[piece.name][piece.start : piece.start + piece.weight.numel()] for piece in pieces]
        torch._foreach_copy_(into, [piece.weight for piece in pieces])

    def read(self, name: str, start: int, *, count: int) -> Tensor:
        """A copy in fp32."""
        return self.flat(name)[start : start + count].to(torch.float32, copy=True)

    def flush(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing to let go."""


class StagedWeights:
    """Weights on a device, set from the host through page-locked buffers on a stream of their own."""

    def __init__(self, groups: Sequence[ParameterGroup], device: torch.device, *, pin: bool) -> None:
        """Serve the parameters of `groups`, on `device`; `pin` page-locks the buffers."""
        self._rows = DeviceWeights(groups)
        self._courier = CopyStream(device)
        self._slots: deque[tuple[Tensor, CopyEvent]] = deque()
        self._pin = pin and device.type == "cuda"

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Round on the host, where `values` are in cache, and send the rounded ones."""
        flat = self._rows.flat(name)
        for part in values.split(_SLOT):
            slot = self._slot()
            staged = slot.view(flat.dtype)[: part.numel()].copy_(part)
            self._slots.append((slot, self._courier.copy(flat[start : start + part.numel()], staged)))
            start += part.numel()

    def read(self, name: str, start: int, *, count: int) -> Tensor:
        """A copy on the host, in fp32."""
        return self._rows.read(name, start, count=count).cpu()

    def flush(self) -> None:
        """The current stream waits for what was sent."""
        self._courier.join()

    def close(self) -> None:
        """Let the buffers go, once nothing uses them."""
        for _, receipt in self._slots:
            receipt.wait()
        self._slots.clear()

    def _slot(self) -> Tensor:
        if len(self._slots) < _SLOTS:
            return torch.empty(_SLOT * 4, dtype=torch.uint8, pin_memory=self._pin)
        slot, receipt = self._slots.popleft()
        receipt.wait()
        return slot


def write_back(rows: ShardedWeights, pieces: Sequence[ParameterSlice]) -> None:
    """Write the updated weights of `pieces`."""
    if isinstance(rows, DeviceWeights):
        rows.write_back(pieces)
        return
    for piece in pieces:
        rows.write(piece.name, piece.start, values=piece.weight)
