"""Which models, phases and sizes a stage has, for the memory plan.

| stage | phases |
|---|---|
| sft, reward | evaluate, train, save |
| ppo | generate, score, train, save |

Models that an earlier stage will make have the shape of what it makes them from. Lengths are those that the
configuration allows: data that is shorter takes less. Left out: showing and judging a plan (`plan_text.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlhf.config.engine_config import EngineConfig, Precision
from rlhf.config.model_config import LoraConfig
from rlhf.config.ppo_config import AdvantageKind, PPOConfig
from rlhf.config.roles import ModelKind, maker_of
from rlhf.config.run_config import RunConfig
from rlhf.config.stage_configs import RewardConfig, SupervisedConfig
from rlhf.engine.materialize import working_dtype
from rlhf.memory_plan.phases import Model
from rlhf.memory_plan.plan import Item, Phase, Place, Plan, on_one_memory, with_allowance
from rlhf.memory_plan.states import GRADIENTS, Setting
from rlhf.memory_plan.trace import ACTIVATIONS, CACHE, LOGITS
from rlhf.memory_plan.workloads import Answers, PolicyLoss, Scalars, Statistics, ValueLoss, of_ppo, of_supervised
from rlhf.models.shapes import Adapters, Shape
from rlhf.runtime.launch import local_ranks

EXPORT, CHECKPOINTS = SAVED = ("export", "checkpoints")
"""What is in the output folder; everything else on disk is below `engine.nvme_path`."""
_MOVING = (ACTIVATIONS, LOGITS, CACHE, GRADIENTS)


@dataclass(frozen=True)
class Machine:
    """Where the run is to be."""

    device: torch.device
    """Only its type counts: a plan can be for a machine that is elsewhere."""
    ranks: int
    """Of the whole run."""
    local_ranks: int
    """Of them on this machine."""
    runtime: tuple[Item, ...] = ()
    """What a process takes before it has a model."""


def plan_stage(run: RunConfig, stage: str, *, machine: Machine) -> Plan:
    """The memory of a stage, of its first rank, which holds the most."""
    planner = _Planner(run, machine)
    found = planner.ppo(run.ppo) if run.ppo is not None and stage == "ppo" else planner.supervised(stage)
    is_cuda = machine.device.type == "cuda"
    phases = [
        Phase(name, (*machine.runtime, *with_allowance(items, is_cuda=is_cuda, moving=_MOVING)))
        for name, items in found
    ]
    if not is_cuda:
        phases = [Phase(phase.name, on_one_memory(phase.items)) for phase in phases]
    return Plan(run.title(stage), machine.local_ranks, is_cuda, tuple(phases))


def machine_of(run: RunConfig, *, ranks: int, runtime: tuple[Item, ...] = ()) -> Machine:
    """The machine that the run will use: this one, or with `engine.device=cuda` one that has a GPU."""
    wanted = run.engine.device
    is_cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return Machine(torch.device("cuda" if is_cuda else "cpu"), ranks, local_ranks(ranks), runtime)


@dataclass(frozen=True)
class _Planner:
    run: RunConfig
    machine: Machine

    def supervised(self, stage: str) -> Iterator[tuple[str, list[Item]]]:
        config = getattr(self.run, stage)
        assert isinstance(config, SupervisedConfig)
        head = ModelKind.scalar_head if isinstance(config, RewardConfig) else ModelKind.causal_lm
        shape = shape_of(self.run, config.init_from, head=head, num_layers=getattr(config, "num_layers", 0))
        shape = replace(shape, dropout=config.dropout)
        steps = config.global_batch_size // (self.machine.ranks * config.micro_batch_size)
        role = "reward model" if head is ModelKind.scalar_head else "model"
        model = self.model(role, shape, engine=config.engine, lora=config.lora, micro_batches=steps)
        work = of_supervised(config)
        yield "evaluate", model.forward(work)
        yield "train", [*model.training(work), *self.copies([model])]
        yield "save", self.saving([model], at_rest=model.at_rest())

    def ppo(self, config: PPOConfig) -> Iterator[tuple[str, list[Item]]]:
        models = self.models_of_ppo(config)
        actor, critic = models["actor"], models.get("critic")
        learning = [model for model in (actor, critic) if model is not None]
        rows = min(config.rollout_micro_batch_size, -(-config.rollout_size // self.machine.ranks))
        micro = config.micro_batch_size
        answers = of_ppo(Answers, config, rows=rows)
        statistics, scalars = (of_ppo(kind, config, rows=micro) for kind in (Statistics, Scalars))
        judged = [(role, models[role].forward(scalars)) for role in ("reward", "critic") if role in models]
        judged += [(role, models[role].forward(statistics)) for role in ("actor", "reference") if role in models]
        trained = [("actor", actor.training(of_ppo(PolicyLoss, config, rows=micro)))]
        if critic is not None:
            trained.append(("critic", critic.training(of_ppo(ValueLoss, config, rows=micro))))
        yield "generate", self.beside(models, [("actor", actor.generation(answers, rows=rows))])
        yield "score", self.beside(models, judged)
        yield "train", [*self.beside(models, trained), *self.copies(learning)]
        at_rest = [item for model in models.values() for item in model.at_rest()]
        yield "save", self.saving(learning, at_rest=at_rest)

    def models_of_ppo(self, config: PPOConfig) -> dict[str, Model]:
        """The roles that hold a model of their own."""
        run = self.run
        steps = config.minibatch_size // (self.machine.ranks * config.micro_batch_size)
        actor = shape_of(run, config.actor, head=ModelKind.causal_lm)
        reward = shape_of(run, config.reward, head=ModelKind.scalar_head)
        models = {"actor": self.model("actor", actor, engine=config.engine, lora=config.lora, micro_batches=steps)}
        if config.advantage is AdvantageKind.gae:
            start = shape_of(run, config.critic or config.reward, head=ModelKind.scalar_head)
            models["critic"] = self.model(
                "critic", start, engine=config.critic_engine, lora=config.lora, micro_batches=steps
            )
        if config.reference_model is not None:
            start = shape_of(run, config.reference_model, head=ModelKind.causal_lm)
            models["reference"] = self.model("reference", start, engine=config.reference_engine)
        return models | {"reward": self.model("reward", reward, engine=config.reward_engine)}

    def model(
        self,
        role: str,
        shape: Shape,
        *,
        engine: EngineConfig,
        lora: LoraConfig | None = None,
        micro_batches: int = 0,
    ) -> Model:
        """A model of the stage; without micro-batches it is frozen."""
        shape = shape if lora is None else replace(shape, adapters=Adapters.of(lora))
        setting = Setting(
            role=role,
            engine=engine,
            ranks=self.machine.ranks,
            device=self.machine.device,
            dtype=_dtype(engine.precision, self.machine.device),
            frozen=micro_batches == 0,
            micro_batches=micro_batches,
        )
        return Model(setting, shape.whole, family=shape, plain=shape.plain)

    def beside(self, models: dict[str, Model], busy: list[tuple[str, list[Item]]]) -> list[Item]:
        """The busiest of the models that take turns, beside all others at rest."""
        found = []
        for role, items in busy:
            others = [item for name, model in models.items() if name != role for item in model.at_rest()]
            found.append([*others, *items])
        return max(found, key=lambda items: sum(item.bytes for item in items if item.place is Place.device))

    def saving(self, models: list[Model], *, at_rest: list[Item]) -> list[Item]:
        """Exports, those of the best evaluation among them, and checkpoints."""
        items = [*at_rest, *self.copies(models)]
        exports = 1 + (self._num_checkpoints > 0 and self.run.checkpoint.best)
        for model in models:
            role, states = model.setting.role, model.states
            share = -(-states.exported() // self.machine.local_ranks)  # the first rank writes it for all
            items.append(Item(role, EXPORT, Place.disk, exports * share))
            items.append(Item(role, CHECKPOINTS, Place.disk, self._num_checkpoints * states.in_a_checkpoint()))
        return items

    def copies(self, models: list[Model]) -> list[Item]:
        """What a checkpoint copies, to be written while training goes on."""
        if not self._num_checkpoints or not self.run.checkpoint.asynchronous:
            return []
        return [
            Item(model.setting.role, "checkpoint copy", Place.host, model.states.copied_for_a_checkpoint())
            for model in models
        ]

    @property
    def _num_checkpoints(self) -> int:
        """On disk at once, one that is being written among them."""
        config = self.run.checkpoint
        return (config.keep + config.best + 1) if config.every else 0


def shape_of(run: RunConfig, path: str, *, head: ModelKind, num_layers: int = 0) -> Shape:
    """The shape of the model at `path`, which an earlier stage of this folder may have yet to make.

    Raises:
        ValueError: there is no such model.
    """
    maker = maker_of(run, path)
    if not (Path(path) / "config.json").exists() and maker is not None:
        made_by = getattr(run, maker)
        if made_by is None:
            raise ValueError(f"{path}: there is no such model yet, and stage={maker}, which makes it, is not planned.")
        return shape_of(run, made_by.init_from, head=head, num_layers=num_layers or getattr(made_by, "num_layers", 0))
    if run.model.embedded is not None and path == run.model.path and not Path(path).exists():
        return Shape(run.model.embedded, head, num_layers)
    return Shape(path, head, num_layers)


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The working type; a GPU that is not here is taken to multiply bf16."""
    if device.type == "cuda" and precision is Precision.auto and not torch.cuda.is_available():
        return torch.bfloat16
    return working_dtype(precision, device)
