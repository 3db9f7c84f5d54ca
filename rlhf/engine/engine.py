"""The engine: all that a stage touches of a model that learns, generates or only judges.

Left out: what is computed (the stages), and how (the other modules of this room).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.engine import hybrid
from rlhf.engine.adamw import AdamW
from rlhf.engine.checkpoint.stored_state import Stored, states_of
from rlhf.engine.gradients import Gradients
from rlhf.engine.loss_scale import LossScale
from rlhf.engine.materialize import allocate, fill
from rlhf.engine.offload.weights import param_offload_device
from rlhf.engine.sharding import Sharding, shard
from rlhf.engine.updater import StepResult, Updater
from rlhf.engine.working_dtype import working_dtype
from rlhf.models.transforms import enable_activation_checkpointing
from rlhf.runtime.dist import World, sum_over_ranks
from rlhf.runtime.malloc import return_freed_memory, trim

if TYPE_CHECKING:
    from rlhf.models.model_spec import ModelSpec


class Engine:
    """A model with memory, spread over the ranks as its ZeRO stage says; `build_engine` makes one.

    A training step is `backward` for each micro-batch, the last of them with `last=True`, then `step`.
    """

    def __init__(
        self,
        module: nn.Module,
        sharding: Sharding,
        *,
        world: World,
        dtype: torch.dtype,
        updater: Updater | None,
        streams: bool = False,
    ) -> None:
        self.module = module
        self._streams = streams
        self.world = world
        self.dtype = dtype
        self._sharding = sharding
        self._learner = updater

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward; all ranks must call it equally often, except inside `generating`."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients to the step's, which are summed over micro-batches and ranks.

        Args:
            loss: scalar, divided by the global denominator of the whole step.
            last: True for the last micro-batch before `step`.
        """
        gradients = self._learning.gradients
        self._sharding.before_backward(last=last)
        gradients.before_backward(last=last)
        scale = self._learning.loss_scale.value
        (loss if scale == 1 else loss * scale).backward()
        gradients.after_backward(last=last)

    def step(self) -> StepResult:
        """Clip by the global norm, update, advance the schedule and clear the gradients, on all ranks alike.

        A gradient that is not finite anywhere skips the update everywhere, and the schedule stays where it is.

        Raises:
            RunError: `engine.max_skipped_steps` steps in a row were skipped.
        """
        return step_together(self)[0]

    def advance(self, steps: int) -> None:
        """Count steps that were never due, so that the schedule still ends with the stage."""
        self._learning.steps_taken += steps

    def generating(self) -> AbstractContextManager[nn.Module]:
        """Context for decoding: gathered once, eval mode, no gradients, no other rank needed."""
        self.flush()
        return hybrid.generating(self.module, self._sharding, streamed=self._streams)

    def all_done(self, done: bool) -> bool:
        """Whether decoding inside `generating` may end: when this rank is done, or, streamed, when all ranks are."""
        if not self._streams:
            return done
        waiting = torch.tensor(not done, device=self.world.device, dtype=torch.int64)
        return not sum_over_ranks(waiting).item()

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """Context for forwards that nothing is learnt from: eval mode, no gradients, all ranks together."""
        self.flush()
        return hybrid.evaluating(self.module, self._sharding)

    def full_tensors(self, *, masters: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole and on the CPU, one at a time; all ranks must iterate to the end.

        Args:
            masters: fp32 master weights for the parameters that learn, instead of the working weights.

        Yields:
            Name and tensor; a parameter with two names (tied embeddings) once, under its first. The tensor may share
            the model's memory.
        """
        self.flush()
        optimizer = self._learning.optimizer if masters else None
        return self._sharding.full_tensors(partial(optimizer.read_shard, part="weight") if optimizer else None)

    def flush(self) -> None:
        """Finish an update that is delayed: the working weights are then those of all steps taken."""
        if self._learner is not None:
            self._learner.optimizer.flush()

    def close(self) -> None:
        """Let go of files, threads and page-locked memory; the engine cannot be used any more."""
        if self._learner is not None:
            self._learner.optimizer.close()
        self._sharding.close()

    def stored(self) -> list[Stored]:
        """The tensors of a checkpoint, by name; `counters` are the rest of it."""
        self._sharding.release()
        return states_of(self._learning.optimizer)

    def counters(self) -> dict[str, Any]:
        """The rest of a checkpoint, as JSON."""
        return self._learning.counters() | {"updates": self._learning.optimizer.steps()}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Continue from `counters()`, and from the tensors that were set."""
        self._learning.optimizer.load_steps(counters["updates"])
        self._learning.load_counters(counters)

    @property
    def steps_taken(self) -> int:
        """Where the schedule is: steps so far without skipped ones, with those that `advance` counted."""
        return self._learning.steps_taken

    @property
    def loss_scale(self) -> LossScale:
        """The factor on this engine's loss, which engines that are trained together share."""
        return self._learning.loss_scale

    @property
    def _learning(self) -> Updater:
        assert self._learner is not None, "a frozen engine has no gradients and takes no steps"
        return self._learner


def step_together(*engines: Engine) -> list[StepResult]:
    """One step of engines that share a loss scale, or of one: a gradient that is not finite in any skips all.

    Raises:
        RunError: `engine.max_skipped_steps` steps in a row were skipped.
    """
    for engine in engines:
        engine._sharding.release()  # what is gathered is about to be out of date
    reports = [engine._learning.examine() for engine in engines]
    overflow = not all(math.isfinite(report.norm) for report in reports)
    results = [engine._learning.finish(report, skip=overflow) for engine, report in zip(engines, reports, strict=True)]
    engines[0].loss_scale.update(overflow=overflow)
    return results


def build_engine(
    spec: ModelSpec,
    *,
    config: EngineConfig,
    world: World,
    optimizer: OptimizerConfig | None = None,
    total_steps: int = 0,
    loss_scale: LossScale | None = None,
) -> Engine:
    """Give a spec memory on this rank's device, each rank reading only its share of the weights.

    Args:
        spec: the model on meta; it is used up.
        config: ZeRO stage, precision and what goes with them.
        world: this rank among the others; all must call.
        optimizer: how the trainable parameters learn; None for a frozen model.
        total_steps: optimizer steps of the whole stage, for the schedule.
        loss_scale: of another engine whose steps are taken together with this one's (see `step_together`).
    """
    frozen = optimizer is None
    module, dtype = spec.module, working_dtype(config.precision, world.device)
    if frozen:
        module.requires_grad_(False)
    elif config.activation_checkpointing:
        moves = config.activation_offload and world.device.type == "cuda"
        enable_activation_checkpointing(module, offload=moves)
    if param_offload_device(config, world.device) == OffloadDevice.nvme:
        return_freed_memory(tight=True)
    sharding = shard(spec, config=config, world=world, frozen=frozen)
    allocate(spec, sharding, config=config, dtype=dtype, world=world)
    module.train(not frozen)
    updater = adam = None
    if optimizer is not None:
        assert total_steps > 0, "the schedule needs to know its length"
        groups = sharding.groups()
        adam = AdamW(groups, None, config=optimizer, engine=config, rows=sharding.rows, world=world)
        gradients = Gradients(groups, sharding, world=world, optimizer=adam, replicas=sharding.replicas)
        updater = Updater(
            adam,
            gradients,
            config=optimizer,
            total_steps=total_steps,
            max_skipped_steps=config.max_skipped_steps,
            loss_scale=loss_scale or LossScale.of(config),
        )
    fill(spec, sharding, world=world, set_master=adam.set_master if adam else None)
    trim()
    streams = config.stream_generation and config.zero_stage == 3
    return Engine(module, sharding, world=world, dtype=dtype, updater=updater, streams=streams)
