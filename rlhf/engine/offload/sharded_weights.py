"""Working weights as the optimizer sees them: by parameter, this rank's shard, wherever it is kept.

Here are the weights that stay on the device, written where the optimizer computes: there, or on the host. All take fp32
values and round them to the working type. See also: weights that are offloaded (`offloaded_weights.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.engine.adam_kernel import ParameterSlice
from rlhf.engine.dtensors import local_shard
from rlhf.engine.fsdp_units import ParameterGroup
from rlhf.engine.offload.buffer_pool import BufferPool
from rlhf.engine.offload.copy_stream import CopyStream

_BUFFERS = 4
_STAGED = 1 << 22  # elements of a staging buffer
STAGING_BYTES = _BUFFERS * 4 * _STAGED
"""Page-locked memory of `StagedWeights`."""


class ShardedWeights(ABC):
    """This rank's shards of the working weights, flat, by the parameter's name."""

    @abstractmethod
    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Make `values` [n], rounded to the working type, the elements from `start` of a shard."""

    @abstractmethod
    def read(self, name: str, start: int, *, count: int) -> Tensor:
        """A copy of `count` elements from `start` of a shard: [count] fp32."""

    def write_back(self, slices: Sequence[ParameterSlice]) -> None:
        """Write the updated masters of `slices`."""
        for part in slices:
            self.write(part.name, part.start, values=part.weight)

    @abstractmethod
    def flush(self) -> None:
        """Make what is queued or called from now on see all writes so far."""

    @abstractmethod
    def close(self) -> None:
        """Free memory and files."""


class DeviceWeights(ShardedWeights):
    """Weights on the device where the optimizer computes, too."""

    def __init__(self, groups: Sequence[ParameterGroup]) -> None:
        """Serve the parameters of `groups`."""
        self._parameters = {name: parameter for group in groups for name, parameter in group.items()}

    def shard(self, name: str) -> Tensor:
        """The elements themselves, flat; FSDP2 may move them, so they are looked up each time."""
        return local_shard(self._parameters[name]).view(-1)

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Round `values` into the weights."""
        self.shard(name)[start : start + values.numel()].copy_(values)

    def write_back(self, slices: Sequence[ParameterSlice]) -> None:
        """All slices in one call to the device."""
        shards = {name: self.shard(name) for name in {part.name for part in slices}}
        into = [shards[part.name][part.start : part.start + part.weight.numel()] for part in slices]
        torch._foreach_copy_(into, [part.weight for part in slices])

    def read(self, name: str, start: int, *, count: int) -> Tensor:
        """A copy on the device."""
        return self.shard(name)[start : start + count].to(torch.float32, copy=True)

    def flush(self) -> None:
        """Do nothing: writes are queued on the current stream, like the forward that reads them."""

    def close(self) -> None:
        """Do nothing: the model owns the memory."""


class StagedWeights(ShardedWeights):
    """Weights on a device, written from the host through page-locked buffers on a stream of their own."""

    def __init__(self, groups: Sequence[ParameterGroup], device: torch.device, *, pin: bool) -> None:
        """Serve the parameters of `groups`, on `device`; `pin` page-locks the buffers."""
        self._weights = DeviceWeights(groups)
        self._stream = CopyStream(device)
        self._pool = BufferPool(_BUFFERS, nbytes=4 * _STAGED, pin=pin and device.type == "cuda")

    def write(self, name: str, start: int, *, values: Tensor) -> None:
        """Round on the host, where `values` are in cache, and send the rounded ones."""
        shard = self._weights.shard(name)
        for part in torch.split(values, _STAGED):
            buffer = self._pool.take()  # waits for the copy that used it last
            staged = buffer.view(shard.dtype)[: part.numel()].copy_(part)
            # Order: the copy follows a forward that is queued and still reads the old weights.
            self._pool.hold(buffer, self._stream.copy(shard[start : start + part.numel()], staged))
            self._pool.give_back(buffer)
            start += part.numel()

    def read(self, name: str, start: int, *, count: int) -> Tensor:
        """A copy on the host."""
        return self._weights.read(name, start, count=count).cpu()  # waits for the device

    def flush(self) -> None:
        """Make the current stream wait for what was sent: the next forward reads the new weights."""
        self._stream.join()

    def close(self) -> None:
        """Free the buffers, once no copy reads them."""
        self._pool.close()  # waits for every copy that holds one
