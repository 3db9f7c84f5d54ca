"""AdamW on the rows that a rank holds, with fp32 master weights, wherever gradients and state rest.

Each group of parameters has a home; a step visits them in the order of the forward pass. Left out: the stores
themselves (`tiers/stores.py`, `tiers/home_nvme.py`), gradient norms, and the learning rate's schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.config.engine_config import EngineConfig
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.engine.delayed_update import Background
from rlhf.engine.dtensors import local_shard
from rlhf.engine.fsdp_units import ParameterGroup
from rlhf.engine.offload.optimizer_state import PARTS, OptimizerStateStore, Update
from rlhf.engine.offload.placement import Placement
from rlhf.engine.offload.weights import ShardedWeights
from rlhf.engine.offload.working_rows import DeviceWeights
from rlhf.runtime.dist import World, sum_over_ranks
from rlhf.runtime.errors import RunError

WORKING = "working"
"""The part of a delayed update's state that is no home's: weights that do not know the last update."""
Masters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""fp32 rows by name, or one after the other."""


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), none of it on biases and norms."""

    def __init__(
        self,
        groups: list[ParameterGroup],
        masters: Masters | None,
        *,
        config: OptimizerConfig,
        engine: EngineConfig | None = None,
        rows: ShardedWeights | None = None,
        world: World | None = None,
    ) -> None:
        """Start at zero moments.

        Args:
            groups: the parameters that learn, in the order of the forward pass.
            masters: this rank's rows of their fp32 master weights, consumed one at a time. A parameter without one
                starts from its working weights. None where `set_master` will be called for every parameter.
            config: learning rate and schedule in it are not used here.
            engine: tiers and what goes with them; None keeps everything on the device.
            rows: of working weights that do not rest on the device; None where all do.
            world: this rank among the others; None for a process alone.

        Raises:
            ValueError: settings that exclude each other.
            RunError: the disk has no room.
        """
        self.groups = groups
        self._world = world or World.alone()
        engine = engine or EngineConfig(zero_stage=0)
        self._rows: ShardedWeights = DeviceWeights(groups) if rows is None else rows
        self.stores: list[OptimizerStateStore] = Placement(groups, config, engine, self._world, rows).stores()
        self._home_of = {shape.name: home for home in self.stores for shape in home.shapes}
        self._parameters = {name: parameter for group in groups for name, parameter in group.items()}
        self._background = Background() if engine.delayed_update else None
        self._is_behind = False  # the working weights do not know the last update yet
        self._fill(masters)

    def store_of(self, name: str) -> OptimizerStateStore:
        """Where the state and gradient of a parameter rest."""
        return self._home_of[name]

    def set_master(self, name: str, rows: Tensor) -> None:
        """Set a parameter's fp32 weights, where it has some beside the working weights, which stay as they are."""
        home = self._home_of[name]
        if home.has_masters:
            home.write(name, "weight", rows=rows)

    def step(
        self, touched: Collection[str], *, lr: float, scale: float = 1.0, betas: Sequence[float] | None = None
    ) -> None:
        """Update the parameters that have a gradient, from the sums in their stores; working weights follow masters.

        With delayed updates, what the last step computed is published, and this one is computed in the background.

        Args:
            touched: names of the parameters that have a gradient on some rank.
            lr: learning rate.
            scale: factor on every gradient, applied on the way.
            betas: of this step, where a schedule cycles them; else those of the settings.

        Raises:
            RunError: a disk failed, on this or another rank; the weights are of no use any more.
        """
        self.flush()
        update = Update(touched, lr, scale, betas)
        if self._background is None:
            for home in self.stores:
                home.begin()
                home.step(update)
            self._publish(())
            self._agree()
            return
        for home in self.stores:
            home.begin()
        self._background.start(partial(self._update, update))

    def flush(self) -> None:
        """Finish and publish a delayed update, so that the working weights are those of all steps so far."""
        self._finish()
        if self._is_behind:
            self._publish(self.stores)
            self._is_behind = False

    def close(self) -> None:
        """Finish, and let go of files, threads and page-locked memory."""
        if self._background is not None:
            self._background.close()
        for home in self.stores:
            home.close()

    def names(self) -> list[str]:
        """The parameters that learn, in the order of the forward pass."""
        return list(self._home_of)

    def entries(self) -> Iterator[tuple[str, str]]:
        """Parameter and part of every tensor of the state; `steps` are the rest of it.

        Delayed, the working weights are one of the parts: they cannot be told from the masters.
        """
        parts = PARTS if self._background is None else (*PARTS, WORKING)
        return ((name, part) for name in self._home_of for part in parts)

    def in_memory(self, name: str) -> bool:
        """False where `read_shard` reads from a disk."""
        return self._home_of[name].in_memory

    def read_shard(self, name: str, part: str) -> Tensor:
        """This rank's rows of one part: fp32, a copy or the memory itself; "weight" is the fp32 master."""
        self._finish()
        if part != WORKING:
            return self._home_of[name].read(name, part)
        rows = local_shard(self._parameters[name])
        return self._rows.read(name, 0, count=rows.numel()).view(rows.shape)

    @torch.no_grad()
    def write_shard(self, name: str, rows: Tensor, *, part: str) -> None:
        """Set this rank's rows of one part; working weights follow "weight", delayed ones with the next update."""
        self._finish()
        if part != WORKING:
            self._home_of[name].write(name, part, rows=rows)
        if part == "weight" and self._background is not None:
            self._is_behind = True
        elif part in ("weight", WORKING):
            self._rows.write(name, 0, values=rows.reshape(-1))
            self._rows.flush()

    def steps(self) -> dict[str, float]:
        """Updates so far of each parameter."""
        self._finish()
        return {name: home.steps[name].item() for name, home in self._home_of.items()}

    def load_steps(self, steps: Mapping[str, float]) -> None:
        """Set what `steps` returned."""
        self._finish()
        for name, home in self._home_of.items():
            home.steps[name].fill_(steps[name])

    def _finish(self) -> None:
        """Wait for a delayed update, without publishing it."""
        if self._background is not None and self._background.finish():
            self._is_behind = True

    def _fill(self, masters: Masters | None) -> None:
        if masters is None:
            return
        missing = {name for name, home in self._home_of.items() if home.has_masters}
        for name, rows in masters.items() if isinstance(masters, Mapping) else masters:
            self.set_master(name, rows)
            missing.discard(name)
        for name in missing:
            self.set_master(name, self._rows.read(name, 0, count=local_shard(self._parameters[name]).numel()))

    def _update(self, update: Update) -> None:
        for home in self.stores:
            home.step(update)

    def _publish(self, stores: Collection[OptimizerStateStore]) -> None:
        for home in stores:
            home.write_back()
        for rows in {id(home.rows): home.rows for home in self.stores}.values():
            rows.flush()

    def _agree(self) -> None:
        """Raise on all ranks what failed on one."""
        if all(home.in_memory for home in self.stores):
            return
        failures = [home.failure for home in self.stores if home.failure is not None]
        failed = sum_over_ranks(torch.tensor(float(bool(failures)), device=self._world.device))
        raise_failure(failures[0] if failures else None, ranks=int(failed.item()))


def raise_failure(failure: RuntimeError | None, *, ranks: int) -> None:
    """Raise this rank's failure, or, where only others failed, that they did.

    Args:
        failure: this rank's.
        ranks: how many failed.
    """
    if failure is not None:
        raise failure
    if ranks:
        raise RunError(f"{ranks} other rank(s) could not use the disk (engine.nvme_path): see their messages.")
