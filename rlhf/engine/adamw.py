"""AdamW on the shards that a rank holds, with fp32 masters, wherever gradients and state are kept.

Each group of parameters has a state store; a step visits them in the order of the forward pass. See [Note: offload].

[Note: delayed updates] With `engine.delayed_update` a step runs in the background while the next batch computes (the
delayed update of ZeRO-Offload, Ren et al. 2021). The update of step t reaches the working weights when step t + 1 is
taken: that step's gradient was computed with weights that lack update t. Everything else is AdamW: each gradient with
its own learning rate and clipping, in order. The loss falls later by about a step, and the largest stable learning rate
is smaller; writing back more often than each step shortens the delay, so it changes the numbers. Evaluation and
generation write back first (`AdamW.flush`). A checkpoint must not, or it would change the run: it holds the working
weights as well.

See also: the stores (`offload/`), gradient norms (`gradients.py`), and the learning rate (`updater.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from rlhf.config.engine_config import EngineConfig
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.engine.dtensors import local_shard
from rlhf.engine.fsdp_units import ParameterGroup
from rlhf.engine.offload.optimizer_state import STATE_KEYS, OptimizerStateStore, Update
from rlhf.engine.offload.placement import Placement
from rlhf.engine.offload.sharded_weights import DeviceWeights, ShardedWeights
from rlhf.runtime.dist import World, sum_over_ranks
from rlhf.runtime.errors import RunError

WORKING = "working"
"""Extra entry of the state with `delayed_update`: the working weights, which are one update behind the masters."""


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

        Args:
            groups: the parameters that learn, in the order of the forward pass.
            config: betas, eps and weight decay; its learning rate and schedule are not used here.
            engine: where state is kept, and what goes with it.
            world: this rank among the others.
            offloaded: working weights that are not kept on the device; None where all are.

        Raises:
            ValueError: settings that exclude each other.
            RunError: the disk is too small.
        """
        self.groups = groups
        self._world = world
        self._offloaded = offloaded
        self._weights: ShardedWeights = DeviceWeights(groups) if offloaded is None else offloaded
        self.stores: list[OptimizerStateStore] = Placement(groups, config, engine, world, offloaded).stores()
        self._store_of = {shard.name: store for store in self.stores for shard in store.shards}
        self._parameters = {name: parameter for group in groups for name, parameter in group.items()}
        self._background = BackgroundJob() if engine.delayed_update else None
        self._is_behind = False  # the working weights lack the last update

    def store_of(self, name: str) -> OptimizerStateStore:
        """The store of a parameter's state and gradient sum."""
        return self._store_of[name]

    def set_master(self, name: str, shard: Tensor) -> None:
        """Set a parameter's master, where it has one beside the working weights, which stay as they are."""
        store = self._store_of[name]
        if store.has_masters:
            store.write(name, "weight", shard=shard)

    def step(
        self, touched: Collection[str], *, lr: float, scale: float = 1.0, betas: Sequence[float] | None = None
    ) -> None:
        """Update the parameters that have a gradient, from the sums in their stores; working weights follow masters.

        With delayed updates, write back what the last step computed, and compute this one in the background.

        Args:
            touched: names of the parameters that have a gradient on some rank.
            lr: learning rate.
            scale: factor on every gradient, applied on the way.
            betas: of this step, where a schedule cycles them; else those of the settings.

        Raises:
            RunError: a disk failed, on this or another rank; the weights are of no use any more.
        """
        self.flush()  # the last delayed update, if there is one, reaches the weights before the next begins
        update = Update(touched, lr, scale, betas)
        if self._background is not None:
            for store in self.stores:
                store.take_gradients()  # before backward adds the next step's
            self._background.start(partial(self._update, update))
            return
        for store in self.stores:  # one by one: gradients of later groups may still be on their way to the host
            store.take_gradients()
            store.step(update)
        self._flush_weights()
        self._raise_failures()

    def flush(self) -> None:
        """Finish a delayed update and write it back, so that the working weights are those of all steps so far."""
        self._finish()
        if self._is_behind:
            for store in self.stores:
                store.write_back()
            self._flush_weights()  # Order: copies to the device may be under way on a side stream
            self._is_behind = False

    def close(self) -> None:
        """Finish, and free files, threads and page-locked memory."""
        if self._background is not None:
            self._background.close()
        for store in self.stores:
            store.close()
        for weights in self._distinct_weights:  # Lifetime: their copies read page-locked memory
            if weights is not self._offloaded:  # which belongs to the model
                weights.close()

    def names(self) -> list[str]:
        """The parameters that learn, in the order of the forward pass."""
        return list(self._store_of)

    def entries(self) -> Iterator[tuple[str, str]]:
        """Parameter and key of every tensor of the state; `steps` completes it.

        With delayed updates the working weights are one of them: they do not follow from the masters.
        """
        keys = STATE_KEYS if self._background is None else (*STATE_KEYS, WORKING)
        return ((name, key) for name in self._store_of for key in keys)

    def in_memory(self, name: str) -> bool:
        """False where `read_shard` reads from a disk."""
        return self._store_of[name].in_memory

    def read_shard(self, name: str, key: str) -> Tensor:
        """This rank's shard of one entry: fp32, a copy or the memory itself; "weight" is the master."""
        self._finish()  # its thread would change the state while it is read
        if key != WORKING:
            return self._store_of[name].read(name, key)
        shape = local_shard(self._parameters[name]).shape
        return self._weights.read(name, 0, count=shape.numel()).view(shape)

    @torch.no_grad()
    def write_shard(self, name: str, shard: Tensor, *, key: str) -> None:
        """Set this rank's shard of one entry; working weights follow "weight", delayed ones with the next update."""
        self._finish()
        if key != WORKING:
            self._store_of[name].write(name, key, shard=shard)
        if key == "weight" and self._background is not None:
            self._is_behind = True
        elif key in ("weight", WORKING):
            self._weights.write(name, 0, values=shard.reshape(-1))
            self._weights.flush()

    def steps(self) -> dict[str, float]:
        """Updates so far of each parameter."""
        self._finish()
        return {name: store.steps[name].item() for name, store in self._store_of.items()}

    def load_steps(self, steps: Mapping[str, float]) -> None:
        """Set what `steps` returned."""
        self._finish()
        for name, store in self._store_of.items():
            store.steps[name].fill_(steps[name])

    def _update(self, update: Update) -> None:
        """Runs in the background thread: forward and backward read the working weights meanwhile, so none changes."""
        for store in self.stores:
            store.step(update)

    def _finish(self) -> None:
        """Wait for a delayed update, without writing it back."""
        if self._background is not None and self._background.finish():
            self._is_behind = True

    def _flush_weights(self) -> None:
        """Make the next forward see what was written back."""
        for weights in self._distinct_weights:
            weights.flush()

    @property
    def _distinct_weights(self) -> list[ShardedWeights]:
        """The working weights that stores write to; several stores share one."""
        return list(dict.fromkeys(store.weights for store in self.stores))

    def _raise_failures(self) -> None:
        """Raise on all ranks what failed on one."""
        if all(store.in_memory for store in self.stores):
            return
        failures = [store.failure for store in self.stores if store.failure is not None]
        # Collective: every rank gets here, because stores remember errors of the disk instead of raising them.
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


class BackgroundJob:
    """One job at a time in a thread; see [Note: delayed updates]."""

    def __init__(self) -> None:
        """Start idle."""
        self._thread = ThreadPoolExecutor(1, "delayed update")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run `job`; the last one must have been finished."""
        assert self._job is None, "a job is under way"
        self._job = self._thread.submit(job)

    def finish(self) -> bool:
        """Wait for the job, if there is one, and say whether there was; what it raised is raised here."""
        job, self._job = self._job, None
        if job is None:
            return False
        job.result()
        return True

    def close(self) -> None:
        """Finish, and end the thread."""
        self._thread.shutdown()
        self.finish()
