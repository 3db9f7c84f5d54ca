"""The engine: everything a stage does with a model, whether it is trained, generates or only evaluates.

See also: ZeRO (`sharding.py`), optimizer steps (`updater.py`), and where offloaded tensors are kept (`offload/`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine import hybrid
from rlhf.engine.adamw import AdamW
from rlhf.engine.checkpoint.checkpoint_state import CheckpointTensor, optimizer_tensors, working_tensors
from rlhf.engine.ema import WeightAverage
from rlhf.engine.frozen_layers import FrozenLayers
from rlhf.engine.fsdp_units import full_tensor, local_rows, sharded_like
from rlhf.engine.gradients import GradientNorm, Gradients
from rlhf.engine.loss_scale import LossScale
from rlhf.engine.materialize import allocate, fill, working_dtype
from rlhf.engine.offload.placement import offload_device
from rlhf.engine.sharding import Sharding, shard
from rlhf.engine.updater import AdamGroups, StepResult, Updater
from rlhf.generation.decode_graphs import DecodeGraphs
from rlhf.models.attention import remove_padding
from rlhf.models.model_spec import ModelSpec, enable_activation_checkpointing
from rlhf.runtime.dist import World, sum_over_ranks
from rlhf.runtime.process import return_freed_memory, trim


class Engine:
    """A model spread over the ranks as its ZeRO stage says; `build_engine` makes one.

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
        frozen_layers: FrozenLayers,
        streams: bool = False,
    ) -> None:
        self.module = module
        self.padding_free = False
        """Whether forwards without a cache compute real tokens alone (`rlhf/models/padding_free.py`)."""
        self.frozen_layers = frozen_layers
        self._streams = streams
        self.world = world
        self.dtype = dtype
        self.decode_graphs: DecodeGraphs | None = None
        """Captured steps of decoding, kept while `generating`; None where none are wanted, or there is no CUDA."""
        self.is_whole = False
        """Whether the module's parameters are whole for now (`in_memory.whole_parameters`)."""
        self._sharding = sharding
        self._updater = updater

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward; all ranks must call it equally often, except inside `generating`."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients to the step's, which are summed over micro-batches and ranks.

        Args:
            loss: scalar, divided by the global denominator of the whole step.
            last: True for the last micro-batch before `step`.
        """
        gradients = self._training.gradients
        self._sharding.before_backward(last=last)
        gradients.before_backward(last=last)
        scale = self._training.loss_scale.value
        # Gradients leave their parameters in hooks while this runs; at ZeRO 2 and 3 each unit is a collective.
        torch.autograd.backward(loss if scale == 1 else loss * scale)
        gradients.after_backward(last=last)

    def step(self) -> StepResult:
        """Clip by the global norm, update, advance the schedule and clear the gradients, on all ranks alike.

        A gradient that is not finite on any rank skips the update on all of them and does not advance the schedule.

        Raises:
            RunError: `engine.max_skipped_steps` steps in a row were skipped.
        """
        return step_together(self)[0]

    def reduce_norm(self) -> GradientNorm:
        """First half of a step whose settings a caller decides: the norm, on all ranks alike; `update` follows."""
        self._sharding.release()  # gathered weights are out of date after the step
        found = self._training.reduce_norm()  # a collective
        same = None if self.loss_scale.is_used else self._training.gradients.torch_norm()
        return found if same is None else found._replace(norm=same)

    def update(self, gradients: GradientNorm, *, groups: AdamGroups, clip: float) -> StepResult:
        """Second half: multiply by `clip`, update every parameter as its group says, and clear the gradients.

        Raises:
            RunError: `engine.max_skipped_steps` steps in a row were skipped.
        """
        overflow = not math.isfinite(gradients.norm)
        result = self._training.finish(gradients, skip=overflow, groups=groups, clip=clip)
        self.loss_scale.update(overflow=overflow)
        return result

    def drop_gradients(self) -> None:
        """Forget the gradients since the last step."""
        self._training.gradients.clear()

    def advance(self, steps: int) -> None:
        """Advance the schedule by steps that will not be taken, so that it still ends with the stage."""
        self._training.steps_taken += steps

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        """Context for decoding: gathered once, in eval mode, without gradients; no forward needs another rank."""
        with hybrid.generating(self.module, self._sharding, streamed=self._streams) as module:
            try:
                yield module
            finally:
                if self.decode_graphs is not None:
                    self.decode_graphs.clear()  # training gets the memory of the cache

    def all_done(self, done: bool) -> bool:
        """Whether decoding inside `generating` may end: when this rank is done, or, streamed, when all ranks are."""
        if not self._streams:
            return done
        # Streamed, every forward gathers: a rank that stopped early would leave the others waiting in a collective.
        waiting = torch.tensor(not done, device=self.world.device, dtype=torch.int64)
        return not sum_over_ranks(waiting).item()  # a wait for the device in every decoding step

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """Context for forwards without training: eval mode, no gradients, all ranks together."""
        return hybrid.evaluating(self.module, self._sharding)

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self._updater is not None and self._updater.average is not None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the moving average for its weights; it must not be trained there."""
        average = self._training.average
        assert average is not None, "no average is kept: optimizer.ema_decay is 0"
        self._sharding.release()  # before and after: gathered weights would be out of date
        with average.exchanged():
            yield
            self._sharding.release()

    @torch.no_grad()
    def follow(self, other: Engine, *, share: float) -> None:
        """Move the weights of this frozen engine towards those of `other`, which is trained, by `share` of the way.

        One parameter after the other, in fp32, from the masters, and rounded once to this engine's type. Both may be
        sharded and kept as they like; where both shard a parameter alike, or neither does, no rank needs another. All
        ranks must call it.
        """
        self._sharding.release()  # parameters are looked up below, and gathered weights would be out of date
        other._sharding.release()
        theirs = dict(other.module.named_parameters())
        for name, parameter in self.module.named_parameters():
            master = other._training.optimizer.read_shard(name, "weight")  # [rows of this rank in `other`, ...]
            is_shard, wants_shard = isinstance(theirs[name], DTensor), isinstance(parameter, DTensor)
            # `shard_ranks` may differ. Not asked by rows: those of one rank may be the same, those of another not.
            is_other_shard = is_shard and wants_shard and _mesh(theirs[name]) != _mesh(parameter)
            if (is_shard and not wants_shard) or is_other_shard:
                # Collective: every rank comes here or none, because a parameter is sharded on all ranks or on none.
                master = full_tensor(sharded_like(theirs[name], master.to(theirs[name].device)))
            if wants_shard and (is_other_shard or not is_shard):
                rows = local_rows(parameter)
                master = master[rows.start : rows.stop]
            own = self._sharding.read_shard(name)
            self._sharding.write_shard(name, torch.lerp(own.float(), master.to(own.device), share))
        self._sharding.flush()

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter whole and on the CPU, one at a time; all ranks must iterate to the end.

        Yields:
            Name and tensor; a parameter with two names (tied embeddings) once, under its first. The tensor may share
            the model's memory.
        """
        return self._sharding.full_tensors()

    @property
    def is_trained(self) -> bool:
        """Whether it has gradients and an optimizer."""
        return self._updater is not None

    @property
    def sharding(self) -> Sharding:
        """How the module is spread over the ranks."""
        return self._sharding

    def read_weight(self, name: str) -> Tensor:
        """This rank's shard of a parameter: the fp32 master of one that learns, else the working weights."""
        if self._updater is not None and name in self._updater.optimizer:
            return self._updater.optimizer.read_shard(name, "weight")
        return self._sharding.read_shard(name)

    @torch.no_grad()
    def write_weight(self, name: str, shard: Tensor) -> None:
        """Set it: masters, and the working weights that follow them."""
        if self._updater is not None and name in self._updater.optimizer:
            self._updater.optimizer.write_shard(name, shard.float(), key="weight")
        else:
            self._sharding.write_shard(name, shard)

    def close(self) -> None:
        """Release files, threads and page-locked memory; the engine cannot be used any more."""
        if self._updater is not None:
            self._updater.optimizer.close()
        self._sharding.close()

    def checkpoint_tensors(self) -> list[CheckpointTensor]:
        """The tensors of a checkpoint, by name; `counters` is its other part."""
        self._sharding.release()  # names shards: gathered parameters would count as whole ones
        if self._updater is None:
            return working_tensors(self._sharding)
        return optimizer_tensors(self._training.optimizer, average=self._training.average)

    def counters(self) -> dict[str, Any]:
        """All state of a checkpoint that is not a tensor, as JSON."""
        return self._training.counters() | {"updates": self._training.optimizer.steps()}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Continue from `counters()`, and from the tensors that were set."""
        self._training.optimizer.load_steps(counters["updates"])
        self._training.load_counters(counters)

    @property
    def steps_taken(self) -> int:
        """Position in the schedule: steps so far, without skipped ones, with those that `advance` added."""
        return self._training.steps_taken

    @property
    def loss_scale(self) -> LossScale:
        """The factor on this engine's loss, shared by engines that are trained together."""
        return self._training.loss_scale

    @property
    def _training(self) -> Updater:
        assert self._updater is not None, "a frozen engine has no gradients and takes no steps"
        return self._updater


