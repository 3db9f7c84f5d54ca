"""A DeepSpeed configuration becomes settings of the run, once, before anything else looks at them.

`engine.deepspeed` reaches every stage and model, and each can have its own (`ppo.critic_engine.deepspeed`). What the
file says replaces YAML; what the command line says stands, and where the two contradict each other the run ends.
Afterwards `deepspeed` is null everywhere, and `config.yaml` holds the settings themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rlhf.config.engine_config import EngineConfig
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.config.roles import Role, all_roles
from rlhf.config.run_config import RunConfig
from rlhf.config.stage_configs import StageConfig
from rlhf.deepspeed.deepspeed_schedules import SHAPES, deepspeed_schedule
from rlhf.deepspeed.dialects import read_deepspeed
from rlhf.deepspeed.keys import Path
from rlhf.deepspeed.reader import Document
from rlhf.deepspeed.resolve import MICRO, TRAIN, Batch, Fate, Resolved, has_numbers, resolve, solve_batch
from rlhf.deepspeed.values import Origin, Setting

log = logging.getLogger(__name__)

_ORIGINS = {Origin.file: "{}", Origin.auto: "{} is auto: the run's own", Origin.default: "DeepSpeed's default of {}"}
_Group = TypeVar("_Group", EngineConfig, OptimizerConfig, StageConfig)


@dataclass(frozen=True)
class _Context:
    """What every decision needs."""

    run: RunConfig
    ranks: int
    overridden: Collection[str]
    report: _Report


def with_deepspeed(run: RunConfig, *, ranks: int, overridden: Collection[str] = ()) -> RunConfig:
    """The run with every `deepspeed` replaced by the settings it stands for; logs which, and where they come from.

    Args:
        run: the run as composed.
        ranks: processes it will have.
        overridden: dotted names that the command line sets.

    Raises:
        ValueError: a file that cannot be read, a key that is unknown or refused, sizes that do not add up, or a setting
            that the command line sets otherwise.
    """
    context = _Context(run, ranks, overridden, _Report())
    stages: dict[str, Any] = {stage: _stage(stage, context) for stage in (*run.stages, *run.uses)}
    engine = run.engine
    if engine.deepspeed is not None:
        resolved = resolve(read_deepspeed(engine.deepspeed, setting="engine.deepspeed"), engine, optimizer=None)
        engine = replace(engine, deepspeed=None)
        engine, _ = _applied(
            resolved, "engine", own=engine, names=("engine",), place="engine.deepspeed", context=context
        )
    context.report.log()
    run = replace(run, engine=engine, **stages)
    _check_schedules(run)
    return run


def _stage(stage: str, context: _Context) -> StageConfig:
    run = context.run
    roles = {role.engine: role for role in all_roles(run, stage)}  # roles that share an engine share its file
    changes: dict[str, Any] = {}
    for role in roles.values():
        if role.engine_config(run).deepspeed is not None:
            label = f"{run.title(stage)} {role.name}" if len(roles) > 1 else run.title(stage)
            new = _role(role, context, label=label)
            _check_same_batch(new, changes, role=role)
            changes |= new
    place = f"{stage}.engine.deepspeed"
    if any(role.is_trained for role in roles.values()):
        place += f"; train_batch_size is {stage}.{run.training_config(stage).batch_setting}"
    return _replaced(run.stage_config(stage), changes, place=place)


def _role(role: Role, context: _Context, *, label: str) -> dict[str, Any]:
    """The stage's settings that one model's configuration decides."""
    run, stage = context.run, role.stage
    engine, optimizer = role.engine_config(run), role.optimizer_config(run)
    setting = _given_as(role, run)
    document = read_deepspeed(engine.deepspeed, setting=setting)
    resolved = resolve(document, engine, optimizer=optimizer)
    names: tuple[str, ...] = (f"{stage}.{role.engine}", f"{stage}.engine", "engine")
    engine = replace(engine, deepspeed=None)
    engine, chosen = _applied(resolved, "engine", own=engine, names=names, place=setting, context=context)
    new: dict[str, Any] = {role.engine: engine}
    if role.optimizer is not None and optimizer is not None:
        names = (f"{stage}.{role.optimizer}",)
        optimizer, more = _applied(resolved, "optimizer", own=optimizer, names=names, place=setting, context=context)
        new |= {role.optimizer: optimizer} | _batch(stage, document, context=context)
        chosen += more
    context.report.add(document, resolved, chosen=chosen, place=label)
    return new


def _given_as(role: Role, run: RunConfig) -> str:
    """The most general setting that names the file of a model: probably the one that was written."""
    file = role.engine_config(run).deepspeed
    if file == run.engine.deepspeed:
        return "engine.deepspeed"
    is_the_stages = file == run.stage_config(role.stage).engine.deepspeed
    return f"{role.stage}.{'engine' if is_the_stages else role.engine}.deepspeed"


def _applied(
    resolved: Resolved, group: str, *, own: _Group, names: tuple[str, ...], place: str, context: _Context
) -> tuple[_Group, list[Setting]]:
    """`own` with the settings of its group, and those settings; on the command line the group has one of `names`.

    Raises:
        ValueError: the command line says something else, or the settings do not fit each other.
    """
    chosen = []
    for setting in resolved.settings:
        own_value = getattr(own, setting.name, None)
        words = [word for name in names if (word := f"{name}.{setting.name}") in context.overridden]
        if setting.group != group or (words and setting.origin is Origin.default):
            continue  # a default of DeepSpeed's yields to the command line
        if words and own_value != setting.value and setting.origin is Origin.file:
            raise ValueError(
                f"{words[0]}={own_value} on the command line, but {setting.value} by {setting.place}; expected one "
                f"of the two. Drop the word on the command line, or the key in the file."
            )
        chosen.append(setting)
    return _replaced(own, {setting.name: setting.value for setting in chosen}, place=place), chosen


def _replaced(config: _Group, values: dict[str, Any], *, place: str) -> _Group:
    try:
        return replace(config, **values)
    except ValueError as error:
        raise ValueError(f"{error} (With the values of {place}.)") from error


def _batch(stage: str, document: Document, *, context: _Context) -> dict[str, int]:
    """The stage's two batch sizes, where the file has a number for any."""
    if not has_numbers(document):
        return {}
    config = context.run.training_config(stage)
    names = {TRAIN: config.batch_setting, MICRO: "micro_batch_size"}
    own = Batch(config.batch_size, config.micro_batch_size)
    keep = tuple(key for key, name in names.items() if f"{stage}.{name}" in context.overridden)
    solved = solve_batch(document, own, ranks=context.ranks, keep=keep)
    sizes = {}
    for (key, name), found, expected in zip(
        names.items(), (own.train, own.micro), (solved.train, solved.micro), strict=True
    ):
        if key in keep and found != expected:
            raise ValueError(
                f"{stage}.{name}={found} on the command line, but {expected} by the batch sizes of {document.name} "
                f"with {context.ranks} ranks; expected one of the two. Drop the word on the command line, or write "
                f"auto in the file."
            )
        context.report.line(f"{name} = {expected}  <- the batch sizes of {document.name}", stage)
        sizes[name] = expected
    return sizes


