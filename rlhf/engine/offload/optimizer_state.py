"""Stores of optimizer state: masters, moments and gradient sums, in the memory of one device. See [Note: offload].

Backward adds gradients to a store; `step` then updates the state where it is kept, so it never travels to the device.
See also: state on disk (`optimizer_state_nvme.py`), and which parameters get which store (`placement.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.engine.adam_kernel import AdamGroup, AdamKernel, ParameterSlice, UpdatedWeights
from rlhf.engine.fsdp_units import ParameterGroup, local_shard
from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator, GradAccumulator, HostGradAccumulator
from rlhf.engine.offload.working_weights import ShardedWeights
from rlhf.engine.state_format import (
    BLOCK,
    STATE_KEYS,
    Quantised,
    SplitMaster,
    StateFormat,
    Stored,
    num_blocks,
    pack,
    unpack,
)


class ParameterShard(NamedTuple):
    """This rank's shard of a parameter, described without its memory."""

    name: str
    shape: torch.Size
    decays: bool

    @property
    def numel(self) -> int:
        """Elements of the shard."""
        return self.shape.numel()


def shards_of(group: ParameterGroup) -> list[ParameterShard]:
    """This rank's shard of each parameter; matrices decay, biases and norms do not."""
    return [
        ParameterShard(name, local_shard(parameter).shape, parameter.ndim >= 2) for name, parameter in group.items()
    ]


class Update(NamedTuple):
    """One optimizer step, the same for all stores."""

    touched: Collection[str]  # names of the parameters that have a gradient on some rank
    lr: float
    scale: float  # factor on every gradient
    betas: Sequence[float] | None = None  # where a schedule cycles them
    groups: Mapping[str, AdamGroup] | None = None  # settings by parameter, where a caller has groups of its own

    def run(self, kernel: AdamKernel, slices: Sequence[ParameterSlice]) -> Iterator[list[UpdatedWeights]]:
        """See `AdamKernel.update`."""
        return kernel.update(slices, lr=self.lr, scale=self.scale, betas=self.betas, groups=self.groups)


class OptimizerStateStore(ABC):
    """Owns the optimizer state and gradient sums of some parameters.

    Backward adds gradients; `step` then updates the state, on whichever device or disk it lives.
    """

    in_memory = True
    """False where `read` brings shards from a disk."""
    has_masters = True
    """False where the weights that AdamW updates are the working weights themselves."""

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        gradients: GradAccumulator,
        *,
        kernel: AdamKernel,
        weights: ShardedWeights,
        format_: StateFormat,
    ) -> None:
        """Keep the state of `shards` where `kernel` runs; `weights` are the working weights that follow the masters."""
        self.shards = {shard.name: shard for shard in shards}
        self.gradients, self.kernel, self.weights, self.format = gradients, kernel, weights, format_
        self.steps = {shard.name: torch.zeros((), device=kernel.device) for shard in shards}
        """Updates so far of each parameter, [] fp32, for the bias correction."""

    @property
    def failure(self) -> RuntimeError | None:
        """An error of a disk that was not raised yet, because all ranks must be told in the same place."""
        return None

    @abstractmethod
    def step(self, update: Update) -> None:
        """Update the state and the working weights from the gradient sums, which are then dropped."""

    @abstractmethod
    def read(self, name: str, key: str) -> Tensor:
        """This rank's shard of one of `STATE_KEYS`: fp32, its own memory or the store's."""

    @abstractmethod
    def write(self, name: str, key: str, *, shard: Tensor) -> None:
        """Set it; working weights follow split masters, of which they are a part, and no others."""

    def packed(self, name: str, key: str, *, codes: Tensor, scales: Tensor | None, start: int) -> Stored:
        """Elements from `start` of a shard, in the memory that stores them: `scales` are those of 8 bits."""
        if key == "weight":
            return SplitMaster(codes, partial(self.weights.read, name), start) if self.format.is_split else codes
        if scales is None:
            return codes
        numel = min(self.shards[name].numel - start, codes.numel())  # codes fill whole blocks
        return Quantised(codes, scales, numel, start // BLOCK)

    def close(self) -> None:
        """Free files, threads and page-locked memory."""
        self.gradients.close()


class InMemoryStateStore(OptimizerStateStore):
    """State in the memory of one device: the model's, or the host."""

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        gradients: DeviceGradAccumulator | HostGradAccumulator,
        *,
        kernel: AdamKernel,
        weights: ShardedWeights,
        format_: StateFormat,
        in_place: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Start at zero moments, on the device of `kernel`, where the gradients must be, too.

        `in_place` gives the flat fp32 working weights that are updated themselves; None allocates masters.
        """
        super().__init__(shards, gradients, kernel=kernel, weights=weights, format_=format_)
        self._sums, self._in_place = gradients, in_place
        self.has_masters = in_place is None
        keys = STATE_KEYS if self.has_masters else STATE_KEYS[1:]
        self._state = {key: {shard.name: self._zeros(shard, key) for shard in shards} for key in keys}

    def step(self, update: Update) -> None:
        """One update; on the host, the working weights are sent while later chunks are computed."""
        taken = self._sums.take()  # Lifetime: gradients on the device are freed when this returns
        shards = [shard for name, shard in self.shards.items() if name in taken and name in update.touched]
        if not shards:
            return
        # One call for all counts: on CUDA each would be a kernel of its own.
        torch._foreach_add_([self.steps[shard.name] for shard in shards], 1)
        slices = [self._slice(shard, taken[shard.name]) for shard in shards]
        for chunk in update.run(self.kernel, slices):
            if self.has_masters:
                self.weights.write_back(chunk)  # while the chunk is in cache

    def read(self, name: str, key: str) -> Tensor:
        """The memory itself where it is fp32, else a copy."""
        return unpack(self._stored(name, key), self.kernel.device).view(self.shards[name].shape)

    def write(self, name: str, key: str, *, shard: Tensor) -> None:
        """Copy the shard here."""
        stored = self._stored(name, key)
        rounded = pack(stored, shard.reshape(-1).to(self.kernel.device), step=self.steps[name])
        if isinstance(stored, SplitMaster):
            self.weights.write(name, 0, values=rounded)

    def _slice(self, shard: ParameterShard, gradient: Tensor) -> ParameterSlice:
        weight, *moments = (self._stored(shard.name, key) for key in STATE_KEYS)
        return ParameterSlice(shard.name, 0, shard.decays, self.steps[shard.name], weight, gradient, *moments)

    def _zeros(self, shard: ParameterShard, key: str) -> Stored:
        """Memory for one of `STATE_KEYS`."""
        quantised = self.format.is_quantised and key != "weight"
        blocks, device = num_blocks(shard.numel), self.kernel.device
        codes = torch.zeros(blocks * BLOCK if quantised else shard.numel, dtype=self.format.dtype(key), device=device)
        scales = torch.zeros(blocks, device=device) if quantised else None
        return self.packed(shard.name, key, codes=codes, scales=scales, start=0)

    def _stored(self, name: str, key: str) -> Stored:
        """One of `STATE_KEYS`, flat."""
        if key == "weight" and self._in_place is not None:
            return self._in_place(name)  # looked up each time: FSDP2 may have moved it
        return self._state[key][name]
