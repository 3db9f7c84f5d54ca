"""The memory plan of a stage: bytes by phase, role and part, on device, host and disk, of one rank.

`PHASES` (in `workloads.py`) names the phases of a stage and what its models compute in them; `save` follows in every
stage. `states.py` and `trace.py` predict the bytes of each model. Models take turns, so a phase takes what its busiest
model takes at its highest moment, beside all others at rest. A model that an earlier stage will make has the shape of
the model that it is made from. Lengths are those that the configuration allows: shorter data takes less.
Left out: showing a plan, and refusing a run (`plan_text.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rlhf.algorithms.logprobs import chunk_elements_of
from rlhf.config.engine_config import OffloadDevice, Precision
from rlhf.config.roles import Role, maker_of, roles_of
from rlhf.config.run_config import CheckpointConfig, Embedded, RunConfig
from rlhf.engine.materialize import working_dtype
from rlhf.engine.sharding import copies_of
from rlhf.memory_plan.plan import Item, Phase, Place, Plan
from rlhf.memory_plan.states import GATHERED, GRADIENTS, GRAPHS, States
from rlhf.memory_plan.trace import ACTIVATIONS, CACHE, LOGITS, Computation, Mode, ModelShape, TracedMemory, trace
from rlhf.memory_plan.workloads import PHASES, REFERENCE, ROLLOUTS, Workload
from rlhf.runtime.launch import local_ranks

EXPORT, CHECKPOINTS = SAVED = ("export", "checkpoints")
"""Parts in the output folder; everything else on disk is below `engine.nvme_path`."""
WRITTEN, ALLOCATOR = "tensor being written", "allocator"
_COMES_AND_GOES = (ACTIVATIONS, LOGITS, CACHE, GRADIENTS)
_CPU_SLACK, _CUDA_SLACK = 0.25, 0.1


@dataclass(frozen=True)
class Machine:
    """Where the run is to be."""

    device: torch.device
    """Only its type counts: a plan can be for a machine that is elsewhere."""
    ranks: int
    """Ranks of the whole run."""
    local_ranks: int
    """Ranks on this machine."""
    runtime: tuple[Item, ...] = ()
    """What a process takes before it has a model."""


def machine_of(run: RunConfig, *, ranks: int) -> Machine:
    """The machine that the run will use: this one, or with `engine.device=cuda` one that has a GPU."""
    wanted = run.engine.device
    is_cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return Machine(torch.device("cuda" if is_cuda else "cpu"), ranks, local_ranks(ranks))


def plan_stage(run: RunConfig, stage: str, *, machine: Machine) -> Plan:
    """The memory of a stage, of its first rank, which holds the most.

    Raises:
        ValueError: a model that is not there, and that no stage of the run makes.
    """
    config, chunk = run.training_config(stage), chunk_elements_of(machine.device)
    everyone = [ModelMemory.of(run, role, machine=machine) for role in roles_of(run, stage)]
    models = [model for model in everyone if not model.role.before_training]
    early = [model for model in everyone if model.role.before_training]
    copies = [item for model in models for item in model.checkpoint_copy(run.checkpoint)]
    found: dict[str, list[Item]] = {}
    moving: dict[str, int] = {}  # by role: bytes that come and go in its turns
    for phase, computed in PHASES[stage].items():
        there = early if phase == REFERENCE else models
        if not there:
            continue
        if phase == "generate" and run.ppo is not None and run.ppo.generation_backend:  # whose memory nobody knows
            found[phase] = [item for model in there for item in model.at_rest()]
            continue
        works = {
            role: Workload.largest(compute, config, ranks=machine.ranks, chunk_elements=chunk)
            for role, compute in computed.items()
        }
        turns = [(model, turn) for model in there for turn in _turns(model, there, phase=phase, works=works)]
        found[phase] = max((items for _, items in turns), key=_device_bytes)
        for model, items in turns:
            moving[model.role.name] = max(moving.get(model.role.name, 0), _passing(items))
    found["train"] += copies
    found["save"] = [item for model in models for item in model.at_rest()] + copies
    found["save"] += [item for model in models for item in model.saved(run.checkpoint, local_ranks=machine.local_ranks)]
    written = [model.states for model in models if model.role.is_trained and not model.role.follows]
    largest = max(written, key=States.in_export)  # one model after the other, tensor by tensor
    found["save"].append(largest.item(WRITTEN, Place.host, count=largest.in_export()))
    if stage == "ppo" and run.ppo is not None and run.ppo.reuse_frozen_layers:
        learners = [model.states for model in models if model.role.is_trained and model.shape.whole.frozen_blocks]
        for phase, count in ROLLOUTS.items():
            tokens = run.ppo.tokens_held(count, ranks=machine.ranks, trains=phase == "train")
            found[phase] += [states.hidden_states(tokens) for states in learners]
    is_cuda = machine.device.type == "cuda"
    return Plan(run.title(stage), machine.local_ranks, is_cuda, tuple(_phases(found, moving, machine=machine)))


def _turns(
    busy: ModelMemory, models: list[ModelMemory], *, phase: str, works: dict[str, list[Workload]]
) -> Iterator[list[Item]]:
    """The items of a phase, whenever `busy` is the model that computes, beside all others at rest."""
    for work in works.get(busy.role.name, []):
        moment = busy.during(phase, work)
        yield [item for model in models for item in (moment if model is busy else model.at_rest())]


def _phases(found: dict[str, list[Item]], moving: dict[str, int], *, machine: Machine) -> Iterator[Phase]:
    """The phases with what the process takes, and what the allocator loses between tensors that come and go.

    On a CPU each model leaves holes in the heap that tensors of others, and of other phases, do not fit: a quarter of
    what moves in its largest turn, as measured with glibc 2.36 (benchmarks/results/plan.md). On CUDA it is a tenth of
    what moves in a phase, which nobody has measured here. Whatever is on the device of a CPU machine is in the host's
    memory.

    Args:
        found: The items of each phase.
        moving: By role, the bytes that come and go in its largest turn.
        machine: Where the run is to be.
    """
    is_cuda = machine.device.type == "cuda"
    holes = int(_CPU_SLACK * sum(moving.values()))
    for name, own in found.items():
        lost = int(_CUDA_SLACK * _passing(own)) if is_cuda else holes
        items = [*machine.runtime, *own, Item("process", ALLOCATOR, Place.device, lost)]
        if not is_cuda:
            items = [replace(item, place=Place.host) if item.place is Place.device else item for item in items]
        yield Phase(name, tuple(items))


def _passing(items: list[Item]) -> int:
    return _device_bytes([item for item in items if item.part in _COMES_AND_GOES])


def shape_of(run: RunConfig, role: Role) -> ModelShape:
    """The shape of the model of a role, which an earlier stage may have yet to make.

    Raises:
        ValueError: there is no such model, and the stage that would make it is not selected.
    """
    path, num_layers = role.path, role.num_layers
    while not (Path(path) / "config.json").exists() and (maker := maker_of(run, path)) is not None:
        if maker not in run.stages:
            raise ValueError(f"{path}: there is no such model yet, and stage={maker}, which makes it, is not planned.")
        start = next(made for made in roles_of(run, maker) if made.name == Path(path).name)
        path, num_layers = start.path, num_layers or start.num_layers
    source: str | Embedded = path
    if run.model.embedded is not None and path == run.model.path and not Path(path).exists():
        source = run.model.embedded
    lora = role.lora_config(run)
    adapters = lora if lora is not None and lora.rank else None
    attention = role.engine_config(run).attention
    if attention is not None and attention.is_flash:
        attention = None  # it saves the same tensors as SDPA's kernels, and needs a device
    return ModelShape(source, role.kind, num_layers, dropout=role.dropout, lora=adapters, attention=attention)


@dataclass(frozen=True)
class ModelMemory:
    """The bytes of one model at rest and at the highest moment of each computation."""

    role: Role
    shape: ModelShape
    states: States
    """The bytes that do not depend on what it computes."""

    @classmethod
    def of(cls, run: RunConfig, role: Role, *, machine: Machine) -> ModelMemory:
        """The memory of the model in a role."""
        config, engine, device = run.training_config(role.stage), role.engine_config(run), machine.device
        precision = engine.precision
        if device.type == "cuda" and precision is Precision.auto and not torch.cuda.is_available():
            precision = Precision.bf16  # a GPU that is not here is taken to multiply it
        shape = shape_of(run, role)
        optimizer = role.optimizer_config(run)
        states = States(
            role=role.name,
            spec=shape.whole,
            engine=engine,
            ranks=min(engine.shard_ranks, machine.ranks) or machine.ranks,
            copies=copies_of(engine, ranks=machine.ranks),
            device=device,
            dtype=working_dtype(precision, device),
            micro_batches=config.micro_batches(role.optimizer, ranks=machine.ranks) if role.is_trained else 0,
            has_average=optimizer is not None and optimizer.ema_decay > 0,
        )
        return cls(role, shape, states)

    def during(self, phase: str, work: Workload) -> list[Item]:
        """At the highest moment of a phase in which it runs `work`."""
        if phase == "train" and self.role.is_trained:
            return self.training(work)
        return self.generation(work) if phase == "generate" else self.forward(work)

    def at_rest(self) -> list[Item]:
        """Between steps, while others compute."""
        return [*self._at_rest, *(item for item in self.states.gradients(0.0) if item.place is Place.host)]

    def training(self, work: Computation) -> list[Item]:
        """At the highest moment of a step: forward, backward or update."""
        parts = self._trace(work, training=True, recomputes=self.states.engine.activation_checkpointing)
        moments = [self._in_training(part) for part in parts if part.point.call >= 0]
        return [*self._at_rest, *max([*moments, self.states.gradients()], key=_device_bytes)]

    def forward(self, work: Computation) -> list[Item]:
        """At the highest moment of a forward without gradients."""
        highest = max(self._trace(work), key=lambda part: part.total)
        gathered = self.states.item(GATHERED, Place.device, count=self.states.gathered())
        return [*self.at_rest(), gathered, *self._traced(highest)]

    def generation(self, work: Workload) -> list[Item]:
        """At the highest moment of answering a batch of prompts."""
        states = self.states
        streams = states.engine.stream_generation and states.engine.zero_stage == 3
        captures = states.engine.cuda_graphs and states.device.type == "cuda" and not streams
        parts = self._trace(replace(work, captures=captures), decoding_rows=work.rows)
        part, cache = _with_cache(parts)
        held = states.item(GATHERED, Place.device, count=states.gathered() if streams else states.whole())
        # When rows leave, one layer's keys are copied before the others' are.
        leaving = states.item(CACHE, Place.device, count=cache + cache // (2 * sum(self.shape.runs)))
        others = [item for item in self._traced(part) if item.part != CACHE]
        # Graphs share a pool, which holds what a step allocates and which nothing else uses.
        step = max((part.total - part.bytes.get(CACHE, 0) for part in parts if part.point.call == 1), default=0)
        graphs = states.item(GRAPHS, Place.device, count=step if captures else 0)
        return [*self.at_rest(), held, leaving, graphs, *others]

    def checkpoint_copy(self, config: CheckpointConfig) -> list[Item]:
        """The copy that a checkpoint writes while training goes on."""
        states, copies = self.states, bool(_num_checkpoints(config)) and config.asynchronous
        if copies and self.role.follows and states.offload_param != OffloadDevice.nvme:
            return [states.item("checkpoint copy", Place.host, count=states.working_weights())]
        if not copies or not self.role.is_trained:
            return []
        return [states.item("checkpoint copy", Place.host, count=states.copied_for_a_checkpoint())]

    def saved(self, config: CheckpointConfig, *, local_ranks: int) -> list[Item]:
        """Exports, that of the best evaluation among them, and checkpoints."""
        states, checkpoints = self.states, _num_checkpoints(config)
        if self.role.follows:  # it is not exported
            return [states.item(CHECKPOINTS, Place.disk, count=checkpoints * states.working_weights())]
        if not self.role.is_trained:
            return []
        exports = 1 + (checkpoints > 0 and config.best)
        share = -(-states.exported() // local_ranks)  # the first rank writes it for all
        return [
            states.item(EXPORT, Place.disk, count=exports * share),
            states.item(CHECKPOINTS, Place.disk, count=checkpoints * states.in_a_checkpoint()),
        ]

    @cached_property
    def _at_rest(self) -> list[Item]:
        return self.states.at_rest()

    def _in_training(self, part: TracedMemory) -> list[Item]:
        states, (_, backward, place) = self.states, part.point
        items = [*self._traced(part), states.item(GATHERED, Place.device, count=states.gathered())]
        items += states.gradients(states.share_of_gradients(place, backward=backward))
        if backward or place == "between":
            items.append(states.item(GRADIENTS, Place.device, count=states.in_reduction()))
        return items

    def _trace(self, work: Computation, **mode: Any) -> list[TracedMemory]:
        return trace(self.shape, work=work, mode=Mode(self.states.dtype, **mode))

    def _traced(self, part: TracedMemory) -> Iterator[Item]:
        """What a part allocates; with activation offload the inputs of all blocks but one are on the host."""
        states, blocks = self.states, sum(self.shape.runs)
        waiting = part.per_block if states.engine.activation_offload and states.device.type == "cuda" else 0
        for tag, count in part.bytes.items():
            moved = waiting * (blocks - 1) if tag == ACTIVATIONS else 0
            yield states.item(tag, Place.device, count=count - moved)
        yield states.item(ACTIVATIONS, Place.host, count=waiting * blocks)


def _num_checkpoints(config: CheckpointConfig) -> int:
    """On disk at once, one that is being written among them."""
    return (config.keep + config.best + 1) if config.every else 0


def _device_bytes(items: list[Item]) -> int:
    return sum(item.bytes for item in items if item.place is Place.device)


def _with_cache(parts: list[TracedMemory]) -> tuple[TracedMemory, int]:
    """The highest part of generating, and the bytes of the cache, which the first forward calls activations."""
    cache = max((part.bytes.get(CACHE, 0) for part in parts if part.point.call == 1), default=0)
    highest = max(parts, key=lambda part: part.total)
    if highest.point.call == 1:
        return highest, cache
    rest = {tag: max(0, count - (cache if tag == ACTIVATIONS else 0)) for tag, count in highest.bytes.items()}
    return TracedMemory(highest.point, rest), cache
