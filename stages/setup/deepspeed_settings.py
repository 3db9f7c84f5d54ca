"""A DeepSpeed configuration becomes settings of the run, once, before anything else looks at them.

`engine.deepspeed` reaches every stage and model, and each can have its own (`ppo.critic_engine.deepspeed`). What the
file says replaces YAML; what the command line says stands, and where the two contradict each other the run ends.
Afterwards `deepspeed` is null everywhere, and `config.yaml` holds the settings themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rlhf.config.engine_config import EngineConfig
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.run_config import RunConfig
from rlhf.config.stage_configs import SupervisedConfig
from rlhf.deepspeed.deepspeed_schedules import SHAPES, deepspeed_schedule
from rlhf.deepspeed.dialects import read_deepspeed
from rlhf.deepspeed.keys import Path
from rlhf.deepspeed.reader import Document
from rlhf.deepspeed.resolve import MICRO, TRAIN, Batch, Fate, Resolved, has_numbers, resolve, solve_batch
from rlhf.deepspeed.values import Origin, Setting

log = logging.getLogger(__name__)


class Role(NamedTuple):
    """A model of a stage: its name, and the stage's settings of its engine and optimizer."""

    name: str
    engine: str
    optimizer: str | None


_SUPERVISED = (Role("", "engine", "optimizer"),)
_PPO = (
    Role("actor", "engine", "actor_optimizer"),
    Role("critic", "critic_engine", "critic_optimizer"),
    Role("reference", "reference_engine", None),
    Role("reward", "reward_engine", None),
)
_FROZEN = (Role("", "engine", None),)
_ORIGINS = {Origin.file: "{}", Origin.auto: "{} is auto: the run's own", Origin.default: "DeepSpeed's default of {}"}


@dataclass(frozen=True)
class _Context:
    """What every decision needs."""

    general: Any
    """What `engine.deepspeed` says."""
    ranks: int
    overridden: Collection[str]
    report: _Report


def with_deepspeed(run: RunConfig, *, ranks: int, overridden: Collection[str] = ()) -> RunConfig:
    """The run with every `deepspeed` replaced by the settings it stands for; says which, and where they come from.

    Args:
        run: the run as composed.
        ranks: processes it will have.
        overridden: dotted names that the command line sets.

    Raises:
        ValueError: a file that cannot be read, a key that is unknown or refused, sizes that do not add up, or a setting
            that the command line sets otherwise.
    """
    context = _Context(run.engine.deepspeed, ranks, overridden, _Report())
    stages = {stage: _stage(getattr(run, stage), stage, context=context) for stage in (*run.stages, *run.uses)}
    engine = run.engine
    if engine.deepspeed is not None:
        resolved = resolve(read_deepspeed(engine.deepspeed, setting="engine.deepspeed"), engine, optimizer=None)
        values = _chosen(resolved.settings, "engine", own=engine, names=("engine",), overridden=overridden)
        engine = _replaced(engine, values | {"deepspeed": None}, place="engine.deepspeed")
    context.report.log()
    run = replace(run, engine=engine, **stages)
    _check_schedules(run)
    return run


def _stage(config: Any, stage: str, *, context: _Context) -> Any:
    is_ppo = isinstance(config, PPOConfig)
    changes: dict[str, Any] = {}
    for role in _PPO if is_ppo else _SUPERVISED if isinstance(config, SupervisedConfig) else _FROZEN:
        if getattr(config, role.engine).deepspeed is None:
            continue
        new = _role(config, stage, role=role, context=context)
        _check_same(new, changes, stage=stage, role=role)
        changes |= new
    if not changes:
        return config
    train = "minibatch_size" if is_ppo else "global_batch_size"
    return _replaced(config, changes, place=f"{stage}.engine.deepspeed; train_batch_size is {stage}.{train}")


def _role(config: Any, stage: str, *, role: Role, context: _Context) -> dict[str, Any]:
    """The stage's settings that one model's configuration decides."""
    engine: EngineConfig = getattr(config, role.engine)
    optimizer: OptimizerConfig | None = getattr(config, role.optimizer) if role.optimizer else None
    place, setting = (
        f"{getattr(config, 'title', stage)} {role.name}".strip(),
        _given_as(config, stage, role=role, context=context),
    )
    document = read_deepspeed(engine.deepspeed, setting=setting)
    resolved = resolve(document, engine, optimizer=optimizer)
    names = (f"{stage}.{role.engine}", f"{stage}.engine", "engine")
    values = _chosen(resolved.settings, "engine", own=engine, names=names, overridden=context.overridden)
    new: dict[str, Any] = {role.engine: _replaced(engine, values | {"deepspeed": None}, place=setting)}
    if role.optimizer is not None and optimizer is not None:
        names = (f"{stage}.{role.optimizer}",)
        learning = _chosen(resolved.settings, "optimizer", own=optimizer, names=names, overridden=context.overridden)
        new[role.optimizer] = _replaced(optimizer, learning, place=setting)
        values |= learning
    context.report.add(document, resolved, place=place, taken=values)
    return new | (_batch(config, stage, document=document, context=context) if optimizer is not None else {})


def _given_as(config: Any, stage: str, *, role: Role, context: _Context) -> str:
    """The most general setting that says what a model's own `deepspeed` says: probably the one that was written."""
    said = getattr(config, role.engine).deepspeed
    if said == context.general:
        return "engine.deepspeed"
    return f"{stage}.{'engine' if said == config.engine.deepspeed else role.engine}.deepspeed"