def _check_same_batch(new: dict[str, Any], before: dict[str, Any], *, role: Role) -> None:
    """Actor and critic learn from the same minibatches."""
    for name, size in before.items():
        if isinstance(size, int) and new.get(name, size) != size:
            raise ValueError(
                f"{role.stage}.{role.engine}.deepspeed: {role.stage}.{name} would be {new[name]}, but by the actor's "
                f"file it is {size}; expected the same, for both learn from the same minibatches. Write auto in one "
                f"file."
            )


def _check_schedules(run: RunConfig) -> None:
    for role in (role for stage in run.stages for role in all_roles(run, stage)):
        optimizer = role.optimizer_config(run)
        if optimizer is None or optimizer.schedule not in SHAPES:
            continue
        try:
            options = optimizer.schedule_options
            deepspeed_schedule(optimizer.schedule, lr=optimizer.lr, warmup_steps=0, total_steps=1, options=options)
        except ValueError as error:
            raise ValueError(f"{role.stage}.{role.optimizer}.schedule_options: {error}.") from error


@dataclass
class _Report:
    """What was decided, each line once for all the models it is true of."""

    _names: dict[str, None] = field(default_factory=dict)
    _places: dict[str, dict[str, None]] = field(default_factory=dict)
    _fates: dict[str, dict[Path, tuple[Fate, str] | None]] = field(default_factory=dict)
    """By file and key: None where a setting names it."""
    _warnings: dict[str, None] = field(default_factory=dict)

    def add(self, document: Document, resolved: Resolved, *, chosen: list[Setting], place: str) -> None:
        """Note what a configuration decides for one model: the chosen settings, and what becomes of other values."""
        self._names |= dict.fromkeys(filter(None, (document.named_by, document.name)))
        for setting in chosen:
            origin = _ORIGINS[setting.origin].format(setting.place)
            self.line(f"{setting.group}.{setting.name} = {_shown(setting.value)}  <- {origin}", place)
        fates = self._fates.setdefault(document.name, {})
        for path in document.written:
            fate = resolved.fates.get(path)
            fates[path] = fate and fates.get(path, fate)  # a setting of one model is enough
        self._warnings |= dict.fromkeys(resolved.warnings)

    def line(self, line: str, place: str) -> None:
        """Note a line that is true of a place."""
        self._places.setdefault(line, {})[place] = None

    def log(self) -> None:
        """Log all of it."""
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
