"""Where a group's optimizer state and gradient sums rest, and what a step does there: in memory.

A home is given gradients while backward goes on, and asked for a step once all of them are there; the state need not
be where the parameters are. Left out: disk (`optimizer_state_nvme.py`), and which group has which home (`tiers.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.engine.adam_kernel import AdamKernel, ParameterSlice
from rlhf.engine.dtensors import local_shard
from rlhf.engine.fsdp_units import ParameterGroup
from rlhf.engine.offload.grad_accumulation import GradAccumulator
from rlhf.engine.offload.weights import ShardedWeights
from rlhf.engine.offload.working_rows import DeviceWeights, write_back

PARTS = ("weight", "exp_avg", "exp_avg_sq")


class ParameterShard(NamedTuple):
    """What a home knows of a parameter: nothing that needs its memory."""

    name: str
    sizes: torch.Size  # of this rank's rows
    decays: bool

    @property
    def count(self) -> int:
        """Elements of this rank's rows."""
        return self.sizes.numel()


def shapes_of(group: ParameterGroup) -> list[ParameterShard]:
    """This rank's rows of each parameter; matrices decay, biases and norms do not."""
    return [
        ParameterShard(name, local_shard(parameter).shape, parameter.ndim >= 2) for name, parameter in group.items()
    ]


@dataclass(frozen=True)
class Update:
    """What a step does to all groups."""

    touched: Collection[str]  # names of the parameters that have a gradient on some rank
    lr: float
    scale: float  # factor on every gradient
    betas: Sequence[float] | None = None  # where a schedule cycles them


class OptimizerStateStore(Protocol):
    """State and gradient sums of some parameters."""

    shapes: Sequence[ParameterShard]
    steps: dict[str, Tensor]  # [] fp32 each: updates so far, for the bias correction
    in_memory: bool  # False where `read` brings rows from a disk
    has_masters: bool  # False where the weights that learn are the working weights
    rows: ShardedWeights
    kernel: AdamKernel
    failure: RuntimeError | None  # of a disk, until all ranks were told

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a micro-batch's gradient, flat rows, to the sum of the step that comes."""

    def squares(self) -> dict[str, Tensor]:
        """Squared 2-norm of each sum there is, [] fp64."""

    def clear(self) -> None:
        """Forget the sums of the step that comes."""

    def elements(self) -> int:
        """How many numbers of gradients are on the device."""

    def begin(self) -> None:
        """Fix the sums for `step`: what is added later belongs to another one."""

    def step(self, update: Update) -> None:
        """Update the state, and, unless updates are delayed, the working weights."""

    def write_back(self) -> None:
        """Bring the working weights up to date with the state."""

    def read(self, name: str, part: str) -> Tensor:
        """This rank's rows of one of `PARTS`: fp32, its own memory or the home's."""

    def write(self, name: str, part: str, *, rows: Tensor) -> None:
        """Set them; working weights do not follow."""

    def close(self) -> None:
        """Let go of files, threads and page-locked memory."""


@dataclass(frozen=True)
class States:
    """What a home keeps of each parameter."""

    device: torch.device
    moments: torch.dtype
    masters: bool  # False where the working weights are fp32 and at hand


class InMemoryStateStore:
    """A home in the memory of one device: that of the model, or the host."""

    in_memory = True
    failure = None

    def __init__(
        self,
        shapes: Sequence[ParameterShard],
        sums: GradAccumulator,
        *,
        kernel: AdamKernel,
        rows: ShardedWeights,
        states: States,
        delays: bool = False,
    ) -> None:
        """Start at zero moments.

        Args:
            shapes: the parameters.
            sums: of their gradients, on the device of the states.
            kernel: of that device.
            rows: their working weights.
            states: what to allocate.
            delays: leave publishing to the caller.
        """
        self.shapes, self._sums, self.kernel, self.rows = shapes, sums, kernel, rows
        self.has_masters = states.masters
        self._sizes = {shape.name: shape.sizes for shape in shapes}
        self._publishes = not delays
        self._taken: dict[str, Tensor] = {}
        zeros = {"device": states.device}
        self.steps = {shape.name: torch.zeros((), **zeros) for shape in shapes}
        self._parts = {
            part: {shape.name: torch.zeros(shape.count, dtype=states.moments, **zeros) for shape in shapes}
            for part in PARTS[1:]
        }
        if states.masters:
            self._parts["weight"] = {shape.name: torch.empty(shape.count, **zeros) for shape in shapes}

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a flat gradient."""
        self._sums.add(name, gradient)

    def squares(self) -> dict[str, Tensor]:
        """Squared norms of the sums."""
        return self._sums.squares()

    def clear(self) -> None:
        """Forget them."""
        self._sums.clear()

    def elements(self) -> int:
        """Those of the sums."""
        return self._sums.elements()

    def begin(self) -> None:
        """Take them."""
        self._taken = self._sums.take()

    def step(self, update: Update) -> None:
        """One update of what was taken, which is then freed."""
        taken, self._taken = self._taken, {}
        shapes = [shape for shape in self.shapes if shape.name in taken and shape.name in update.touched]
        if not shapes:
            return
        torch._foreach_add_([self.steps[shape.name] for shape in shapes], 1)
        pieces = [self._piece(shape, taken[shape.name]) for shape in shapes]
        for tile in self.kernel.update(pieces, lr=update.lr, scale=update.scale, betas=update.betas):
            if self._publishes and self.has_masters:
                write_back(self.rows, tile)

    def write_back(self) -> None:
        """Round the masters into the working weights."""
        for shape in self.shapes:
            self.rows.write(shape.name, 0, values=self._weight(shape.name))

    def read(self, name: str, part: str) -> Tensor:
        """The memory itself where it is fp32."""
        flat = self._weight(name) if part == "weight" else self._parts[part][name]
        return flat.float().view(self._sizes[name])

    def write(self, name: str, part: str, *, rows: Tensor) -> None:
        """Copy them here."""
        into = self._weight(name) if part == "weight" else self._parts[part][name]
        into.copy_(rows.reshape(-1))

    def close(self) -> None:
        """Let the sums go."""
        self._sums.close()

    def _piece(self, shape: ParameterShard, gradient: Tensor) -> ParameterSlice:
        name = shape.name
        weight, moments = self._weight(name), (self._parts["exp_avg"][name], self._parts["exp_avg_sq"][name])
        return ParameterSlice(name, 0, shape.decays, self.steps[name], weight, gradient, *moments)

    def _weight(self, name: str) -> Tensor:
        """The fp32 rows that learn: the master's, or the parameter's own."""
        if self.has_masters:
            return self._parts["weight"][name]
        assert isinstance(self.rows, DeviceWeights), "weights elsewhere need masters"
        return self.rows.flat(name)