def _chosen(
    settings: Iterable[Setting], group: str, *, own: Any, names: Iterable[str], overridden: Collection[str]
) -> dict[str, Any]:
    """The settings of a group that are to be set, by name: a default of DeepSpeed's yields to the command line."""
    chosen = {}
    for setting in settings:
        if setting.group != group:
            continue
        own_value = getattr(own, setting.name)
        said = [f"{name}.{setting.name}" for name in names if f"{name}.{setting.name}" in overridden]
        if said and own_value != setting.value and setting.origin is Origin.file:
            raise ValueError(
                f"{said[0]}={own_value} on the command line, but {setting.value} by {setting.place}; expected one "
                f"of the two. Drop the word on the command line, or the key in the file."
            )
        if not said:
            chosen[setting.name] = setting.value
    return chosen


def _replaced(config: Any, values: dict[str, Any], *, place: str) -> Any:
    try:
        return replace(config, **values)
    except ValueError as error:
        raise ValueError(f"{error} (With the values of {place}.)") from error


def _batch(config: Any, stage: str, *, document: Document, context: _Context) -> dict[str, int]:
    """The stage's two batch sizes, where the file has a number for any."""
    whole = "minibatch_size" if isinstance(config, PPOConfig) else "global_batch_size"
    own = Batch(getattr(config, whole), config.micro_batch_size)
    names = {TRAIN: f"{stage}.{whole}", MICRO: f"{stage}.micro_batch_size"}
    keep = tuple(key for key, name in names.items() if name in context.overridden)
    solved = solve_batch(document, own, ranks=context.ranks, keep=keep)
    for key, (found, expected) in zip(names, ((own.train, solved.train), (own.micro, solved.micro)), strict=True):
        if key in keep and found != expected:
            raise ValueError(
                f"{names[key]}={found} on the command line, but {expected} by the batch sizes of {document.name} with "
                f"{context.ranks} ranks; expected one of the two. Drop the word on the command line, or write auto in "
                f"the file."
            )
    sizes = {whole: solved.train, "micro_batch_size": solved.micro}
    return context.report.batch(document, stage, sizes=sizes) if has_numbers(document) else {}


def _check_same(new: dict[str, Any], before: dict[str, Any], *, stage: str, role: Role) -> None:
    """Actor and critic learn from the same minibatches."""
    for name in ("minibatch_size", "micro_batch_size"):
        if name in before and new.get(name, before[name]) != before[name]:
            raise ValueError(
                f"{stage}.{role.engine}.deepspeed: {stage}.{name} would be {new[name]}, but by the actor's file it is "
                f"{before[name]}; expected the same, for both learn from the same minibatches. Write auto in one file."
            )


def _check_schedules(run: RunConfig) -> None:
    for stage in run.stages:
        config = getattr(run, stage)
        for name in ("actor_optimizer", "critic_optimizer") if isinstance(config, PPOConfig) else ("optimizer",):
            optimizer: OptimizerConfig = getattr(config, name)
            if optimizer.schedule not in SHAPES:
                continue
            try:
                options = optimizer.schedule_options
                deepspeed_schedule(optimizer.schedule, lr=optimizer.lr, warmup_steps=0, total_steps=1, options=options)
            except ValueError as error:
                raise ValueError(f"{stage}.{name}.schedule_options: {error}.") from error


@dataclass
class _Report:
    """What was decided, the same thing said once for all the models it is true of."""

    _names: dict[str, None] = field(default_factory=dict)
    _places: dict[str, list[str]] = field(default_factory=dict)
    _fates: dict[str, dict[Path, tuple[Fate, str] | None]] = field(default_factory=dict)
    """By file and key: None where a setting names it."""
    _warnings: dict[str, None] = field(default_factory=dict)

    def add(self, document: Document, resolved: Resolved, *, place: str, taken: Collection[str]) -> None:
        """What a configuration decides for one model.

        Args:
            document: the configuration.
            resolved: what it means.
            place: the model.
            taken: names of settings; a default of DeepSpeed's that is not among them has yielded to the command line.
        """
        self._names |= dict.fromkeys([*([document.named_by] if document.named_by else []), document.name])
        for setting in resolved.settings:
            if setting.name in taken or setting.origin is not Origin.default:
                origin = _ORIGINS[setting.origin].format(setting.place)
                self._say(f"{setting.group}.{setting.name} = {_shown(setting.value)}  <- {origin}", place)
        fates = self._fates.setdefault(document.name, {})
        for path in document.written:
            fate = resolved.fates.get(path)
            fates[path] = fate and fates.get(path, fate)  # a setting of one model is enough
        self._warnings |= dict.fromkeys(resolved.warnings)

    def batch(self, document: Document, stage: str, *, sizes: dict[str, int]) -> dict[str, int]:
        """Note the sizes, and give them back."""
        for name, size in sizes.items():
            self._say(f"{name} = {size}  <- the batch sizes of {document.name}", stage)
        return sizes

    def _say(self, line: str, place: str) -> None:
        places = self._places.setdefault(line, [])
        places += [place] if place not in places else []

    def log(self) -> None:
        """Say it."""
        if not self._names:
            return
        log.info("DeepSpeed configuration %s; all that it does not say is the run's own", ", ".join(self._names))
        for line, places in self._places.items():
            log.info("  %s  [%s]", line, ", ".join(places))
        for line in self._rest():
            log.info("  %s", line)
        for line in self._warnings:
            log.warning("%s", line)

    def _rest(self) -> Iterator[str]:
        """A line for the keys that no setting names, those of one reason together."""
        for name, fates in self._fates.items():
            together: dict[tuple[Fate, str], list[str]] = {}
            for path, fate in fates.items():
                if fate is not None:
                    together.setdefault(fate, []).append(".".join(path))
            file = f"{name}: " if len(self._fates) > 1 else ""
            yield from (f"{fate}: {file}{', '.join(keys)} ({why})" for (fate, why), keys in together.items())


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
