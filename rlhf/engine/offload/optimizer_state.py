"""Stores of optimizer state: masters, moments and gradient sums, in the memory of one device. See [Note: offload].

Backward adds gradients to a store; `step` then updates the state where it is kept, so it never travels to the device.
See also: state on disk (`optimizer_state_nvme.py`), and which parameters get which store (`placement.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.engine.adam_kernel import AdamKernel, ParameterSlice
from rlhf.engine.fsdp_units import ParameterGroup, local_shard
from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator, GradAccumulator, HostGradAccumulator
from rlhf.engine.offload.working_weights import ShardedWeights

STATE_KEYS = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: the fp32 master weight and the two moments."""


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
    ) -> None:
        """Keep the state of `shards` where `kernel` runs; `weights` are the working weights that follow the masters."""
        self.shards = {shard.name: shard for shard in shards}
        self.gradients, self.kernel, self.weights = gradients, kernel, weights
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
        """Set it; working weights do not follow."""

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
        moments: torch.dtype,
        in_place: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Start at zero moments of the type `moments`, on the device of `kernel`, where the gradients must be, too.

        `in_place` gives the flat fp32 working weights that are updated themselves; None allocates masters.
        """
        super().__init__(shards, gradients, kernel=kernel, weights=weights)
        self._sums, self._in_place = gradients, in_place
        self.has_masters = in_place is None
        types = {"exp_avg": moments, "exp_avg_sq": moments} | ({"weight": torch.float32} if self.has_masters else {})
        self._state = {
            key: {shard.name: torch.zeros(shard.numel, dtype=dtype, device=kernel.device) for shard in shards}
            for key, dtype in types.items()
        }

    def step(self, update: Update) -> None:
        """One update; on the host, the working weights are sent while later chunks are computed."""
        taken = self._sums.take()  # Lifetime: gradients on the device are freed when this returns
        shards = [shard for name, shard in self.shards.items() if name in taken and name in update.touched]
        if not shards:
            return
        # One call for all counts: on CUDA each would be a kernel of its own.
        torch._foreach_add_([self.steps[shard.name] for shard in shards], 1)
        slices = [self._slice(shard, taken[shard.name]) for shard in shards]
        for chunk in self.kernel.update(slices, lr=update.lr, scale=update.scale, betas=update.betas):
            if self.has_masters:
                self.weights.write_back(chunk)  # while the chunk is in cache

    def read(self, name: str, key: str) -> Tensor:
        """The memory itself where it is fp32, else a copy."""
        return self._tensor(name, key).float().view(self.shards[name].shape)

    def write(self, name: str, key: str, *, shard: Tensor) -> None:
        """Copy the shard here."""
        self._tensor(name, key).copy_(shard.reshape(-1))

    def _slice(self, shard: ParameterShard, gradient: Tensor) -> ParameterSlice:
        weight, *moments = (self._tensor(shard.name, key) for key in STATE_KEYS)
        return ParameterSlice(shard.name, 0, shard.decays, self.steps[shard.name], weight, gradient, *moments)

    def _tensor(self, name: str, key: str) -> Tensor:
        """One of `STATE_KEYS`, flat."""
        if key == "weight" and self._in_place is not None:
            return self._in_place(name)  # looked up each time: FSDP2 may have moved it
        return self._state[key][name]
