"""AdamW on the shards that a rank holds, with fp32 masters, wherever gradients and state are kept.

Each group of parameters has a state store; a step visits them in the order of the forward pass. See [Note: offload].
See also: the stores (`offload/`), gradient norms (`gradients.py`), and the learning rate (`updater.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adam_kernel import AdamGroup
from rlhf.engine.fsdp_units import ParameterGroup
from rlhf.engine.offload.optimizer_state import OptimizerStateStore, Update
from rlhf.engine.offload.placement import Placement
from rlhf.engine.offload.working_weights import ShardedWeights
from rlhf.engine.state_format import STATE_KEYS
from rlhf.runtime.dist import World, sum_over_ranks
from rlhf.runtime.errors import RunError


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), none of it on biases and norms."""

    def __init__(
        self,
        groups: list[ParameterGroup],
        *,
        config: OptimizerConfig,
        engine: EngineConfig,
        world: World,
        offloaded: ShardedWeights | None = None,
    ) -> None:
        """Start at zero moments; masters are undefined until `set_master` was called for every parameter.

        `groups` are in the order of the forward pass; `offloaded` are working weights that are not kept on the device.

        Raises:
            ValueError: the buffers are too small.
            RunError: the disk is too small.
        """
        self.groups = groups
        self._world = world
        self._offloaded = offloaded
        self.stores: list[OptimizerStateStore] = Placement(groups, config, engine, world, offloaded).stores()
        self._store_of = {name: store for store in self.stores for name in store.shards}

    def __contains__(self, name: object) -> bool:
        return name in self._store_of

    def store_of(self, name: str) -> OptimizerStateStore:
        """The store of a parameter's state and gradient sum."""
        return self._store_of[name]

    def set_master(self, name: str, shard: Tensor) -> None:
        """Set a parameter's master, where it has one beside the working weights, which are its rounded copy already."""
        store = self._store_of[name]
        if store.has_masters:
            store.write(name, "weight", shard=shard)
        if store.format.is_split:  # then the working weights have been written
            store.weights.flush()

    def step(
        self,
        touched: Collection[str],
        *,
        lr: float = 0.0,
        scale: float = 1.0,
        betas: Sequence[float] | None = None,
        groups: Mapping[str, AdamGroup] | None = None,
    ) -> None:
        """Update the parameters that have a gradient, from the sums in their stores; working weights follow masters.

        Args:
            touched: names of the parameters that have a gradient on some rank.
            lr: learning rate.
            scale: factor on every gradient, applied on the way.
            betas: of this step, where a schedule cycles them; else those of the settings.
            groups: settings of each parameter, instead of `lr`, `betas` and the configuration.

        Raises:
            RunError: a disk failed, on this or another rank; the weights are of no use any more.
        """
        update = Update(touched, lr, scale, betas, groups)
        for store in self.stores:  # one by one: gradients of later groups may still be on their way to the host
            store.step(update)
        for weights in self._distinct_weights:
            weights.flush()  # Order: copies to the device may be under way on a side stream; the next forward follows
        if any(not store.in_memory for store in self.stores):
            # Collective: every rank gets here, because stores remember errors of the disk instead of raising them.
            failed = sum_over_ranks(torch.tensor(float(self.failure is not None), device=self._world.device))
            self.raise_failure(ranks=int(failed.item()))

    @property
    def failure(self) -> RuntimeError | None:
        """An error of this rank's disk that was not raised yet."""
        return next((store.failure for store in self.stores if store.failure is not None), None)

    def raise_failure(self, *, ranks: int) -> None:
        """Raise this rank's failure, or, where only others failed, that `ranks` of them did."""
        if self.failure is not None:
            raise self.failure
        if ranks:
            raise RunError(f"{ranks} other rank(s) could not use the disk (engine.nvme_path): see their messages.")

    def close(self) -> None:
        """Free files, threads and page-locked memory."""
        for store in self.stores:
            store.close()
        for weights in self._distinct_weights:  # Lifetime: their copies read page-locked memory
            if weights is not self._offloaded:  # which belongs to the model
                weights.close()

    def entries(self) -> Iterator[tuple[str, str]]:
        """Parameter and key of every tensor of the state; `steps` completes it."""
        return ((name, key) for name in self._store_of for key in STATE_KEYS)

    def read_shard(self, name: str, key: str) -> Tensor:
        """This rank's shard of one entry: fp32, a copy or the memory itself; "weight" is the master."""
        return self._store_of[name].read(name, key)

    @torch.no_grad()
    def write_shard(self, name: str, shard: Tensor, *, key: str) -> None:
        """Set this rank's shard of one entry; working weights follow "weight"."""
        store = self._store_of[name]
        store.write(name, key, shard=shard)
        if key == "weight":
            if not store.format.is_split:
                store.weights.write(name, 0, values=shard.reshape(-1))
            store.weights.flush()

    def steps(self) -> dict[str, float]:
        """Updates so far of each parameter."""
        return {name: store.steps[name].item() for name, store in self._store_of.items()}

    def load_steps(self, steps: Mapping[str, float]) -> None:
        """Set what `steps` returned."""
        for name, store in self._store_of.items():
            store.steps[name].fill_(steps[name])

    @property
    def _distinct_weights(self) -> list[ShardedWeights]:
        """The working weights that stores write to; several stores share one."""
        return list(dict.fromkeys(store.weights for store in self.stores))