def step_together(*engines: Engine) -> list[StepResult]:
    """One step of engines that share a loss scale, or of one engine: a non-finite gradient in any skips all.

    Raises:
        RunError: `engine.max_skipped_steps` steps in a row were skipped.
    """
    for engine in engines:
        engine._sharding.release()  # gathered weights are out of date after the step
    # A collective for each engine, so every rank decides alike whether to skip.
    gradients = [engine._training.reduce_norm() for engine in engines]
    overflow = not all(math.isfinite(found.norm) for found in gradients)
    results = [engine._training.finish(found, skip=overflow) for engine, found in zip(engines, gradients, strict=True)]
    engines[0].loss_scale.update(overflow=overflow)  # once: they share it
    return results


def _mesh(parameter: Tensor) -> DeviceMesh:
    """The ranks over which a parameter is sharded."""
    assert isinstance(parameter, DTensor)
    return parameter.device_mesh


def build_engine(
    spec: ModelSpec,
    *,
    config: EngineConfig,
    world: World,
    optimizer: OptimizerConfig | None = None,
    total_steps: int = 0,
    loss_scale: LossScale | None = None,
) -> Engine:
    """Load a model and spread it over the ranks, each of which reads only its shard of the weights.

    Args:
        spec: the model on meta; it cannot be used again.
        config: ZeRO stage, precision, offloading.
        world: this rank among the others; all must call.
        optimizer: settings for the trainable parameters; None for a frozen model.
        total_steps: optimizer steps of the whole stage, for the schedule.
        loss_scale: the one of another engine, for steps that are taken together (see `step_together`).
    """
    frozen = optimizer is None
    module, dtype = spec.module, working_dtype(config.precision, world.device)
    if frozen:
        module.requires_grad_(False)
    elif config.activation_checkpointing:
        # On a CPU machine the inputs of recomputed blocks are in host memory already.
        offload = config.activation_offload and world.device.type == "cuda"
        enable_activation_checkpointing(module, offload=offload)
    if offload_device(config.offload_param, world.device) == OffloadDevice.nvme:
        return_freed_memory(tight=True)  # weights on disk are there to save memory
    sharding = shard(spec, config=config, world=world, frozen=frozen)
    allocate(spec, sharding, config=config, dtype=dtype, world=world)
    module.train(not frozen)
    updater = adam = None
    if optimizer is not None:
        assert total_steps > 0, "the schedule needs to know its length"
        # After `allocate`, which has replaced the parameters: hooks and stores need the final ones.
        groups = sharding.groups()
        adam = AdamW(groups, config=optimizer, engine=config, world=world, offloaded=sharding.offloaded)
        gradients = Gradients(groups, sharding, world=world, optimizer=adam)
        updater = Updater(
            adam,
            gradients,
            config=optimizer,
            total_steps=total_steps,
            max_skipped_steps=config.max_skipped_steps,
            loss_scale=loss_scale or LossScale(config),
        )
    fill(spec, sharding, world=world, set_master=adam.set_master if adam else None)
    if updater is not None and optimizer is not None and optimizer.ema_decay:
        updater.average = WeightAverage(updater.optimizer, decay=optimizer.ema_decay)  # starts at the weights
    trim()  # what was read to fill the model
    streams = config.stream_generation and config.zero_stage == 3
    layers = FrozenLayers(spec.frozen_blocks, sharding)
    engine = Engine(module, sharding, world=world, dtype=dtype, updater=updater, frozen_layers=layers, streams=streams)
    engine.padding_free = remove_padding(module, config.padding_free, on_cuda=world.device.type == "cuda")
    if config.cuda_graphs and world.device.type == "cuda":
        why = "every forward gathers the weights of its blocks (engine.stream_generation=true)" if streams else ""
        engine.decode_graphs = DecodeGraphs(refusal=why)
    return engine
